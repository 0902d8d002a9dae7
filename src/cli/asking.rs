//! How commands ask the daemon of a mount.

use std::{path::Path, time::Duration};

use super::{
    failure::Failure,
    output::{self, ProgressLine},
};
use crate::{
    config::Dirs,
    daemon::control::{
        client::{self, ControlError},
        protocol::{Reply, Request},
    },
};

/// A daemon that waits until a deadline also has to look at each step once more, and to close its index.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks something that is answered at once.
pub fn ask(mountpoint: &Path, request: &Request, within: Duration) -> Result<Reply, ControlError> {
    client::ask(&Dirs::of_this_process(), mountpoint, request, within, |_| {})
}

/// Asks for work that ends at `deadline` at the latest, and shows how far it is.
pub fn await_work(mountpoint: &Path, request: &Request, deadline: Duration) -> Result<Reply, ControlError> {
    let mut line = ProgressLine::new();
    let within = deadline.saturating_add(PATIENCE);
    let reply = client::ask(
        &Dirs::of_this_process(),
        mountpoint,
        request,
        within,
        |progress| line.show(&output::progress_text(progress)),
    );
    line.end();
    reply
}

/// The failure for a reply that does not fit the request: a daemon of another version.
pub fn odd(mountpoint: &Path, reply: &Reply) -> Failure {
    Failure::because(
        1,
        format!(
            "the daemon of {} gave an odd answer: {reply:?}",
            mountpoint.display()
        ),
    )
}
