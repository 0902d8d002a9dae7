//! Tells the bucket, now and then, which names are used here, and keeps young what they name.
//!
//! # Policy
//!
//! - Nobody wants to know before a sweep was run with `--expire`: a daemon looks for [`ExpiryJson`] at its start and every
//!   [`LOOK`], one GET each. Until the first answer uses are noted, so that none at the beginning is lost.
//! - What was used is told in one object after five minutes at most, and then in growing steps up to [`Pace::pause`], and at the
//!   end; nothing is written when nothing new was used. A name is told again when it is used [`Pace::again`] later.
//! - Names are looked up a few at a time, three quarters of the time are left to others.
//! - In a store whose blobs have a lifetime ([`crate::tier::retaining`]) the blobs of what was used are looked at, at the
//!   same times: those that this machine has not seen for a while are asked for, and one that is too old is refreshed by
//!   that. It is what is done before a name is published ([`crate::upload::vouch`]), so what is gone and is here
//!   is uploaded again. Whether it is such a store is asked again and again by a daemon that began while it was away,
//!   and once more at its end.
//! - What cannot be written is told later. Where the credentials do not permit it, a fork tells below its own prefix;
//!   else nothing is told, and that is said once.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    Pace,
    format::{ExpiryJson, MAX_JSON_BYTES, MAX_NAMES, Told},
    recorder::Inos,
};
use crate::{
    base::{
        id::{MachineId, random_bytes},
        volume::{Stack, VolumeName},
    },
    namespace::{
        TreeError,
        background::{blocking, words},
        publish::named,
        tree::Tree,
    },
    store::rows::{Ino, TreeLayer},
    tier::{Body, Bucket, Etag, SharedBucket, TierError, layout, lifetime},
    upload::{UploadError, vouch::Voucher},
};

/// How often a daemon looks whether somebody wants to know what is used.
pub const LOOK: Duration = Duration::from_secs(3600);

/// The first telling is so long after the start, at the latest.
const FIRST: Duration = Duration::from_secs(300);

/// The wait after a failure.
const RETRY: Duration = Duration::from_secs(60);

/// The same while nobody knows how old blobs become: what is used may be about to go.
const LEARN: Duration = Duration::from_secs(5);

/// Names that are looked up without a rest, and how much longer the rest is.
const TOGETHER: usize = 256;
const REST_SHARE: u32 = 3;

/// What a stop waits for the last telling.
const LAST_WITHIN: Duration = Duration::from_secs(3);

/// The settings of a volume whose names expire; `None`: they do not.
pub async fn read_expiry(
    bucket: &dyn Bucket,
    volume: &VolumeName,
) -> Result<Option<(ExpiryJson, Etag)>, TierError> {
    let key = layout::expiry(volume.as_str());
    match bucket.get(&key, None, MAX_JSON_BYTES).await? {
        Some(object) => Ok(Some((
            ExpiryJson::decode(volume.as_str(), &object.bytes)?,
            object.etag,
        ))),
        None => Ok(None),
    }
}

/// Keeps young what is used, in a store whose blobs have a lifetime.
#[derive(Debug)]
pub struct Refresh {
    pub lifetime: Duration,
    pub voucher: Voucher,
}

/// What was told of uses, and kept young.
#[derive(Clone, Debug, Default)]
pub struct TellStatus {
    /// How long names may be unused; `None`: nobody wants to know.
    pub expire: Option<Duration>,
    /// How old blobs of the store become; `None`: as old as a sweep lets them.
    pub lifetime: Option<Duration>,
    /// Names that were used and are not told, or whose blobs were not looked at, since.
    pub waiting: u64,
    /// When names were last told, in milliseconds since 1970 of the bucket's clock.
    pub told_millis: Option<u64>,
    /// Until when what was told then speaks of them.
    pub told_until_millis: Option<u64>,
    /// When the blobs of all that had been used were last looked at.
    pub kept_young_millis: Option<u64>,
    /// Blobs that were looked at.
    pub kept_young_blobs: u64,
    /// Until it is done.
    pub last_error: Option<String>,
}

