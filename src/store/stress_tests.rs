//! Everything at once: readers, writers, eviction and sealing on a few blobs, by seeded threads.

use std::{os::unix::fs::FileExt, sync::Arc};

use super::{
    blobs::FileId,
    fetch::{Fetcher, ReadCursor},
    rows::{Durability, Ino, Residency},
    testing::{READ_TIMEOUT, Rig, noise},
};
use crate::base::{chunk::Sliced, digest::Digest};

const ACTORS: u64 = 4;
const STEPS: u64 = 120;
const SIZES: [usize; 6] = [1, 4000, 300_000, 3 << 20, 5 << 20, 9 << 20];

struct Actor {
    rig: Arc<Rig>,
    fetcher: Arc<Fetcher>,
    contents: Arc<Vec<(Vec<u8>, Sliced)>>,
    number: u64,
    state: u64,
}

impl Actor {
    fn draw(&mut self, below: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % below
    }

    async fn step(&mut self, step: u64) {
        let contents = Arc::clone(&self.contents);
        let (bytes, sliced) = &contents[self.draw(SIZES.len() as u64) as usize];
        match self.draw(10) {
            0..=4 => self.read(bytes, sliced).await,
            5 => drop(self.rig.seal(bytes)),
            6 => {
                self.rig.blobs.set_durable(&sliced.digest, u64::MAX / 2).unwrap();
            }
            7 => {
                self.rig.blobs.evict(&sliced.digest).unwrap();
            }
            8 => self.overwrite(bytes, sliced, false, step).await,
            _ => self.overwrite(bytes, sliced, true, step).await,
        }
    }

    async fn read(&mut self, bytes: &[u8], sliced: &Sliced) {
        let blob = self.rig.open(sliced);
        let offset = self.draw(bytes.len() as u64) as usize;
        let len = (self.draw(700_000) as usize + 1).min(bytes.len() - offset);
        let read = self
            .fetcher
            .read(&blob, &ReadCursor::default(), offset as u64, len)
            .await
            .unwrap();
        assert!(read == bytes[offset..offset + len], "wrong bytes at {offset}");
    }

    /// Opens the blob for writing, as an inode of its own, and writes over all of it.
    async fn overwrite(&mut self, bytes: &[u8], sliced: &Sliced, passthrough: bool, step: u64) {
        let blob = self.rig.open(sliced);
        self.fetcher.ensure_whole(&blob).await.unwrap();
        let lent = if passthrough {
            blob.lend(Ino(self.number * STEPS + step)).unwrap()
        } else {
            None
        };
        let lent = lent.map(|file| FileId::of(&file).unwrap());
        // Another one may have taken the file since.
        let Ok(taken) = self.rig.blobs.take_over(&blob, lent) else {
            return;
        };
        self.rig.ledger.commit(taken.changes.clone()).unwrap();
        let id = taken.id;
        let file = self.rig.blobs.finish_take_over(taken);
        let mut copied = vec![0; bytes.len()];
        file.read_exact_at(&mut copied, 0).unwrap();
        assert!(copied == bytes, "the writer got wrong bytes");
        file.write_all_at(&vec![self.number as u8; bytes.len()], 0)
            .unwrap();
        tokio::task::yield_now().await;
        file.read_exact_at(&mut copied, 0).unwrap();
        assert!(
            copied == vec![self.number as u8; bytes.len()],
            "somebody else wrote to it"
        );
        self.rig.staging.remove(id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_get_the_right_bytes_whatever_else_happens_to_a_blob() {
    let rig = Arc::new(Rig::new());
    let fetcher = Arc::new(rig.fetcher_with(READ_TIMEOUT * 20, rig.reclaimer(u64::MAX)));
    let contents: Vec<_> = SIZES
        .iter()
        .map(|&len| {
            let bytes = noise(len, len as u64);
            let sliced = rig.publish(&bytes);
            (bytes, sliced)
        })
        .collect();
    let contents = Arc::new(contents);
    let actors: Vec<_> = (1..=ACTORS)
        .map(|number| {
            let mut actor = Actor {
                rig: Arc::clone(&rig),
                fetcher: Arc::clone(&fetcher),
                contents: Arc::clone(&contents),
                number,
                state: number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            };
            tokio::spawn(async move {
                for step in 0..STEPS {
                    actor.step(step).await;
                }
            })
        })
        .collect();
    for actor in actors {
        actor.await.unwrap();
    }
    for (bytes, sliced) in contents.iter() {
        let row = rig.row(sliced);
        if let Some(row) = row.filter(|row| row.residency == Residency::Whole) {
            assert_ne!(row.durability, Durability::Quarantined);
            let on_disk = std::fs::read(rig.path(&sliced.digest)).unwrap();
            assert_eq!(Digest::of(&on_disk), sliced.digest, "of {} bytes", bytes.len());
        }
        let blob = rig.open(sliced);
        let read = fetcher
            .read(&blob, &ReadCursor::default(), 0, bytes.len())
            .await
            .unwrap();
        assert!(read == *bytes);
    }
}
