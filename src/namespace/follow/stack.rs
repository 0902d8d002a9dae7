//! Follows every layer of a stack, each into its place in the tree.
//!
//! The layers are independent: which of two changes counts does not depend on which came
//! first, so nothing waits for anything, and a log that cannot be read holds up no other.
//!
//! The layers of a snapshot have no followers: nothing of them ever changes, and nobody is asked.

use std::sync::Arc;

use tokio::time::Instant;

use super::{
    FollowStatus, FollowerHandle, Pace,
    reader::{LogView, NOTE_PREFIX, Reader, Sink},
    start,
};
use crate::{
    base::{
        BoxFuture,
        digest::Digest,
        volume::{Stack, StackLayer},
    },
    namespace::{
        TreeError,
        background::blocking,
        catalog::attach::Attached,
        change::PathChange,
        tree::{TellKernel, Tree},
    },
    store::{
        Store, StoreError,
        ledger::Ledger,
        rows::{Change, TreeLayer},
    },
    tier::SharedBucket,
};

/// Changes that are merged in one go: who stops the follower waits for no more.
const MERGED_TOGETHER: usize = 1024;

/// What was seen of one layer.
#[derive(Clone, Debug)]
pub struct LayerStatus {
    pub layer: StackLayer,
    pub follow: FollowStatus,
}

/// The followers of a stack.
#[derive(Debug)]
pub struct StackFollowerHandle(Vec<Followed>);

#[derive(Debug)]
struct Followed {
    layer: StackLayer,
    /// `None`: of a snapshot.
    follower: Option<FollowerHandle>,
}

impl Followed {
    fn status(&self) -> FollowStatus {
        match &self.follower {
            Some(follower) => follower.status(),
            None => FollowStatus {
                caught_up_millis: self.layer.frozen.as_ref().map_or(0, |frozen| frozen.as_of_millis),
                settled: true,
                ..FollowStatus::default()
            },
        }
    }
}

/// Starts to follow all layers on `runtime`.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    stack: &Stack,
    tree: &Arc<Tree>,
    store: &Arc<Store>,
    bucket: &SharedBucket,
    tell_kernel: &TellKernel,
    pace: Pace,
) -> StackFollowerHandle {
    let numbers = (0..).map_while(TreeLayer::new);
    let follow = |(followed, layer): (&StackLayer, TreeLayer)| {
        if followed.frozen.is_some() {
            return Followed {
                layer: followed.clone(),
                follower: None,
            };
        }
        let view = LogView {
            volume: followed.volume.to_string(),
            // What this machine said of a volume below, it said with another cache directory.
            without: (layer == TreeLayer::TOP && !reads_own(&store.ledger, followed))
                .then_some(store.machine),
            until_millis: followed.until_millis,
        };
        let sink = Arc::new(Home {
            layer,
            tree: Arc::clone(tree),
            store: Arc::clone(store),
            tell_kernel: Arc::clone(tell_kernel),
        });
        let bucket = Arc::clone(bucket);
        let open = move || {
            let clock = Arc::clone(&bucket);
            Reader::open(
                view.clone(),
                Arc::clone(&sink),
                Arc::clone(&bucket),
                Arc::new(move || clock.clock().now_millis()),
            )
        };
        Followed {
            layer: followed.clone(),
            follower: Some(start(runtime, pace, open)),
        }
    };
    StackFollowerHandle(stack.layers().iter().zip(numbers).map(follow).collect())
}

/// Whether the tree forgot what this machine itself had published. An index that cannot be read is
/// told of by whoever needs it next.
fn reads_own(ledger: &Ledger, layer: &StackLayer) -> bool {
    let attached = Attached::of(ledger, layer.volume.as_str());
    attached.is_ok_and(|attached| attached.is_some_and(|attached| attached.reads_own))
}

impl StackFollowerHandle {
    fn followers(&self) -> impl Iterator<Item = &FollowerHandle> {
        self.0.iter().filter_map(|followed| followed.follower.as_ref())
    }

