//! Tests of blob files: sealing, taking over, lending, evicting, recovering.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, MetadataExt},
    process::{Command, Stdio},
    sync::Arc,
};

use super::{
    blobs::{Blob, FileId},
    ingest::{Quiet, is_quiet},
    rows::{BlobRow, Change, Durability, Ino, Residency},
    testing::{Rig, noise},
};
use crate::base::digest::Digest;

const LARGE: usize = 9 << 20;

fn inode(path: &std::path::Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn read_all(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_sealed_file_is_a_whole_dirty_blob_without_being_copied() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 1);
    let (id, sliced) = rig.stage(&bytes);
    let staged = inode(&rig.staging.path(id));
    let changes = rig.blobs.seal(id, &sliced).unwrap();
    rig.ledger.commit(changes).unwrap();
    rig.staging.remove_after_barrier(id);
    assert_eq!(rig.staged(), 1, "the name stays until the rows are on the disk");
    rig.ledger.barrier().unwrap();
    assert_eq!(rig.staged(), 0);
    assert_eq!(inode(&rig.path(&sliced.digest)), staged);
    let blob = rig.open(&sliced);
    assert!(blob.is_whole());
    assert_eq!(blob.read(5, 3 << 20).unwrap(), bytes[5..5 + (3 << 20)]);
    assert_eq!(blob.read(LARGE as u64 - 7, 100).unwrap(), bytes[LARGE - 7..]);
    assert_eq!(rig.durability(&sliced), Some(Durability::Dirty));
    assert_eq!(rig.ledger.totals().dirty_bytes, LARGE as u64);
}

#[test]
fn content_that_exists_is_not_stored_twice() {
    let rig = Rig::new();
    let first = rig.seal_clean(b"the same");
    let before = inode(&rig.path(&first.digest));
    let second = rig.seal(b"the same");
    assert_eq!(inode(&rig.path(&second.digest)), before);
    let durability = rig.durability(&first);
    assert!(
        matches!(durability, Some(Durability::Durable { .. })),
        "it need not be uploaded again"
    );
}

#[test]
fn an_empty_file_has_no_blob() {
    let rig = Rig::new();
    let sliced = rig.seal(b"");
    assert_eq!(rig.row(&sliced), None);
    assert!(!rig.path(&Digest::EMPTY).exists());
    let blob = rig.open(&sliced);
    assert!(blob.is_whole() && blob.read(0, 10).unwrap().is_empty() && !lends(&blob, Ino(7)));
    let taken = rig.blobs.take_over(&blob, None).unwrap();
    assert!(read_all(&taken.file).is_empty());
}

#[test]
fn a_kill_between_link_and_commit_leaves_an_orphan_that_the_next_seal_replaces() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 2);
    let (id, sliced) = rig.stage(&bytes);
    drop(rig.blobs.seal(id, &sliced).unwrap());
    let path = rig.path(&sliced.digest);
    let orphan = inode(&path);
    // A program that kept the file open goes on writing to it after the kill.
    let rogue = File::options().write(true).open(rig.staging.path(id)).unwrap();
    let rig = rig.killed();
    rogue.write_all_at(b"damage", 100).unwrap();
    assert_eq!(rig.staged(), 0, "no row refers to it");
    let again = rig.seal(&bytes);
    assert_ne!(inode(&path), orphan);
    assert_eq!(rig.open(&again).read(0, LARGE).unwrap(), bytes);
}

#[test]
fn a_staging_file_that_a_row_refers_to_survives_a_kill() {
    let rig = Rig::new();
    let (kept, _) = rig.stage(b"kept");
    let (lost, _) = rig.stage(b"lost");
    rig.ledger.commit(vec![Change::PutNode(node_with(kept))]).unwrap();
    let rig = rig.killed();
    assert!(rig.staging.open(kept, false).is_ok());
    assert!(rig.staging.open(lost, false).is_err());
    let (next, _) = rig.staging.create().unwrap();
    assert!(next > lost, "numbers are never used again");
}

fn node_with(id: super::rows::StagingId) -> super::rows::NodeRow {
    super::rows::NodeRow {
        ino: Ino(9),
        kind: super::rows::NodeKind::File,
        perm: 0o644,
        uid: 0,
        gid: 0,
        rdev: 0,
        size: 4,
        atime: 0,
        mtime: 0,
        ctime: 0,
        nlink: 1,
        content: super::rows::Content::Staging(id),
        target: Vec::new(),
        xattrs: Vec::new(),
        dir: None,
        link_id: None,
        places: Vec::new(),
    }
}

