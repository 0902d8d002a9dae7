//! Lookups, whose answer may need the network and may not be for the kernel to keep.

use std::{sync::Arc, time::Duration};

use fuser::ReplyEntry;

use super::{
    answer,
    front::{Front, TTL},
};
use crate::{
    store::rows::Ino,
    vfs::{Keep, Lookup, Vfs},
};

/// Answers a lookup, from a task if something is to be fetched first.
pub(super) fn answer(front: &Front, vfs: &Arc<Vfs>, parent: Ino, name: &[u8], reply: ReplyEntry) {
    match vfs.lookup(parent, name) {
        Err(err) if err.not_loaded().is_some() => {
            let (vfs, name, ending) = (Arc::clone(vfs), name.to_vec(), front.hold.ending());
            front.runtime.spawn(async move {
                let found = async {
                    match vfs.with_loaded(|vfs| vfs.lookup(parent, &name)).await? {
                        Lookup::Known(attr, keep) => Ok((attr, keep)),
                        Lookup::Fetch(wanted) => {
                            let found = vfs.lookup_fetching(parent, &name, wanted).await;
                            found.map(|attr| (attr, Keep::Not))
                        }
                    }
                };
                let (found, keep) = match ending.or(found).await {
                    Err(err) => (Err(err), Keep::Not),
                    Ok((attr, keep)) => (Ok(attr), keep),
                };
                answer::entry_for(reply, found, &ttl(keep));
            });
        }
        Err(err) => answer::entry(reply, Err(err)),
        Ok(Lookup::Known(attr, keep)) => answer::entry_for(reply, Ok(attr), &ttl(keep)),
        Ok(Lookup::Fetch(wanted)) => {
            let (vfs, name, ending) = (Arc::clone(vfs), name.to_vec(), front.hold.ending());
            front.runtime.spawn(async move {
                let found = ending.or(vfs.lookup_fetching(parent, &name, wanted)).await;
                answer::entry_for(reply, found, &ttl(Keep::Not));
            });
        }
    }
}

/// How long the kernel may keep a name and its attributes.
pub(super) fn ttl(keep: Keep) -> Duration {
    match keep {
        Keep::Long => TTL,
        Keep::Not => Duration::ZERO,
    }
}