/// What is known of how old blobs become.
#[derive(Debug)]
pub enum Lifetime {
    /// As old as a sweep lets them, or not this machine's business.
    Unlimited,
    Limited(Refresh),
    /// The store was away when it would have been asked. What keeps them young, if they have to be.
    Unknown(Voucher),
}

#[derive(Debug)]
pub struct TellerHandle {
    status: Arc<Mutex<TellStatus>>,
    tree: Arc<Tree>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl TellerHandle {
    pub fn status(&self) -> TellStatus {
        TellStatus {
            waiting: self.tree.touched().waiting(),
            ..locked(&self.status).clone()
        }
    }

    /// Tells what was not told yet, if the bucket answers soon, and stops.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        if let Err(err) = self.task.await {
            tracing::error!(error = %err, "the teller of used names had died");
        }
    }
}

/// Starts on `runtime`. Names of the lowest volume of `stack` alone expire, so those are told.
pub fn spawn(
    runtime: &tokio::runtime::Handle,
    stack: &Stack,
    tree: &Arc<Tree>,
    bucket: &SharedBucket,
    machine: MachineId,
    lifetime: Lifetime,
) -> TellerHandle {
    let (refresh, unknown) = match lifetime {
        Lifetime::Unlimited => (None, None),
        Lifetime::Limited(refresh) => (Some(refresh), None),
        Lifetime::Unknown(voucher) => (None, Some(voucher)),
    };
    let layers = stack.layers();
    let lowest = layers.last().map_or(stack.volume(), |layer| &layer.volume);
    let layer = TreeLayer::new(layers.len().saturating_sub(1) as u64);
    tree.touched().turn_on();
    let status = Arc::new(Mutex::new(TellStatus {
        lifetime: refresh.as_ref().map(|refresh| refresh.lifetime),
        ..TellStatus::default()
    }));
    let teller = Teller {
        volume: lowest.clone(),
        own: (layers.len() > 1).then(|| stack.volume().clone()),
        layer: layer.unwrap_or(TreeLayer::TOP),
        tree: Arc::clone(tree),
        bucket: Arc::clone(bucket),
        machine,
        refresh,
        unknown,
        below_own: false,
        status: Arc::clone(&status),
        taken: None,
    };
    let (stop, stopped) = watch::channel(false);
    let task = runtime.spawn(teller.run(stopped));
    TellerHandle {
        status,
        tree: Arc::clone(tree),
        stop,
        task,
    }
}

fn locked(status: &Mutex<TellStatus>) -> MutexGuard<'_, TellStatus> {
    status.lock().expect("no code panics while it holds the status")
}

struct Teller {
    /// Whose names expire.
    volume: VolumeName,
    /// The mounted fork, if it is one.
    own: Option<VolumeName>,
    layer: TreeLayer,
    tree: Arc<Tree>,
    bucket: SharedBucket,
    machine: MachineId,
    refresh: Option<Refresh>,
    /// Nobody knows yet whether there is anything to refresh: by this, if so.
    unknown: Option<Voucher>,
    /// Told below the fork's prefix, because more is not permitted.
    below_own: bool,
    status: Arc<Mutex<TellStatus>>,
    /// What is being told.
    taken: Option<Inos>,
}

