//! Makes a volume of many names quickly: a catalog without a log, as a compaction would leave it.
//!
//! The files name blobs that are nowhere: they are there to be listed and looked up, not to be read.

use casmount::{
    base::{clock::Stamp, digest::Digest, id::MachineId},
    namespace::{
        catalog::{
            compact::{Checkpoint, Old},
            delta::Delta,
            write,
        },
        change::{Entry, EntryBlob, EntryChunks, PathChange},
    },
    store::{pack::PackPlace, rows::NodeKind},
    tier::{
        SharedBucket,
        probe::{self, IfAbsent},
    },
};

/// How many names, and how they lie.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Files; directories come on top.
    pub names: u64,
    /// Files of a directory.
    pub per_dir: u64,
    /// Directories of a directory.
    pub fan_out: u64,
}

/// Makes the volume, with `more` beside what its shape says; says how large it became.
pub async fn make(
    bucket: &SharedBucket,
    volume: &str,
    shape: Shape,
    more: Vec<(String, Entry)>,
) -> Result<String, Box<dyn std::error::Error>> {
    probe::open_store(bucket.as_ref(), IfAbsent::Create).await?;
    let old = Old::read(bucket, volume).await?;
    let now = bucket.clock().now_millis();
    let mut delta = Delta::new(std::env::temp_dir());
    let mut stamp = Stamp {
        millis: now - 3_600_000,
        counter: 0,
        machine: MachineId(1),
    };
    let mut insert = |path: String, entry| {
        stamp.counter += 1;
        delta.insert(PathChange {
            path: path.into_bytes(),
            stamp,
            entry: Some(entry),
        })
    };
    for (path, entry) in more {
        insert(path, entry)?;
    }
    let mtime = (now - 3_600_000) as i64 * 1_000_000;
    let leaves = shape.names.div_ceil(shape.per_dir.max(1));
    for leaf in 0..leaves {
        let (top, below) = (leaf / shape.fan_out, leaf % shape.fan_out);
        if below == 0 {
            insert(format!("top-{top:05}"), entry(NodeKind::Dir, None, mtime))?;
        }
        let dir = format!("top-{top:05}/dir-{below:05}");
        insert(dir.clone(), entry(NodeKind::Dir, None, mtime))?;
        let first = leaf * shape.per_dir;
        for number in first..(first + shape.per_dir).min(shape.names) {
            let digest = Digest::of(&number.to_le_bytes());
            let name = &digest.to_string()[..32];
            let place = PackPlace {
                pack: Digest::of(&(number / 200).to_be_bytes()),
                offset: (number % 200 * 16_000) as u32,
                stored_len: 9_000,
                zstd: true,
            };
            let blob = EntryBlob {
                digest,
                size: 20_000,
                chunks: EntryChunks::Single,
                places: vec![Some(place)],
            };
            insert(
                format!("{dir}/{name}.o"),
                entry(NodeKind::File, Some(blob), mtime),
            )?;
        }
    }
    let checkpoint = Checkpoint {
        watermark_millis: now - 300_000,
        machine: MachineId(1),
        keeps_tombstones: false,
        part_bytes: write::PART_BYTES,
    };
    match checkpoint.write(bucket, volume, old, delta).await? {
        Some((head, sent)) => Ok(format!(
            "{} names in {} parts, {} bytes",
            head.names, head.parts, sent.bytes
        )),
        None => Err("another machine was first".into()),
    }
}

fn entry(kind: NodeKind, blob: Option<EntryBlob>, mtime: i64) -> Entry {
    Entry {
        mtime,
        blob,
        ..Entry::new(kind, if kind == NodeKind::Dir { 0o755 } else { 0o644 })
    }
}