#[test]
fn orphans_are_removed_and_what_rows_vouch_for_stays() {
    let rig = Rig::new();
    let kept = rig.seal(b"kept");
    let (id, sealing) = rig.stage(b"being sealed");
    let changes = rig.blobs.seal(id, &sealing).unwrap();
    let orphan = Digest::of(b"orphan");
    fs::write(rig.path(&orphan), b"orphan").unwrap();
    fs::write(rig.path(&orphan).with_extension("77"), b"half a replacement").unwrap();
    assert_eq!(rig.blobs.remove_orphans().unwrap(), 2);
    assert!(!rig.path(&orphan).exists());
    assert!(rig.path(&kept.digest).exists());
    rig.ledger.commit(changes).unwrap();
    assert_eq!(rig.open(&sealing).read(0, 99).unwrap(), b"being sealed");
}

#[test]
fn sealing_again_under_another_name_forgets_the_first() {
    let rig = Rig::new();
    let (id, first) = rig.stage(b"first");
    drop(rig.blobs.seal(id, &first).unwrap());
    fs::write(rig.staging.path(id), b"then changed").unwrap();
    let second = crate::base::chunk::slice(&b"then changed"[..]).unwrap();
    let changes = rig.blobs.seal(id, &second).unwrap();
    assert!(!rig.path(&first.digest).exists());
    assert!(!rig.open(&first).is_whole());
    rig.ledger.commit(changes).unwrap();
    assert_eq!(rig.open(&second).read(0, 99).unwrap(), b"then changed");
}

#[test]
fn nothing_evicts_a_blob_whose_row_is_about_to_be_committed() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(b"twice");
    let (id, again) = rig.stage(b"twice");
    let changes = rig.blobs.seal(id, &again).unwrap();
    assert_eq!(rig.blobs.evict(&sliced.digest).unwrap(), None);
    rig.ledger.commit(changes).unwrap();
    rig.staging.remove_after_barrier(id);
    assert_eq!(rig.blobs.evict(&sliced.digest).unwrap(), Some(5));
}

#[test]
fn evicting_spares_dirty_pinned_quarantined_and_open_blobs() {
    let rig = Rig::new();
    let dirty = rig.seal(b"dirty");
    assert_eq!(rig.blobs.evict(&dirty.digest).unwrap(), None);

    let pinned = rig.seal_clean(b"pinned");
    let row = rig.row(&pinned).unwrap();
    rig.ledger
        .commit(vec![Change::PutBlob(BlobRow { pinned: true, ..row })])
        .unwrap();
    assert_eq!(rig.blobs.evict(&pinned.digest).unwrap(), None);

    let clean = rig.seal_clean(b"clean");
    let blob = rig.open(&clean);
    assert_eq!(rig.blobs.evict(&clean.digest).unwrap(), None);
    assert_eq!(blob.read(0, 5).unwrap(), b"clean");
    drop(blob);
    assert_eq!(rig.blobs.evict(&clean.digest).unwrap(), Some(5));
    assert!(!rig.path(&clean.digest).exists());
    assert_eq!(rig.residency(&clean), Residency::Nothing);
    assert_eq!(
        rig.blobs.evict(&clean.digest).unwrap(),
        None,
        "it is gone already"
    );
    assert_eq!(rig.open(&dirty).read(0, 5).unwrap(), b"dirty");
}

#[test]
fn a_program_that_has_an_evicted_file_mapped_keeps_its_bytes() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(b"still here");
    let lent = rig.open(&sliced).file().unwrap();
    rig.blobs.evict(&sliced.digest).unwrap().unwrap();
    assert_eq!(read_all(&lent), b"still here");
    rig.seal(b"still here");
    assert_eq!(read_all(&lent), b"still here");
}

fn lends(blob: &Blob, ino: Ino) -> bool {
    blob.lend(ino).unwrap().is_some()
}

fn id_of(blob: &Blob) -> FileId {
    FileId::of(&blob.file().unwrap()).unwrap()
}

