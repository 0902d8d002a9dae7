//! Single flight: one run of a job however many ask for it at once.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex},
};

use tokio::sync::OnceCell;

/// Jobs under way, by key. Those who ask while a job runs share its result;
/// the result is forgotten when the last of them has it.
///
/// A job runs in the task of whoever asked first. When that task is dropped
/// in the middle, another of those who wait runs the job anew.
#[derive(Debug)]
pub struct Flights<K, V> {
    under_way: Mutex<HashMap<K, Arc<OnceCell<V>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            under_way: Mutex::default(),
        }
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Flights<K, V> {
    /// Runs `job`, or waits for the run of it that is under way.
    pub async fn run(&self, key: K, job: impl Future<Output = V>) -> V {
        let landing = Landing {
            flights: self,
            cell: Some(self.board(&key)),
            key,
        };
        let cell = landing
            .cell
            .as_ref()
            .expect("taken only when the landing is dropped");
        cell.get_or_init(|| job).await.clone()
    }

    /// Whether a run of `key` is under way.
    pub fn is_under_way(&self, key: &K) -> bool {
        let under_way = self.under_way.lock();
        under_way
            .expect("no code panics while it holds the table")
            .contains_key(key)
    }

    fn board(&self, key: &K) -> Arc<OnceCell<V>> {
        let mut under_way = self
            .under_way
            .lock()
            .expect("no code panics while it holds the table");
        Arc::clone(under_way.entry(key.clone()).or_default())
    }
}

/// Forgets a flight when nobody waits for it any more.
struct Landing<'a, K: Eq + Hash, V> {
    flights: &'a Flights<K, V>,
    key: K,
    cell: Option<Arc<OnceCell<V>>>,
}

impl<K: Eq + Hash, V> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        let mut under_way = self
            .flights
            .under_way
            .lock()
            .expect("no code panics while it holds the table");
        let Some(cell) = self.cell.take() else { return };
        // A finished flight is forgotten at once, so that whoever asks later
        // runs the job anew; an unfinished one only when nobody else waits.
        let current = under_way
            .get(&self.key)
            .is_some_and(|other| Arc::ptr_eq(other, &cell));
        if current && (cell.initialized() || Arc::strong_count(&cell) == 2) {
            under_way.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn those_who_ask_together_share_one_run() {
        let flights = Flights::default();
        let runs = AtomicU32::new(0);
        let job = || async {
            tokio::task::yield_now().await;
            runs.fetch_add(1, Ordering::Relaxed)
        };
        let (a, b, c) = tokio::join!(
            flights.run(1, job()),
            flights.run(1, job()),
            flights.run(2, job())
        );
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_eq!(runs.load(Ordering::Relaxed), 2);
        assert!(flights.under_way.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_later_question_runs_anew() {
        let flights = Flights::default();
        assert_eq!(flights.run((), async { 1 }).await, 1);
        assert_eq!(flights.run((), async { 2 }).await, 2);
    }

    #[tokio::test]
    async fn a_dropped_run_is_taken_over() {
        let flights = Flights::default();
        let mut stuck = Box::pin(flights.run((), std::future::pending()));
        let taken_over = flights.run((), async { 5 });
        tokio::select! {
            biased;
            _ = &mut stuck => unreachable!("it never ends"),
            () = tokio::task::yield_now() => {}
        }
        drop(stuck);
        assert_eq!(taken_over.await, 5);
        assert!(flights.under_way.lock().unwrap().is_empty());
    }
}
