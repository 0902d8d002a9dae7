//! What the publisher's and the follower's loops share.

use std::{error::Error, fmt::Write};

/// Runs `work`, which may wait for the disk, off the runtime's workers.
///
/// Never returns when the runtime is being shut down: whoever waits is, too.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(err) => match err.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_shutdown) => std::future::pending().await,
        },
    }
}

/// Writes an error and everything that led to it on one line, for a status.
pub(super) fn words(err: &(dyn Error + 'static)) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(source) = next {
        // A transparent error says what its source says.
        let said = source.to_string();
        if !text.ends_with(&said) {
            let _ = write!(text, ": {said}");
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{namespace::TreeError, store::StoreError};

    #[test]
    fn an_error_is_told_once_with_its_causes() {
        let err = StoreError::Disk {
            verb: "open",
            path: "/x".into(),
            source: std::io::Error::other("no"),
        };
        assert_eq!(words(&TreeError::Store(err)), "cannot open /x: no");
    }
}