#[test]
fn a_file_is_lent_to_one_inode_at_a_time() {
    let rig = Rig::new();
    let sliced = rig.seal(b"shared");
    let (a, b) = (rig.open(&sliced), rig.open(&sliced));
    assert!(lends(&a, Ino(1)) && lends(&a, Ino(1)) && lends(&b, Ino(1)));
    assert!(!lends(&b, Ino(2)));
    a.give_back(Ino(1));
    a.give_back(Ino(1));
    a.give_back(Ino(1));
    assert!(!lends(&b, Ino(2)), "the loan of the other handle goes on");
    b.give_back(Ino(1));
    assert!(lends(&b, Ino(2)));
    drop(b);
    assert!(lends(&a, Ino(3)), "a loan ends with its lease");
}

#[test]
fn a_file_that_someone_still_has_open_is_not_lent_to_another_inode() {
    let rig = Rig::new();
    let sliced = rig.seal(b"mapped");
    let blob = rig.open(&sliced);
    assert!(lends(&blob, Ino(1)));
    let backing = blob.file().unwrap();
    blob.give_back(Ino(1));
    assert!(!lends(&blob, Ino(2)), "a mapping outlives the loan");
    assert!(lends(&blob, Ino(1)), "its own inode may have it");
    blob.give_back(Ino(1));
    drop(blob);
    let blob = rig.open(&sliced);
    assert!(!lends(&blob, Ino(2)), "nor does closing the blob forget it");
    drop(backing);
    assert!(lends(&blob, Ino(2)));
}

#[test]
fn a_copy_taken_over_leaves_the_blob_alone() {
    let rig = Rig::new();
    for (clean, lent, len) in [(true, false, 4096), (false, false, LARGE), (true, true, LARGE)] {
        let bytes = noise(len, len as u64 + u64::from(lent));
        let sliced = if clean {
            rig.seal_clean(&bytes)
        } else {
            rig.seal(&bytes)
        };
        let other = rig.open(&sliced);
        assert!(!lent || lends(&other, Ino(1)));
        let reader = other.file().unwrap();
        let taken = rig.blobs.take_over(&rig.open(&sliced), None).unwrap();
        taken.file.write_all_at(b"written", 0).unwrap();
        rig.blobs.finish_take_over(taken);
        assert_eq!(read_all(&reader), bytes);
        assert_eq!(other.read(0, len).unwrap(), bytes);
        assert_eq!(rig.residency(&sliced), Residency::Whole);
    }
}

#[test]
fn a_large_clean_blob_that_nobody_else_uses_gives_its_file() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 4);
    let sliced = rig.seal_clean(&bytes);
    let path = rig.path(&sliced.digest);
    let before = inode(&path);
    let blob = rig.open(&sliced);
    let taken = rig.blobs.take_over(&blob, None).unwrap();
    assert_eq!(read_all(&taken.file), bytes);
    if inode(&rig.staging.path(taken.id)) != before {
        // The file system shares blocks: the copy cost nothing.
        return;
    }
    assert_eq!(rig.residency(&sliced), Residency::Nothing);
    assert!(!blob.has(0, 1), "nobody trusts the bytes any more");
    assert_eq!(blob.try_read(0, 1).unwrap(), None);
    assert!(blob.read(0, 1).is_err());
    rig.blobs.finish_take_over(taken);
    assert!(!path.exists());
}

#[test]
fn a_large_clean_blob_that_a_program_has_mapped_is_copied() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 5);
    let sliced = rig.seal_clean(&bytes);
    let mapped = File::open(rig.path(&sliced.digest)).unwrap();
    let taken = rig.blobs.take_over(&rig.open(&sliced), None).unwrap();
    taken.file.write_all_at(b"written", 0).unwrap();
    assert_eq!(read_all(&mapped), bytes);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
}

#[test]
fn the_same_file_of_a_clean_blob_is_what_its_readers_see_being_written() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(b"before");
    let blob = rig.open(&sliced);
    assert!(lends(&blob, Ino(1)));
    let reader = blob.file().unwrap();
    let taken = rig.blobs.take_over(&blob, Some(id_of(&blob))).unwrap();
    assert_eq!(rig.residency(&sliced), Residency::Nothing);
    let changes = taken.changes.clone();
    rig.ledger.commit(changes).unwrap();
    let staged = rig.staging.open(taken.id, true).unwrap();
    rig.blobs.finish_take_over(taken);
    assert!(!rig.path(&sliced.digest).exists());
    staged.write_all_at(b"BEFORE", 0).unwrap();
    assert_eq!(read_all(&reader), b"BEFORE");
    assert!(!blob.is_whole());
}

