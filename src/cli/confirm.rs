//! Asking whether something that cannot be undone is meant.

use std::io::{self, BufRead, IsTerminal};

use super::failure::Failure;

/// Asks whoever sits there whether to delete `what`; refuses when nobody does.
pub fn deleting(what: &str, question: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!(
            "deleting {what} cannot be undone: say --yes"
        )));
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|err| Failure::because(1, format!("cannot read the answer: {err}")))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::because(1, format!("{what} was not deleted")))
}
