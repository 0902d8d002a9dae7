//! Asks a bucket again that does not answer, for commands that work without a daemon.
//!
//! A daemon has all the time there is; whoever typed a command wants to know soon. So the tries are few.

use std::time::Duration;

use super::catalog::CatalogError;
use crate::{base::retry::Backoff, tier::TierError};

const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const MAX_WAIT: Duration = Duration::from_secs(3);

/// An error that may pass.
pub(super) trait Passing {
    fn may_pass(&self) -> bool;
}

impl Passing for TierError {
    fn may_pass(&self) -> bool {
        self.is_transient()
    }
}

impl Passing for CatalogError {
    fn may_pass(&self) -> bool {
        self.is_transient()
    }
}

/// Does `ask` until it is answered, a few times at most.
pub(super) async fn patiently<T, E, F>(ask: impl FnMut() -> F) -> Result<T, E>
where
    E: Passing,
    F: Future<Output = Result<T, E>>,
{
    with(Backoff::new(FIRST_WAIT, MAX_WAIT), ask).await
}

async fn with<T, E, F>(mut waits: Backoff, mut ask: impl FnMut() -> F) -> Result<T, E>
where
    E: Passing,
    F: Future<Output = Result<T, E>>,
{
    for _ in 1..TRIES {
        match ask().await {
            Err(err) if err.may_pass() => tokio::time::sleep(waits.next_wait()).await,
            other => return other,
        }
    }
    ask().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn asked(answer: impl Fn(u32) -> Result<(), TierError>) -> (u32, bool) {
        let mut count = 0;
        let waits = Backoff::new(Duration::from_millis(1), Duration::from_millis(1));
        let result = with(waits, || {
            count += 1;
            std::future::ready(answer(count))
        });
        let is_ok = result.await.is_ok();
        (count, is_ok)
    }

    #[tokio::test]
    async fn only_what_may_pass_is_asked_again_and_not_for_ever() {
        let away = || TierError::Unavailable {
            verb: "get",
            key: "k".into(),
            source: "away".into(),
        };
        let after = |failures: u32| move |count: u32| if count <= failures { Err(away()) } else { Ok(()) };
        assert_eq!(asked(after(0)).await, (1, true));
        assert_eq!(asked(after(2)).await, (3, true));
        assert_eq!(asked(after(9)).await, (TRIES, false));
        let refused = |_| Err(TierError::Unsupported { why: String::new() });
        assert_eq!(asked(refused).await, (1, false));
    }
}
