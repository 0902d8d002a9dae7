//! What was told of the uses of a volume: reading it, and keeping it small.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use tokio::task::JoinSet;

use super::ExpireError;
use crate::{
    base::{
        id::{MachineId, random_bytes},
        volume::VolumeName,
    },
    namespace::{
        patience::patiently,
        sweep::marks::Marks,
        touch::format::{MAX_BYTES, MAX_GOOD_FOR_MILLIS, MAX_NAMES, Told},
    },
    tier::{Body, DELETE_BATCH, SharedBucket, TierError, layout},
};

/// Objects that are read at once.
const PARALLEL: usize = 16;

/// How often bytes that come damaged are fetched before they count as damaged in the bucket.
const FETCHES: u32 = 4;

const DAY_MILLIS: u64 = 24 * 3_600_000;

/// What tells of uses of a volume, by its keys.
#[derive(Debug, Default)]
pub struct Found {
    /// With when each was told, in the order of that.
    pub keys: Vec<(String, u64)>,
}

/// Lists what was told in `volume` at `from_millis` and later; everything there must be understood.
pub async fn list(
    bucket: &SharedBucket,
    volume: &VolumeName,
    from_millis: u64,
) -> Result<Found, ExpireError> {
    let name = volume.as_str();
    let prefix = layout::touched_prefix(name);
    let mut after = layout::touched(name, from_millis, MachineId(0), 0);
    let mut found = Found::default();
    loop {
        let page = patiently(|| bucket.list(&prefix, Some(&after))).await?;
        for object in &page.objects {
            match layout::touched_millis(name, &object.key) {
                Some(millis) => found.keys.push((object.key.clone(), millis)),
                None if object.key == layout::expiry(name) => {}
                None => {
                    return Err(ExpireError::Touched {
                        volume: volume.clone(),
                        key: object.key.clone(),
                        why: "nothing is known of such an object".to_owned(),
                    });
                }
            }
        }
        match page.objects.last() {
            Some(last) if page.more && last.key > after => last.key.clone_into(&mut after),
            _ => return Ok(found),
        }
    }
}

/// Reads what was told, and hands it over, in no order; false when some of it is gone by now. What cannot be read ends
/// it, but of a volume whose writers are not trusted (`is_apart`): they must not be able to stop an expiry.
pub async fn read(
    bucket: &SharedBucket,
    volume: &VolumeName,
    keys: impl IntoIterator<Item = String>,
    is_apart: bool,
    mut take: impl FnMut(Told),
) -> Result<bool, ExpireError> {
    let mut keys = keys.into_iter();
    let mut is_whole = true;
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < PARALLEL
            && let Some(key) = keys.next()
        {
            let bucket = Arc::clone(bucket);
            under_way.spawn(async move { (fetch(&bucket, &key).await, key) });
        }
        let Some(done) = under_way.join_next().await else {
            return Ok(is_whole);
        };
        let (fetched, key) = match done {
            Ok(done) => done,
            Err(err) if err.is_panic() => std::panic::resume_unwind(err.into_panic()),
            Err(_shutdown) => std::future::pending().await,
        };
        match fetched {
            Ok(Some(told)) => take(told),
            Ok(None) => is_whole = false,
            Err(err @ (TierError::Malformed { .. } | TierError::Unsupported { .. })) if is_apart => {
                tracing::warn!(key, error = %err, "it counts for nothing, because its writers are not trusted");
            }
            Err(TierError::Malformed { why, .. } | TierError::Unsupported { why }) => {
                return Err(ExpireError::Touched {
                    volume: volume.clone(),
                    key,
                    why,
                });
            }
            Err(err) => return Err(err.into()),
        }
    }
}

/// Another expiry has put together with others what one volume told.
pub fn raced(volume: &VolumeName) -> ExpireError {
    ExpireError::Raced {
        volume: volume.clone(),
    }
}

async fn fetch(bucket: &SharedBucket, key: &str) -> Result<Option<Told>, TierError> {
    let once = async || -> Result<Option<Told>, TierError> {
        let found = patiently(|| bucket.get(key, None, MAX_BYTES)).await?;
        found.map(|object| Told::decode(key, &object.bytes)).transpose()
    };
    let mut fetched = once().await;
    for _ in 1..FETCHES {
        if !matches!(fetched, Err(TierError::Malformed { .. })) {
            break;
        }
        fetched = once().await;
    }
    fetched
}

