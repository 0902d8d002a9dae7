//! Asks a bucket for many things, some at a time.

use tokio::task::JoinSet;

/// Requests under way at once: enough to hide what one takes, few enough for any server.
const AT_ONCE: usize = 16;

/// Waits for all of `asks`, a few of which are under way at any time; the answers are in the order of the asks.
///
/// What is under way ends with the future.
pub(super) async fn together<T, F>(asks: impl IntoIterator<Item = F, IntoIter: Send> + Send) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut asks = asks.into_iter().enumerate();
    let mut under_way = JoinSet::new();
    let mut done = Vec::new();
    loop {
        while under_way.len() < AT_ONCE
            && let Some((number, ask)) = asks.next()
        {
            under_way.spawn(async move { (number, ask.await) });
        }
        match under_way.join_next().await {
            Some(Ok(one)) => done.push(one),
            Some(Err(err)) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
            Some(Err(_shutdown)) => std::future::pending().await,
            None => break,
        }
    }
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    };

    use super::*;

    #[tokio::test]
    async fn answers_keep_their_order_and_some_asks_only_are_under_way() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let asks = (0..100_u64).map(|number| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                for _ in 0..(7 - number % 7) {
                    tokio::task::yield_now().await;
                }
                now.fetch_sub(1, SeqCst);
                number
            }
        });
        let answers = together(asks.collect::<Vec<_>>()).await;
        assert_eq!(answers, (0..100).collect::<Vec<u64>>());
        assert_eq!(most.load(SeqCst), AT_ONCE);
    }
}
