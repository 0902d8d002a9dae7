//! Catalogs: checkpoints of a volume, so that a machine begins without reading its log.
//!
//! A catalog has the newest change of every path as of a *watermark*, sorted and cut into *parts*;
//! a *root* lists the parts, and `head.json` names the newest root. Parts and roots are named by
//! their digests and never change; only `head.json` is replaced, on condition, and that decides
//! which of two machines that compact at once made the catalog.
//!
//! ```text
//! segments ─ compact ─ delta (newest of each path, sorted) ─ fold ─ write ─ parts, root, head
//!          └ freeze  ─ the same, up to this moment ───────────────────────── parts, root (for a snapshot)
//!                                                             old parts ┘
//! head, root ─ attach (at a start) ─ tree: the root directory is unloaded
//! behind the mount ─ prefetch ─ fetch ─ all parts, on this disk
//! first touch of a directory ─ load ─ fetch ─ parts that cover it ─ tree: its registers are rows
//! ```
//!
//! `format` and [`head`] specify the bytes, [`order`] the order. [`compactor`] has a daemon compact by
//! itself. [`read::Items`] gives all registers of a catalog to whoever wants to see what it refers to.
//!
//! # Invariants
//!
//! - What a catalog says of a path is what the log said up to the watermark; a machine that loads it and
//!   then follows the log shows what one shows that read the log from its beginning.
//! - Bytes that are not those of their name are never used; a directory whose part is missing or
//!   damaged is an error, never an empty directory.
//! - Nothing of a catalog is imported before it is touched: opening costs three GETs (head, root, and what
//!   sweeps keep). What comes onto the disk behind the mount are objects as they are.
//! - A part is fetched once, whoever wants it first: where the whole catalog is kept, lookups add no request.
//!
//! # On paper
//!
//! How cost grows. `n` names, `c` changes since the last catalog, `m` machines that mount the volume.
//! Figures are estimates from the sizes of the formats and the shape of the code, but those measured on
//! 2 cores with an S3 server on loopback (`scripts/bench --only first-stat,find,find-memory`); the tests
//! hold 100,000 names to 14 GETs for all that a mount asks, one more for each part and the root where the catalog is fetched
//! whole, three more for a first look three directories deep where it is not, and 250 MB of memory.
//!
//! | measured | first `stat` | `find` of all | daemon's memory | parts | parts, bytes |
//! |---|---|---|---|---|---|
//! | 1,004,063 names | 0.08 s | 9.2 s | 174 MB | 359 | 67 MB |
//! | 10,040,625 names | 0.06 s | 261 s (an earlier version) | 170 MB | 3,606 | 667 MB |
//!
//! The reference job (`scripts/bench --only job-catalog-lookups,job-catalog-gets`) on a volume of 30,000 names, opened from a
//! catalog: 0 GETs for 5,000 lookups in 256 directories once the catalog is here; 547 in all, with those for mounting, for 45
//! parts and for 9,000 files read. Without a catalog 0 and 490, because all names were read with the log. A catalog of
//! 1,000,000 names is whole on the disk 0.5 s after the mount began, for 0.8 s of a CPU and 44 MB of memory.
//!
//! | | requests | bytes | memory | time |
//! |---|---|---|---|---|
//! | open | 3 GETs | head, root: 100 bytes for 2,500 names | the root, 150 bytes a part | flat |
//! | fetched behind the mount | `n` / 2,500 GETs, four at once; none if it is larger than `catalog-prefetch` | 60 to 90 bytes a name, on the disk | 4 parts, unpacked | a GET and 2 ms each |
//! | first look at a path | none; where the parts are not here, for each of its directories a GET for each 2,500 names in it | 100 to 300 KB each | 4 parts, unpacked | 50 ms each, and the GETs |
//! | `find` of all | none; `n` / 2,500 where the parts are not here | 60 to 90 bytes a name | flat: rows go to the index | `n` / 110,000 s, more as the index grows |
//! | compaction | one GET a segment; GET and PUT of parts in which something changed: at most `c`, at most all | the same parts | 24 MB of changes, then files | 0.1 s a part |
//! | deciding to compact | a GET and a LIST for each 2,000 segments or 64 MB seen, and again after the catalog, each machine and layer; the same for each promotion | | | |
//!
//! | names | parts | root | whole catalog | a machine that wants all of it |
//! |---|---|---|---|---|
//! | 1,000,000 | 359 | 40 KB | 67 MB | 9 s |
//! | 10,000,000 | 3,606 | 400 KB | 667 MB | 4.4 min |
//! | 100,000,000 | 36,000 | 4 MB | 6.7 GB | an hour, and 40 GB of index |
//!
//! With `m` machines, opening is `3 m` GETs of three objects, and as many of each part; of catalogs beyond the limit parts are
//! read by those who touch them. A fleet of 10,000 that starts at once on 250,000 names asks for a million GETs (40 cents),
//! spread over objects whose names are random, so no prefix of the bucket is hot but `head.json`'s: 10,000 GETs of one key
//! within a minute are within what S3 gives a prefix (5,500 a second). A machine of 10,000,000 names fetches 3,606 parts
//! (0.15 cents, 667 MB): where machines live for minutes, a limit below that is cheaper (`catalog-prefetch`).
//!
//! Where it stops:
//!
//! - *Random keys.* A cache's changes fall evenly on all parts. With more changes since the last catalog
//!   than there are parts, compacting rewrites the whole catalog: 67 MB for 1,000,000 names, 6.7 GB for
//!   100,000,000, each time. Up to 10,000,000 names that is minutes of one machine in an hour. Beyond, a
//!   catalog wants levels: small parts of what is new beside the large ones, merged when they are read.
//! - *One compactor.* Folding is one machine's work and memory-bound by nothing, but its time is
//!   that of reading and writing the parts one after another: at 100,000,000 names an hour.
//! - *Flat directories.* A directory is loaded whole when it is first looked into: one of 1,000,000 names takes as long as a
//!   `find` of all of them, 9 s. Caches spread their names over hundreds of directories.
//! - *Everything on one machine.* Loaded registers are rows of the index, 400 bytes each. A machine that
//!   touches all of 100,000,000 names needs 40 GB for them. What comes after is answering from
//!   the parts themselves, kept on the disk, with rows only of what was changed here.
//! - *Hard links.* All registers with link ids are loaded with the first directory.
//!
//! What comes after, beside: parts passed on by peers, so that a zone reads each of them once.

pub mod attach;
pub mod compact;
pub mod compactor;
pub mod delta;
pub mod error;
mod fetch;
pub mod fold;
pub mod format;
pub mod freeze;
pub mod head;
pub mod load;
pub mod order;
pub mod prefetch;
pub mod read;
pub mod write;

pub use error::CatalogError;
pub use load::{CatalogStatus, LoadError, Loader};
