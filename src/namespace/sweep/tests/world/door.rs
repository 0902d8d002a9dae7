//! The ways to the bucket in memory: open, or through a gate that lets requests pass one by one.

use std::{ops::Range, sync::Arc};

use tokio::sync::Semaphore;

use super::{PAGE, World};
use crate::{
    base::{
        BoxFuture,
        clock::{ServerClock, local_millis},
    },
    tier::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, TierError, layout},
};

/// A way to the bucket: open, or one that lets through as many requests as its gate says.
#[derive(Debug)]
pub struct Door {
    world: Arc<World>,
    gate: Option<Arc<Semaphore>>,
    clock: ServerClock,
}

impl Door {
    pub fn open(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            gate: None,
            clock: ServerClock::default(),
        }
    }

    /// One whose clock shows what that of the world does, as long as nobody turns it.
    pub fn in_time(world: &Arc<World>) -> Self {
        let door = Self::open(world);
        door.set_clock(world.now());
        door
    }

    /// Has its clock show this, and go on.
    pub fn set_clock(&self, millis: u64) {
        let local = local_millis();
        self.clock.observe(local, local, millis, 1);
    }

    pub fn gated(world: &Arc<World>, gate: Arc<Semaphore>) -> Self {
        Self {
            gate: Some(gate),
            ..Self::open(world)
        }
    }

    async fn pass(&self) {
        if let Some(gate) = &self.gate {
            gate.acquire().await.expect("nobody closes it").forget();
        }
    }
}

impl Bucket for Door {
    fn url(&self) -> String {
        "memory:".to_owned()
    }

    fn clock(&self) -> &ServerClock {
        let local = local_millis();
        self.clock.observe(local, local, self.world.now(), 0);
        &self.clock
    }

    fn compresses(&self) -> bool {
        false
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        range: Option<Range<u64>>,
        max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let mut state = self.world.state();
            state.read.push(key.to_owned());
            let is_denied = |denied: &String| match denied.strip_suffix('*') {
                Some(folder) => key.starts_with(folder),
                None => key == denied,
            };
            if state.denied.iter().any(is_denied) {
                return Err(TierError::Denied {
                    permission: "s3:GetObject",
                    key: key.to_owned(),
                    source: "403".into(),
                });
            }
            let Some(stored) = state.objects.get(key) else {
                return Ok(None);
            };
            let bytes = match range {
                Some(range) => {
                    let end = range.end.min(stored.bytes.len() as u64);
                    stored.bytes.slice(range.start as usize..end as usize)
                }
                None if stored.bytes.len() as u64 > max_bytes => {
                    return Err(TierError::Malformed {
                        key: key.to_owned(),
                        why: "it is too large".to_owned(),
                    });
                }
                None => stored.bytes.clone(),
            };
            Ok(Some(Object {
                modified_millis: stored.modified,
                transferred_bytes: bytes.len() as u64,
                bytes,
                etag: Etag(stored.version.to_string()),
            }))
        })
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let state = self.world.state();
            Ok(state.objects.get(key).map(|stored| ObjectMeta {
                key: key.to_owned(),
                size: stored.bytes.len() as u64,
                modified_millis: stored.modified,
            }))
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let now = self.world.now();
            let mut state = self.world.state();
            if state.objects.contains_key(key) {
                return Ok(Put::Refused);
            }
            Ok(state.put(key, body.bytes, now))
        })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        body: Body,
        etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let now = self.world.now();
            let mut state = self.world.state();
            let version = state.objects.get(key).map(|stored| stored.version.to_string());
            if version.as_ref() != Some(&etag.0) {
                return Ok(Put::Refused);
            }
            Ok(state.put(key, body.bytes, now))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let state = self.world.state();
            let mut found = state
                .objects
                .iter()
                .filter(|(key, _)| key.starts_with(prefix) && Some(key.as_str()) > after);
            let objects: Vec<_> = found
                .by_ref()
                .take(PAGE)
                .map(|(key, stored)| ObjectMeta {
                    key: key.clone(),
                    size: stored.bytes.len() as u64,
                    modified_millis: stored.modified,
                })
                .collect();
            let more = found.next().is_some();
            Ok(Page { objects, more })
        })
    }

    fn refresh<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        Box::pin(async move {
            self.pass().await;
            let now = self.world.now();
            let mut state = self.world.state();
            let Some(stored) = state.objects.get_mut(key) else {
                return Ok(false);
            };
            stored.modified = now;
            Ok(true)
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        Box::pin(async move {
            self.pass().await;
            let mut state = self.world.state();
            if layout::object_digest(key).is_some() {
                state.check_deletion(key);
            }
            state.trimmed += u64::from(key.starts_with(layout::VOLUMES_PREFIX));
            state.objects.remove(key);
            Ok(())
        })
    }
}
