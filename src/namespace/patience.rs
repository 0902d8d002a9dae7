//! Asks a bucket again that does not answer, for commands that work without a daemon.
//!
//! A daemon has all the time there is; whoever typed a command wants to know soon. So the tries are few.

use std::time::Duration;

use crate::{base::retry::Backoff, tier::TierError};

const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const MAX_WAIT: Duration = Duration::from_secs(3);

/// Does `ask` until it is answered, a few times at most.
pub(super) async fn patiently<T, F>(mut ask: impl FnMut() -> F) -> Result<T, TierError>
where
    F: Future<Output = Result<T, TierError>>,
{
    let mut backoff = Backoff::new(FIRST_WAIT, MAX_WAIT);
    for _ in 1..TRIES {
        match ask().await {
            Err(err) if err.is_transient() => tokio::time::sleep(backoff.next_wait()).await,
            other => return other,
        }
    }
    ask().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_may_pass_is_asked_again_and_not_for_ever() {
        let unavailable = || TierError::Unavailable {
            verb: "get",
            key: "k".into(),
            source: "away".into(),
        };
        for (answers, asked) in [(0, 1), (2, 3), (9, 5)] {
            let mut count = 0;
            let result = patiently(|| {
                count += 1;
                let fails = count <= answers;
                async move { if fails { Err(unavailable()) } else { Ok(()) } }
            })
            .await;
            assert_eq!((count, result.is_ok()), (asked, answers < TRIES));
        }
        let mut count = 0;
        let refused = patiently(|| {
            count += 1;
            async { Err::<(), _>(TierError::Unsupported { why: String::new() }) }
        });
        assert!(refused.await.is_err());
        assert_eq!(count, 1);
    }
}
