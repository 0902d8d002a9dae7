//! A bucket in memory with a clock that is turned by hand, and faults by seed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    base::{BoxFuture, clock::ServerClock, clock::Stamp},
    namespace::segment,
    tier::{Body, Bucket, Etag, Object, ObjectMeta, Page, Put, TierError},
};

/// One change, whoever made it.
pub type ChangeName = (Vec<u8>, Stamp);

#[derive(Debug)]
pub struct World {
    now: watch::Sender<u64>,
    state: Mutex<State>,
    clock: ServerClock,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    /// Objects whose requests are still on their way, with the time when they arrive.
    on_the_way: Vec<(u64, String, Bytes)>,
    /// Changes whose blobs are in the bucket.
    durable: HashSet<ChangeName>,
    /// The times in the keys of the segments that carried a change.
    published: HashMap<ChangeName, BTreeSet<u64>>,
    random: u64,
    faults: bool,
    /// What becomes of the next requests, before chance decides.
    told: VecDeque<Fate>,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Fate {
    Good,
    /// Done, but the reply is lost.
    ReplyLost,
    RequestLost,
    /// Done after so many milliseconds.
    Slow(u64),
    /// The reply is lost, and it is done after so many milliseconds.
    Ghost(u64),
}

impl State {
    fn roll(&mut self, sides: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) % sides
    }

    fn land(&mut self, key: String, bytes: Bytes) {
        let decoded = segment::decode(&bytes).expect("it was inspected when it was sent");
        for change in decoded.changes {
            let times = self.published.entry((change.path, change.stamp)).or_default();
            times.insert(decoded.head.published_millis);
        }
        assert!(!self.objects.contains_key(&key), "{key} was written twice");
        self.objects.insert(key, bytes);
    }

    fn fate(&mut self) -> Fate {
        if let Some(told) = self.told.pop_front() {
            return told;
        }
        if !self.faults {
            return Fate::Good;
        }
        let late = self.roll(50_000);
        match self.roll(12) {
            0 => Fate::ReplyLost,
            1 => Fate::RequestLost,
            2 | 3 => Fate::Slow(late),
            4 => Fate::Slow(late + 55_000),
            5 => Fate::Ghost(late),
            _ => Fate::Good,
        }
    }
}

fn lost(verb: &'static str, key: &str) -> TierError {
    TierError::Unavailable {
        verb,
        key: key.to_owned(),
        source: "the wind took it".into(),
    }
}

