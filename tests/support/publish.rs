//! What a tree has to tell the others, for tests of the merge without a bucket.

use casmount::namespace::{
    change::PathChange,
    tree::{Readiness, Tree},
};

/// Takes everything that waits to be published, in order. Files must be empty: others wait for their bytes.
#[track_caller]
pub fn publish(tree: &Tree) -> Vec<PathChange> {
    let pending = tree.pending(10_000).unwrap();
    let done: Vec<_> = pending
        .iter()
        .map(|change| (change.parent, change.name.clone(), change.stamp))
        .collect();
    tree.published(&done).unwrap();
    pending
        .into_iter()
        .map(|change| match change.readiness {
            Readiness::Ready(change) => *change,
            other => panic!("empty files, links and directories are ready at once, not {other:?}"),
        })
        .collect()
}