#[test]
fn the_same_file_of_a_dirty_blob_leaves_a_copy_behind() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 6);
    let sliced = rig.seal(&bytes);
    let (blob, other) = (rig.open(&sliced), rig.open(&sliced));
    assert!(lends(&blob, Ino(1)));
    let reader = blob.file().unwrap();
    let taken = rig.blobs.take_over(&blob, Some(id_of(&blob))).unwrap();
    taken.file.write_all_at(b"written", 0).unwrap();
    rig.blobs.finish_take_over(taken);
    assert_eq!(&read_all(&reader)[..7], b"written");
    assert_eq!(other.read(0, LARGE).unwrap(), bytes);
    assert_eq!(fs::read(rig.path(&sliced.digest)).unwrap(), bytes);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
    assert_eq!(rig.durability(&sliced), Some(Durability::Dirty));
    blob.give_back(Ino(1));
    assert!(lends(&other, Ino(2)), "the copy was never lent");
}

#[test]
fn a_kill_after_a_take_over_leaves_nothing_that_vouches_for_the_written_file() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(b"before");
    let taken = rig
        .blobs
        .take_over(&rig.open(&sliced), Some(id_of(&rig.open(&sliced))))
        .unwrap();
    taken.file.write_all_at(b"BEFORE", 0).unwrap();
    let rig = rig.killed();
    assert!(!rig.open(&sliced).has(0, 1));
    let again = rig.seal(b"before");
    assert_eq!(rig.open(&again).read(0, 6).unwrap(), b"before");
}

#[test]
fn a_file_made_again_before_the_take_over_ends_keeps_its_name() {
    let rig = Rig::new();
    let sliced = rig.seal_clean(b"before");
    let taken = rig
        .blobs
        .take_over(&rig.open(&sliced), Some(id_of(&rig.open(&sliced))))
        .unwrap();
    let again = rig.seal(b"before");
    rig.blobs.finish_take_over(taken);
    assert_eq!(rig.open(&again).read(0, 6).unwrap(), b"before");
}

#[test]
fn a_file_that_is_not_the_blobs_any_more_is_not_taken_over() {
    let rig = Rig::new();
    let sliced = rig.seal(b"dirty");
    let (blob, other) = (rig.open(&sliced), rig.open(&sliced));
    let lent = id_of(&blob);
    let first = rig.blobs.take_over(&blob, Some(lent)).unwrap();
    let staged = rig.staged();
    let again = rig.blobs.take_over(&other, Some(lent));
    assert!(again.is_err(), "the first one writes to it");
    assert_eq!(rig.staged(), staged);
    drop(first);
}

#[test]
fn a_seal_leaves_a_file_alone_that_is_whole_but_not_in_its_row_yet() {
    let rig = Rig::new();
    let bytes = noise(LARGE, 8);
    let sliced = rig.publish(&bytes);
    let blob = rig.open(&sliced);
    for (index, chunk) in sliced.chunks.chunks().iter().enumerate() {
        let start = sliced.chunks.start(index) as usize;
        let piece = &bytes[start..start + chunk.len as usize];
        blob.file
            .store_chunks(index..index + 1, piece, || Ok(()))
            .unwrap();
    }
    assert_eq!(
        rig.residency(&sliced),
        Residency::Nothing,
        "the test saves nothing"
    );
    let before = inode(&rig.path(&sliced.digest));
    rig.seal(&bytes);
    assert_eq!(inode(&rig.path(&sliced.digest)), before);
    assert_eq!(rig.residency(&sliced), Residency::Whole);
}

#[test]
fn a_clean_blob_whose_file_is_gone_is_not_resident_and_a_dirty_one_is_quarantined() {
    let rig = Rig::new();
    let (clean, dirty) = (rig.seal_clean(b"clean"), rig.seal(b"dirty"));
    fs::remove_file(rig.path(&clean.digest)).unwrap();
    fs::write(rig.path(&dirty.digest), b"dir").unwrap();
    assert!(!rig.open(&clean).has(0, 1));
    assert!(!rig.open(&dirty).has(0, 1));
    assert_eq!(rig.residency(&clean), Residency::Nothing);
    assert_eq!(rig.durability(&dirty), Some(Durability::Quarantined));
}

