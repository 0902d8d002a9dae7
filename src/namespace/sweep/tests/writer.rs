//! A machine that writes names of small blobs: what the uploader, the voucher and the publisher do, one request at a
//! time, so that it can sleep between any two.

use std::{collections::BTreeMap, sync::Arc};

use super::world::{Door, VOLUME, World, is_in_time, object_of};
use crate::{
    base::{
        chunk::Chunk,
        clock::{Hlc, Stamp},
        digest::Digest,
        id::{MachineId, random_bytes},
    },
    namespace::{
        change::{Entry, EntryBlob, EntryChunks, PathChange},
        segment::{self, Head},
    },
    store::{pack, rows::NodeKind},
    tier::{Body, SharedBucket, layout},
    upload::condemned::{Condemned, Known},
};

/// Where the bucket has a content, and when it was last seen there.
#[derive(Clone, Copy, Debug)]
struct Place {
    pack: Option<pack::PackPlace>,
    confirmed: u64,
}

pub struct Writer {
    id: MachineId,
    world: Arc<World>,
    door: SharedBucket,
    condemned: Condemned,
    hlc: Hlc,
    seq: u64,
    /// Contents that the bucket is believed to have.
    places: BTreeMap<u8, Place>,
    /// Names that are not published, with their contents.
    pending: BTreeMap<u8, (Stamp, Option<u8>)>,
    /// Looked at: may be sent, and acknowledged before that time.
    looked: Option<(Vec<PathChange>, u64)>,
    /// Sent, and not looked at since.
    sent: Option<Sent>,
}

/// A segment on its way.
struct Sent {
    changes: Vec<PathChange>,
    until: u64,
    /// The time in its key.
    millis: u64,
    /// Where it is to be written, when it has not landed yet.
    flying: Option<(String, Body)>,
}

fn bytes_of(content: u8) -> [u8; 4] {
    [content; 4]
}

fn digest_of(content: u8) -> Digest {
    Digest::of(&bytes_of(content))
}

impl Writer {
    pub fn new(id: u64, world: &Arc<World>) -> Self {
        Self::through(id, world, Arc::new(Door::open(world)))
    }

    /// One that sees the bucket as `door` shows it.
    pub fn through(id: u64, world: &Arc<World>, door: SharedBucket) -> Self {
        Self {
            id: MachineId(id),
            world: Arc::clone(world),
            condemned: Condemned::new(Arc::clone(&door), world.clock()),
            door,
            hlc: Hlc::new(MachineId(id), Stamp::ZERO),
            seq: 0,
            places: BTreeMap::new(),
            pending: BTreeMap::new(),
            looked: None,
            sent: None,
        }
    }

    pub fn write(&mut self, path: u8, content: u8) {
        let stamp = self.hlc.now(self.world.now());
        self.pending.insert(path, (stamp, Some(content)));
    }

    pub fn delete(&mut self, path: u8) {
        let stamp = self.hlc.now(self.world.now());
        self.pending.insert(path, (stamp, None));
    }

    /// The daemon dies, and comes back with what its disk has.
    pub fn restart(&mut self) {
        self.looked = None;
        self.sent = None;
        self.condemned = Condemned::new(Arc::clone(&self.door), self.world.clock());
    }

    /// Uploads every content that a name waits for and that the bucket is not believed to have.
    pub async fn upload(&mut self) {
        let contents: Vec<u8> = self
            .pending
            .values()
            .filter_map(|(_, content)| *content)
            .collect();
        for content in contents {
            let Ok(known) = self.condemned.known().await else {
                return;
            };
            let now = self.world.now();
            let believed = self.places.get(&content).is_some_and(|place| {
                !known.is_condemned(&object(content, place)) && known.is_fresh(place.confirmed, now)
            });
            if !believed {
                self.send_content(content, &known).await;
            }
        }
    }

    async fn send_content(&mut self, content: u8, known: &Known) {
        let confirmed = self.world.now();
        let digest = digest_of(content);
        if !known.is_condemned(&digest) {
            let body = Body::raw(bytes_of(content).to_vec());
            self.door.put_new(&layout::blob(&digest), body).await.unwrap();
            self.places.insert(
                content,
                Place {
                    pack: None,
                    confirmed,
                },
            );
            return;
        }
        let salt = random_bytes::<16>();
        let chunk = |digest, len: usize| Chunk {
            digest,
            len: len as u32,
        };
        let mut builder = pack::Builder::new(2, 20);
        builder.add(chunk(digest, 4), &bytes_of(content), false);
        builder.add(chunk(Digest::of(&salt), 16), &salt, false);
        let made = builder.finish();
        let body = Body::raw(made.object);
        self.door.put_new(&layout::pack(&made.name), body).await.unwrap();
        let place = Place {
            pack: Some(made.members[0].1),
            confirmed,
        };
        self.places.insert(content, place);
    }