    /// Notes that the mount is in use: polls come every second for the next 5 minutes. Cheap.
    pub fn used(&self) {
        for follower in self.followers() {
            follower.used();
        }
    }

    /// All layers as one: sums, the layer that is furthest behind, the uppermost one's trouble.
    pub fn status(&self) -> FollowStatus {
        let layers = self.0.iter().map(Followed::status);
        layers
            .reduce(|all, layer| FollowStatus {
                segments: all.segments + layer.segments,
                segment_bytes: all.segment_bytes + layer.segment_bytes,
                changes: all.changes + layer.changes,
                caught_up_millis: if layer.settled {
                    all.caught_up_millis
                } else {
                    all.caught_up_millis.min(layer.caught_up_millis)
                },
                settled: all.settled && layer.settled,
                last_error: all.last_error.or(layer.last_error),
            })
            .unwrap_or_default()
    }

    /// Each layer by itself, from the top.
    pub fn layers(&self) -> Vec<LayerStatus> {
        let status = |followed: &Followed| LayerStatus {
            layer: followed.layer.clone(),
            follow: followed.status(),
        };
        self.0.iter().map(status).collect()
    }

    /// Waits until a poll of every layer that began after the call has been applied whole. False
    /// when `deadline` passed first.
    pub async fn caught_up(&self, deadline: Instant) -> bool {
        let asked: Vec<u64> = self.followers().map(|follower| follower.shared.ask()).collect();
        for (follower, wanted) in self.followers().zip(asked) {
            if !follower.shared.reached(wanted, deadline).await {
                return false;
            }
        }
        true
    }

    /// Stops, and keeps what was seen.
    pub async fn shutdown(self) {
        for follower in self.0.into_iter().filter_map(|followed| followed.follower) {
            follower.shutdown().await;
        }
    }
}

/// The volumes whose logs a cache directory was used with, by what its followers and its
/// publisher keep in the ledger.
pub fn followed_volumes(ledger: &Ledger) -> Result<Vec<String>, StoreError> {
    let notes = ledger.meta_keys(NOTE_PREFIX)?.into_iter();
    let mut volumes: Vec<String> = notes
        .filter_map(|note| {
            let (volume, _) = note.strip_prefix(NOTE_PREFIX)?.split_once('/')?;
            Some(volume.to_owned())
        })
        .collect();
    volumes.dedup();
    Ok(volumes)
}

/// This machine, as the reader of one layer needs it.
struct Home {
    layer: TreeLayer,
    tree: Arc<Tree>,
    store: Arc<Store>,
    tell_kernel: TellKernel,
}

impl Sink for Home {
    fn apply(&self, changes: Vec<PathChange>) -> BoxFuture<'_, Result<(), TreeError>> {
        let layer = self.layer;
        Box::pin(async move {
            let mut changes = changes.into_iter();
            loop {
                let some: Vec<_> = changes.by_ref().take(MERGED_TOGETHER).collect();
                if some.is_empty() {
                    return Ok(());
                }
                let (tree, staging) = (Arc::clone(&self.tree), self.store.staging.clone());
                let tell_kernel = Arc::clone(&self.tell_kernel);
                blocking(move || {
                    let applied = tree.apply(layer, some)?;
                    for id in applied.discarded {
                        staging.remove_after_barrier(id);
                    }
                    if !applied.notices.is_empty() {
                        tell_kernel(applied.notices);
                    }
                    Ok::<_, TreeError>(())
                })
                .await?;
            }
        })
    }

    fn fetch_list(&self, list: (Digest, u64), blob: (Digest, u64)) -> BoxFuture<'_, Result<(), StoreError>> {
        let fetcher = &self.store.fetcher;
        Box::pin(fetcher.fetch_manifest(list.0, list.1, blob.0, blob.1))
    }

    fn note(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.ledger.meta(key)
    }

    fn keep_note(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        self.store
            .ledger
            .commit(vec![Change::PutMeta(key.to_owned(), value)])
    }
}