#[test]
fn a_file_that_was_found_gone_and_is_sealed_again_stays_resident() {
    let rig = Rig::new();
    let clean = rig.seal_clean(b"made twice");
    fs::remove_file(rig.path(&clean.digest)).unwrap();
    let reader = rig.open(&clean);
    assert!(reader.is_said_whole(), "nobody looked yet");
    assert!(!reader.has(0, 1));
    let again = rig.seal(b"made twice");
    assert_eq!(again.digest, clean.digest);
    assert!(reader.is_whole());
    drop(reader);
    assert_eq!(rig.residency(&clean), Residency::Whole);
    assert_eq!(rig.open(&clean).read(0, 10).unwrap(), b"made twice");
}

#[test]
fn uses_reach_the_rows_in_batches() {
    let rig = Rig::new();
    let sliced = rig.seal(b"used");
    let row = rig.row(&sliced).unwrap();
    let old = BlobRow { used_secs: 7, ..row };
    rig.ledger.commit(vec![Change::PutBlob(old)]).unwrap();
    rig.blobs.touch(&sliced.digest);
    rig.blobs.touch(&Digest::of(b"never seen"));
    assert_eq!(rig.row(&sliced).unwrap().used_secs, 7);
    rig.blobs.save(true).unwrap();
    assert!(rig.row(&sliced).unwrap().used_secs > 7);
    assert_eq!(rig.ledger.blob(&Digest::of(b"never seen")).unwrap(), None);
}

#[test]
fn a_file_that_nobody_writes_to_is_quiet() {
    let rig = Rig::new();
    let (id, _) = rig.stage(b"quiet");
    let file = rig.staging.open(id, false).unwrap();
    assert!(matches!(is_quiet(&file).unwrap(), Quiet::Yes { size: 5, mtime } if mtime > 1 << 60));
}

#[test]
fn a_writable_descriptor_is_not_quiet() {
    let rig = Rig::new();
    let (id, mut writer) = rig.staging.create().unwrap();
    let file = rig.staging.open(id, false).unwrap();
    assert_eq!(is_quiet(&file).unwrap(), Quiet::No);
    writer.write_all(b"more").unwrap();
    drop(writer);
    assert!(matches!(is_quiet(&file).unwrap(), Quiet::Yes { size: 4, .. }));
}

#[test]
fn a_mapping_of_another_process_that_outlives_its_descriptor_is_not_quiet() {
    let rig = Rig::new();
    let (id, _) = rig.stage(&[0; 4096]);
    let file = rig.staging.open(id, false).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::blobs_tests::child_that_maps",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD_PATH, rig.staging.path(id))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mapped = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("mapped"));
    assert!(mapped, "the child did not get so far");
    assert_eq!(is_quiet(&file).unwrap(), Quiet::No);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(matches!(is_quiet(&file).unwrap(), Quiet::Yes { .. }));
}

const CHILD_PATH: &str = "CASMOUNT_TEST_MAP";

#[test]
#[ignore = "a part of another test, which starts it as a process of its own"]
fn child_that_maps() {
    let Some(path) = std::env::var_os(CHILD_PATH) else {
        return;
    };
    let writer = File::options().read(true).write(true).open(path).unwrap();
    let _mapped = map_writable(&writer);
    drop(writer);
    println!("mapped");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut rest).unwrap();
}

/// Maps the first page and closes the descriptor; the mapping lasts as long as the process.
fn map_writable(writer: &File) -> *mut std::ffi::c_void {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the address; nobody refers to the memory.
    unsafe {
        mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            MapFlags::SHARED,
            writer,
            0,
        )
    }
    .unwrap()
}

#[test]
fn a_writable_mapping_alone_is_not_quiet() {
    let rig = Rig::new();
    let (id, _) = rig.stage(&[0; 4096]);
    let file = rig.staging.open(id, false).unwrap();
    let writer = rig.staging.open(id, true).unwrap();
    let mapped = map_writable(&writer);
    drop(writer);
    assert_eq!(is_quiet(&file).unwrap(), Quiet::No);
    // SAFETY: mapped above, and not used again.
    unsafe { rustix::mm::munmap(mapped, 4096) }.unwrap();
    assert!(matches!(is_quiet(&file).unwrap(), Quiet::Yes { .. }));
}

#[test]
fn many_users_of_one_blob_share_one_file() {
    let rig = Rig::new();
    let sliced = rig.seal(b"one");
    let leases: Vec<_> = (0..5).map(|_| rig.open(&sliced)).collect();
    assert!(leases.iter().all(|blob| Arc::ptr_eq(&blob.file, &leases[0].file)));
    assert!(rig.blobs.is_in_use(&sliced.digest));
    drop(leases);
    assert!(!rig.blobs.is_in_use(&sliced.digest));
}