    /// Looks whether everything that waits may be published.
    pub async fn look(&mut self) {
        self.looked = None;
        let Ok(known) = self.condemned.known().await else {
            return;
        };
        let mut until = u64::MAX;
        let mut changes = Vec::new();
        for (path, (stamp, content)) in self.pending.clone() {
            let entry = match content {
                None => None,
                Some(content) => {
                    let Some(confirmed) = self.confirm(content, &known).await else {
                        return;
                    };
                    until = until.min(known.good_until(confirmed));
                    Some(entry(content, self.places[&content].pack))
                }
            };
            changes.push(PathChange {
                path: vec![b'a' + path],
                stamp,
                entry,
            });
        }
        if !changes.is_empty() && until > self.world.now() {
            self.looked = Some((changes, until));
        }
    }

    /// When the bucket was last seen to have a content; `None`: it is to be uploaded.
    async fn confirm(&mut self, content: u8, known: &Known) -> Option<u64> {
        let mut place = *self.places.get(&content)?;
        if known.is_condemned(&object(content, &place)) {
            return None;
        }
        let asked = self.world.now();
        if !known.is_fresh(place.confirmed, asked) {
            let Entry { blob, .. } = entry(content, place.pack);
            let key = object_of(&blob.expect("a file"));
            if self.door.head(&key).await.unwrap().is_none() {
                self.places.remove(&content);
                return None;
            }
            place.confirmed = asked;
            self.places.insert(content, place);
        }
        Some(place.confirmed)
    }

    /// Writes the segment; a `slow` one lands when it is acknowledged, if the writer lives until then.
    pub async fn send(&mut self, slow: bool) {
        let Some((changes, until)) = self.looked.take() else {
            return;
        };
        self.seq += 1;
        let millis = self.world.now();
        let head = Head {
            machine: self.id,
            seq: self.seq,
            published_millis: millis,
            previous: None,
        };
        let encode = |change| segment::encode_change(change, self.id).unwrap();
        let encoded: Vec<_> = changes.iter().map(encode).collect();
        let key = layout::segment(VOLUME, millis, self.id, self.seq);
        let body = Body::raw(segment::encode(&head, &encoded));
        let flying = if slow {
            Some((key, body))
        } else {
            self.door.put_new(&key, body).await.unwrap();
            None
        };
        self.sent = Some(Sent {
            changes,
            until,
            millis,
            flying,
        });
    }

    /// Takes in the acknowledgement, which may have come long ago.
    pub async fn acknowledge(&mut self) {
        let Some(sent) = self.sent.take() else {
            return;
        };
        if let Some((key, body)) = sent.flying {
            self.door.put_new(&key, body).await.unwrap();
        }
        if self.world.now() >= sent.until || !is_in_time(&self.world, sent.millis) {
            return;
        }
        for change in sent.changes {
            self.world.acknowledge(sent.millis, &change);
            let path = change.path[0] - b'a';
            if self
                .pending
                .get(&path)
                .is_some_and(|(stamp, _)| *stamp == change.stamp)
            {
                self.pending.remove(&path);
            }
        }
    }

    /// Publishes all that waits, without a break.
    pub async fn finish(&mut self) {
        for _ in 0..4 {
            if self.pending.is_empty() {
                return;
            }
            self.upload().await;
            self.look().await;
            self.send(false).await;
            self.acknowledge().await;
        }
        assert!(self.pending.is_empty(), "{:?} waits for ever", self.pending);
    }
}

fn object(content: u8, place: &Place) -> Digest {
    place.pack.map_or(digest_of(content), |place| place.pack)
}

fn entry(content: u8, pack: Option<pack::PackPlace>) -> Entry {
    Entry {
        blob: Some(EntryBlob {
            digest: digest_of(content),
            size: 4,
            chunks: EntryChunks::Single,
            places: pack.map(|place| vec![Some(place)]).unwrap_or_default(),
        }),
        ..Entry::new(NodeKind::File, 0o644)
    }
}