#[derive(Debug, thiserror::Error)]
enum TellError {
    #[error(transparent)]
    Bucket(#[from] TierError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Refresh(#[from] UploadError),
}

impl TellError {
    fn is_denied(&self) -> bool {
        matches!(self, Self::Bucket(TierError::Denied { .. }))
    }
}

impl Teller {
    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut looked: Option<Instant> = None;
        let mut expiry: Option<Pace> = None;
        let mut lifetime = self.refresh.as_ref().map(|refresh| Pace::of(refresh.lifetime));
        let mut wait = FIRST;
        let mut turned_millis = self.now_millis();
        loop {
            let step = async {
                if self.learn().await {
                    lifetime = self.refresh.as_ref().map(|refresh| Pace::of(refresh.lifetime));
                }
                if looked.is_none_or(|at| at.elapsed() >= LOOK)
                    && let Some(found) = self.look().await
                {
                    looked = Some(Instant::now());
                    expiry = found;
                }
                let Some(pace) = both(expiry, lifetime) else {
                    sleep(match (looked, &self.unknown) {
                        (_, Some(_)) => LEARN,
                        (Some(_), None) => LOOK,
                        (None, None) => RETRY,
                    })
                    .await;
                    return;
                };
                wait = wait.min(pace.pause);
                sleep(spread(wait)).await;
                wait *= 2;
                // A clock that was set back far is no reason to tell nothing.
                if self.now_millis().abs_diff(turned_millis) >= pace.again.as_millis() as u64 {
                    turned_millis = self.now_millis();
                    self.tree.touched().turn();
                }
            };
            tokio::select! {
                () = step => {}
                _ = stop.changed() => break,
            }
            if both(expiry, lifetime).is_none() {
                continue;
            }
            tokio::select! {
                is_of_use = self.tell(expiry, false) => expiry = expiry.filter(|_| is_of_use),
                _ = stop.changed() => break,
            }
        }
        // What was being told when the stop came.
        if let Some(inos) = self.taken.take() {
            self.tree.touched().give_back(&inos);
        }
        let last = async {
            // It was too short a life to have heard.
            if self.tree.touched().is_waiting() && self.learn().await {
                lifetime = self.refresh.as_ref().map(|refresh| Pace::of(refresh.lifetime));
            }
            if looked.is_none() && self.tree.touched().is_waiting() {
                expiry = self.look().await.flatten();
            }
            if both(expiry, lifetime).is_some() {
                self.tell(expiry, true).await;
            }
        };
        if timeout(LAST_WITHIN, last).await.is_err() {
            tracing::info!("names that were used lately are not told: the store does not answer in time");
        }
    }

    fn now_millis(&self) -> u64 {
        self.bucket.clock().now_millis()
    }

    /// Asks how old blobs become, if that is not known; true when it is known now.
    async fn learn(&mut self) -> bool {
        if self.unknown.is_none() {
            return false;
        }
        let Ok(lifetime) = lifetime::read(self.bucket.as_ref()).await else {
            return false;
        };
        let voucher = self.unknown.take();
        locked(&self.status).lifetime = lifetime;
        self.refresh = lifetime
            .zip(voucher)
            .map(|(lifetime, voucher)| Refresh { lifetime, voucher });
        true
    }

    /// Whether and how names are told; `None` when nobody knows.
    async fn look(&self) -> Option<Option<Pace>> {
        match read_expiry(self.bucket.as_ref(), &self.volume).await {
            Ok(Some((expiry, _))) => {
                self.tree.touched().turn_on();
                let expire = Duration::from_millis(expiry.expire_millis);
                self.status().expire = Some(expire);
                Some(Some(Pace::of(expire)))
            }
            Ok(None) => {
                self.status().expire = None;
                self.turn_off();
                Some(None)
            }
            Err(err) => {
                self.failed(&err.into());
                None
            }
        }
    }

    /// Nobody wants to know names any more.
    fn turn_off(&self) {
        if self.refresh.is_none() && self.unknown.is_none() {
            self.tree.touched().turn_off();
        }
    }