impl World {
    pub fn new(seed: u64, start: u64) -> Arc<Self> {
        let state = State {
            random: seed | 1,
            faults: true,
            ..State::default()
        };
        Arc::new(Self {
            now: watch::Sender::new(start),
            state: Mutex::new(state),
            clock: ServerClock::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn now(&self) -> u64 {
        *self.now.borrow()
    }

    /// Turns the clock, and lets arrive what is due.
    pub fn advance(&self, millis: u64) {
        let now = self.now() + millis;
        let mut state = self.state();
        let (due, rest) = std::mem::take(&mut state.on_the_way)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        state.on_the_way = rest;
        let due: Vec<(u64, String, Bytes)> = due;
        for (_, key, bytes) in due {
            state.land(key, bytes);
        }
        drop(state);
        self.now.send_replace(now);
    }

    /// Decides what becomes of the next requests.
    pub fn tell(&self, fates: impl IntoIterator<Item = Fate>) {
        self.state().told.extend(fates);
    }

    /// Puts an object there as it is, segment or not.
    pub fn plant(&self, key: String, bytes: impl Into<Bytes>) {
        self.state().objects.insert(key, bytes.into());
    }

    /// From now on every request succeeds at once.
    pub fn heal(&self) {
        self.state().faults = false;
    }

    pub fn make_durable(&self, change: ChangeName) {
        self.state().durable.insert(change);
    }

    /// The times in the keys of the segments in the bucket that carried it.
    pub fn published_at(&self, change: &ChangeName) -> BTreeSet<u64> {
        self.state().published[change].clone()
    }

    pub fn segments(&self) -> BTreeMap<String, Bytes> {
        self.state().objects.clone()
    }

    async fn sleep(&self, millis: u64) {
        let until = self.now() + millis;
        let mut now = self.now.subscribe();
        now.wait_for(|now| *now >= until)
            .await
            .expect("the world outlives its requests");
    }

    /// Checks what a writer sends, whatever becomes of it.
    fn inspect(&self, bytes: &Bytes) {
        let decoded = segment::decode(bytes).expect("writers write what readers read");
        let state = self.state();
        for change in decoded.changes {
            let name = (change.path, change.stamp);
            assert!(
                state.durable.contains(&name),
                "{name:?} was published before it was durable"
            );
        }
    }
}

impl Bucket for World {
    fn url(&self) -> String {
        "memory:".to_owned()
    }

    fn clock(&self) -> &ServerClock {
        &self.clock
    }

    fn compresses(&self) -> bool {
        true
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        _range: Option<Range<u64>>,
        _max_bytes: u64,
    ) -> BoxFuture<'a, Result<Option<Object>, TierError>> {
        Box::pin(async move {
            let fate = self.state().fate();
            match fate {
                Fate::Good => {}
                Fate::Slow(millis) => self.sleep(millis / 50).await,
                Fate::ReplyLost | Fate::RequestLost | Fate::Ghost(_) => return Err(lost("get", key)),
            }
            let found = self.state().objects.get(key).cloned();
            Ok(found.map(|bytes| Object {
                modified_millis: 0,
                transferred_bytes: bytes.len() as u64,
                bytes,
                etag: Etag(String::new()),
            }))
        })
    }

    fn head<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<Option<ObjectMeta>, TierError>> {
        unreachable!("the log asks for no heads")
    }

    fn put_new<'a>(&'a self, key: &'a str, body: Body) -> BoxFuture<'a, Result<Put, TierError>> {
        Box::pin(async move {
            self.inspect(&body.bytes);
            let fate = self.state().fate();
            match fate {
                Fate::Good | Fate::ReplyLost => {}
                Fate::Slow(millis) => self.sleep(millis).await,
                Fate::RequestLost => return Err(lost("put", key)),
                Fate::Ghost(millis) => {
                    let at = self.now() + millis;
                    self.state().on_the_way.push((at, key.to_owned(), body.bytes));
                    return Err(lost("put", key));
                }
            }
            self.state().land(key.to_owned(), body.bytes);
            if let Fate::ReplyLost = fate {
                return Err(lost("put", key));
            }
            Ok(Put::Written(Etag(String::new())))
        })
    }

    fn put_if<'a>(
        &'a self,
        _key: &'a str,
        _body: Body,
        _etag: &'a Etag,
    ) -> BoxFuture<'a, Result<Put, TierError>> {
        unreachable!("segments are immutable")
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>) -> BoxFuture<'a, Result<Page, TierError>> {
        Box::pin(async move {
            let fate = self.state().fate();
            match fate {
                Fate::Good => {}
                // Segments come between two pages.
                Fate::Slow(millis) => self.sleep(millis / 20).await,
                Fate::ReplyLost | Fate::RequestLost | Fate::Ghost(_) => return Err(lost("list", prefix)),
            }
            let state = self.state();
            let mut found = state
                .objects
                .keys()
                .filter(|key| key.starts_with(prefix) && Some(key.as_str()) > after);
            let objects: Vec<_> = found
                .by_ref()
                .take(3)
                .map(|key| ObjectMeta {
                    key: key.clone(),
                    size: 0,
                    modified_millis: 0,
                })
                .collect();
            let more = found.next().is_some();
            Ok(Page { objects, more })
        })
    }

    fn refresh<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<bool, TierError>> {
        unreachable!("nothing has a lifetime here")
    }

    fn delete<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<(), TierError>> {
        unreachable!("the log deletes nothing")
    }
}