/// What may have been used after `from_millis`, gathered.
#[derive(Debug)]
pub struct Used {
    from_millis: u64,
    pub marks: Marks,
    pub objects: u64,
}

impl Used {
    pub fn after(from_millis: u64) -> Self {
        Self {
            from_millis,
            marks: Marks::default(),
            objects: 0,
        }
    }

    /// The earliest telling that can matter.
    pub fn first_millis(&self) -> u64 {
        self.from_millis.saturating_sub(MAX_GOOD_FOR_MILLIS)
    }

    pub fn take(&mut self, told: &Told) {
        self.objects += 1;
        if told.until_millis() > self.from_millis {
            told.marks().iter().for_each(|mark| self.marks.add(*mark));
        }
    }
}

/// Which days are put together: those before yesterday, so that what was told late in a day is there, with several
/// objects.
fn crowded(found: &Found, now_millis: u64) -> Vec<Vec<String>> {
    let mut days: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (key, millis) in &found.keys {
        days.entry(millis / DAY_MILLIS).or_default().push(key.clone());
    }
    let yesterday = (now_millis / DAY_MILLIS).saturating_sub(1);
    let crowded = days
        .into_iter()
        .filter(|(day, keys)| *day < yesterday && keys.len() > 1);
    crowded.map(|(_, keys)| keys).collect()
}

/// Puts what was told in a day into one object each. A crash leaves some of it twice, which changes nothing.
pub async fn put_together(
    bucket: &SharedBucket,
    volume: &VolumeName,
    found: &Found,
    now_millis: u64,
) -> Result<(), ExpireError> {
    for keys in crowded(found, now_millis) {
        let mut marks: HashSet<u64> = HashSet::new();
        let (mut written, mut good_for) = (0, 0);
        let is_whole = read(bucket, volume, keys.clone(), false, |told| {
            written = written.max(told.written_millis);
            good_for = good_for.max(told.good_for_millis);
            marks.extend(told.marks());
        })
        .await?;
        if !is_whole {
            return Err(raced(volume));
        }
        // More than one object can have: they stay as they are.
        if marks.len() > MAX_NAMES {
            continue;
        }
        let whole = Told::new(written, good_for, marks.into_iter().collect());
        let random = u64::from_be_bytes(random_bytes());
        // Under the day in its key it is found again.
        let key = layout::touched(volume.as_str(), written, MachineId::random(), random);
        let body = Body::raw(whole.encode());
        patiently(|| bucket.put_new(&key, body.clone())).await?;
        remove(bucket, &keys).await?;
    }
    Ok(())
}

/// Removes objects.
pub async fn remove(bucket: &SharedBucket, keys: &[String]) -> Result<(), TierError> {
    for batch in keys.chunks(DELETE_BATCH) {
        patiently(|| bucket.delete_many(batch)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_that_are_over_are_put_together() {
        let at = |hours: u64| (format!("k{hours}"), hours * 3_600_000);
        let found = Found {
            keys: [1, 2, 30, 49, 50, 51, 80].map(at).to_vec(),
        };
        let days = |now_hours: u64| crowded(&found, now_hours * 3_600_000);
        assert_eq!(days(24), [[0_u8; 0]; 0].map(|_| Vec::<String>::new()));
        assert_eq!(days(48), [["k1", "k2"].map(str::to_owned).to_vec()]);
        assert_eq!(days(96).len(), 2);
        assert_eq!(days(96)[1], ["k49", "k50", "k51"].map(str::to_owned));
    }

    #[test]
    fn only_what_may_have_been_used_since_counts() {
        let mut used = Used::after(1000);
        used.take(&Told::new(900, 101, vec![1]));
        used.take(&Told::new(900, 100, vec![2]));
        used.take(&Told::new(2000, 0, vec![3]));
        used.marks.sort();
        assert_eq!([1, 2, 3].map(|mark| used.marks.has(mark)), [true, false, true]);
        assert_eq!(used.objects, 3);
    }
}