    fn status(&self) -> MutexGuard<'_, TellStatus> {
        locked(&self.status)
    }

    fn failed(&self, err: &TellError) {
        let text = words(err);
        let mut status = self.status();
        if status.last_error.as_ref() != Some(&text) {
            tracing::warn!(error = text, volume = %self.volume, "which names are used here is not told; trying again");
        }
        status.last_error = Some(text);
    }

    /// Tells what was used since the last time; false when that is no use any more, for a while.
    async fn tell(&mut self, expiry: Option<Pace>, hasty: bool) -> bool {
        let fresh = self.tree.touched().take();
        if fresh.is_empty() {
            return true;
        }
        self.taken = Some(fresh.clone());
        let inos: Vec<Ino> = fresh.iter().collect();
        let mut result = self.try_tell(&inos, expiry, hasty).await;
        if matches!(&result, Err(err) if err.is_denied()) && !self.below_own && self.own.is_some() {
            self.below_own = true;
            result = self.try_tell(&inos, expiry, hasty).await;
        }
        self.taken = None;
        match result {
            Ok(()) => self.status().last_error = None,
            Err(err) => {
                self.failed(&err);
                if err.is_denied() {
                    self.turn_off();
                    return false;
                }
                self.tree.touched().give_back(&fresh);
            }
        }
        true
    }

    async fn try_tell(&self, inos: &[Ino], expiry: Option<Pace>, hasty: bool) -> Result<(), TellError> {
        if let Some(pace) = expiry {
            self.tell_names(inos, pace, hasty).await?;
        }
        if let Some(refresh) = &self.refresh {
            self.keep_young(refresh, inos, hasty).await?;
            self.status().kept_young_millis = Some(self.now_millis());
        }
        Ok(())
    }

    async fn tell_names(&self, inos: &[Ino], pace: Pace, hasty: bool) -> Result<(), TellError> {
        let mut marks = Vec::with_capacity(inos.len());
        for together in inos.chunks(TOGETHER) {
            let began = Instant::now();
            let (tree, layer, together) = (Arc::clone(&self.tree), self.layer, together.to_vec());
            marks.extend(blocking(move || tree.marks_of(&together, layer)).await?);
            if !hasty {
                sleep(began.elapsed() * REST_SHARE).await;
            }
        }
        let volume = match &self.own {
            Some(own) if self.below_own => own,
            _ => &self.volume,
        };
        for marks in marks.chunks(MAX_NAMES) {
            let now = self.now_millis();
            let random = u64::from_be_bytes(random_bytes());
            let key = layout::touched(volume.as_str(), now, self.machine, random);
            let told = Told::new(now, pace.good_for().as_millis() as u64, marks.to_vec());
            let names = told.marks().len();
            self.bucket.put_new(&key, Body::raw(told.encode())).await?;
            let mut status = self.status();
            status.told_millis = Some(told.written_millis);
            status.told_until_millis = Some(told.until_millis());
            drop(status);
            tracing::debug!(key, names, "told which names are used here");
        }
        Ok(())
    }

    /// Has every blob of what was used be younger than half its lifetime.
    async fn keep_young(&self, refresh: &Refresh, inos: &[Ino], hasty: bool) -> Result<(), TellError> {
        for together in inos.chunks(TOGETHER) {
            let began = Instant::now();
            let (tree, together) = (Arc::clone(&self.tree), together.to_vec());
            let blobs = blocking(move || tree.blobs_of(&together)).await?;
            let named = blobs.iter().filter_map(named).collect();
            // What is nowhere any more reads as "no such file" when it is wanted.
            let looked = blobs.len() as u64;
            let vouched = refresh.voucher.vouch(named).await?;
            self.status().kept_young_blobs += looked;
            tracing::debug!(?vouched, "looked at blobs that are used");
            if !hasty {
                sleep(began.elapsed() * REST_SHARE).await;
            }
        }
        Ok(())
    }
}

/// The one that is quicker.
fn both(one: Option<Pace>, other: Option<Pace>) -> Option<Pace> {
    one.into_iter().chain(other).min_by_key(|pace| pace.pause)
}

/// Up to a quarter less, so that machines that were started together do not all tell at once.
fn spread(wait: Duration) -> Duration {
    let [share] = random_bytes::<1>();
    wait.mul_f64(1.0 - f64::from(share) / 1024.0)
}
