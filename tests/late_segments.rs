//! Segments that land two minutes after they were sent, on real mounts: all see what they say, though everybody's
//! cursor and a catalog's watermark have passed them, and they undo nothing that was said since.
//!
//! On S3 the server holds a PUT back; in a directory the process stands still between the writing of the file and its
//! appearance under its key. What is late says of a directory of three files that it is there; by then others have
//! written one of them anew, and deleted another.
//!
//! | sender | what becomes of it |
//! |---|---|
//! | `dead` | dies while its segment is on the way |
//! | `stopped` | is suspended while its segment is on the way, and goes on when it has landed |
//! | `stubborn` | hears nothing, gives the first up and sends another, which lands long before the first |

#[path = "support/lab.rs"]
mod lab;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{
    fs::{self, File},
    io,
    mem::MaybeUninit,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use casmount::{
    namespace::segment::{self, Decoded},
    tier::layout,
};
use lab::{Lab, StoreKind};
use rustix::{
    fs::inotify,
    process::{Pid, Signal, kill_process},
};
use s3server::Faults;
use support::{machine::Machine, posix::file, wait};
use volumes::{fork, is_absent, machine, offline_json, spec};

on_both_stores!(what_lands_two_minutes_late_is_seen_by_all);

const LATE: Duration = Duration::from_secs(125);
/// Until when others go on.
const SOON_LANDS: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(60);
/// A follower looks at its whole window once a minute.
const FULL_LISTING: Duration = Duration::from_secs(150);
/// From when on nothing hinders the stubborn any more.
const HEARD: Duration = Duration::from_secs(50);
/// How often a process is stopped until it is at the right place.
const TRIES: usize = 100;

const KEPT: &[u8] = b"of the late segment";
const NEWER: &[u8] = b"written by another meanwhile";

fn now_millis() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_millis() as u64
}

fn signal(machine: &Machine, signal: Signal) {
    let pid = Pid::from_raw(machine.id() as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

/// A machine whose segment is on its way.
struct Sender {
    machine: Machine,
    /// What the segment says.
    dir: String,
    sent: Instant,
    sent_millis: u64,
    /// In a directory: the file that a dead machine wrote, and the key that it was to appear under.
    left: Option<(PathBuf, PathBuf)>,
}

impl Sender {
    fn has(&self, machine: &Machine) -> bool {
        let dir = machine.path(&self.dir);
        let is = |name: &str, bytes: &[u8]| fs::read(dir.join(name)).is_ok_and(|found| found == bytes);
        is("kept", KEPT) && is("newer", NEWER) && is_absent(&dir.join("gone"))
    }

    /// The segments in the store that say of the file that is kept that it is there, with their keys.
    fn segments(&self, lab: &Lab) -> Vec<(String, Decoded)> {
        let path = format!("{}/kept", self.dir);
        let mut said = segments(lab);
        said.retain(|(_, decoded)| says(decoded, &path));
        said
    }
}

/// Whether a segment says that something is at `path`.
fn says(decoded: &Decoded, path: &str) -> bool {
    let mut changes = decoded.changes.iter();
    changes.any(|change| change.path == path.as_bytes() && change.entry.is_some())
}

/// All of the log, in the order of their keys.
fn segments(lab: &Lab) -> Vec<(String, Decoded)> {
    let objects = lab.objects().into_iter();
    let logs = objects.filter(|object| object.key.starts_with(&layout::log_prefix("main")));
    let mut segments: Vec<_> = logs
        .map(|object| (object.key, segment::decode(&object.bytes).unwrap()))
        .collect();
    segments.sort_by(|(a, _), (b, _)| a.cmp(b));
    segments
}

/// A machine that can say by one segment that a directory is there: its blobs are in the store.
fn ready(lab: &Lab, name: &str) -> (Machine, String) {
    let machine = machine(lab, name, "main");
    let dir = format!("{name}-0");
    fs::create_dir(machine.path(&dir)).unwrap();
    for name in ["kept", "newer", "gone"] {
        file(&machine.path(format!("{dir}/{name}")), KEPT);
    }
    machine.flush();
    (machine, dir)
}

/// Has the server hold back the segment that says it, and what more this machine sends.
fn held_by_server(lab: &Lab, name: &str) -> Sender {
    let (machine, old) = ready(lab, name);
    let id = machine.status()["machine"].as_str().unwrap().to_owned();
    let before = lab.server().counts().faults;
    lab.server().set_faults(Faults {
        land_later_ms: LATE.as_millis() as u64,
        land_later_keys: vec![format!("-{id}-")],
        ..Faults::default()
    });
    let dir = format!("{name}-1");
    let sent_millis = now_millis();
    fs::rename(machine.path(old), machine.path(&dir)).unwrap();
    wait::until("the segment is on its way", SOON, || {
        (lab.server().counts().faults > before).then_some(())
    });
    Sender {
        machine,
        dir,
        sent: Instant::now(),
        sent_millis,
        left: None,
    }
}

/// Stops a machine between the writing of a segment and its appearance in the log.
fn stopped_in_the_middle(lab: &Lab, name: &str) -> Sender {
    let (machine, mut dir) = ready(lab, name);
    let store = PathBuf::from(lab.url().strip_prefix("file://").unwrap());
    let temp = store.join(".casmount/tmp");
    for attempt in 1..=TRIES {
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watch, &temp, inotify::WatchFlags::MODIFY).unwrap();
        let old = std::mem::replace(&mut dir, format!("{name}-{attempt}"));
        let said = format!("{dir}/kept");
        let sent_millis = now_millis();
        fs::rename(machine.path(old), machine.path(&dir)).unwrap();
        let deadline = Instant::now() + SOON;
        loop {
            assert!(Instant::now() < deadline, "nothing of {said} is published");
            if !hears_something(&watch) {
                if segments(lab).iter().any(|(_, decoded)| says(decoded, &said)) {
                    break;
                }
                thread::sleep(Duration::from_micros(50));
                continue;
            }
            signal(&machine, Signal::STOP);
            wait::until("the machine stands still", SOON, || {
                stands(&machine).then_some(())
            });
            if let Some(left) = unnamed_segment(&temp, &said) {
                let decoded = segment::decode(&fs::read(&left).unwrap()).unwrap();
                let head = decoded.head;
                let key = layout::segment("main", head.published_millis, head.machine, head.seq);
                return Sender {
                    machine,
                    dir,
                    sent: Instant::now(),
                    sent_millis,
                    left: Some((left, store.join(key))),
                };
            }
            signal(&machine, Signal::CONT);
        }
    }
    panic!("{name} was never stopped in the middle");
}

fn hears_something(watch: &impl std::os::fd::AsFd) -> bool {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    inotify::Reader::new(watch, &mut buffer).next().is_ok()
}

/// Whether all threads of a machine's daemon are stopped.
fn stands(machine: &Machine) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", machine.id())).unwrap();
    tasks.flatten().all(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // The state follows the name, which is in parentheses. A thread that ended has no file any more.
        stat.rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with('T'))
    })
}

/// The file of a segment that says `path` and has no key yet.
fn unnamed_segment(temp: &Path, path: &str) -> Option<PathBuf> {
    let mut files = fs::read_dir(temp).unwrap().flatten().map(|entry| entry.path());
    files.find(|file| {
        let Ok(bytes) = fs::read(file) else { return false };
        let is_unnamed = fs::metadata(file).is_ok_and(|meta| meta.nlink() == 1);
        is_unnamed && segment::decode(&bytes).is_ok_and(|decoded| says(&decoded, path))
    })
}

fn what_lands_two_minutes_late_is_seen_by_all(kind: StoreKind) {
    let lab = Lab::new(kind);
    let b = machine(&lab, "b", "main");
    let c = spec(&lab, "c", "main").arg("--read-only").start();
    let mut rests = machine(&lab, "rests", "main");
    file(&b.path("first"), b"first");
    b.flush();
    rests.until_content("first", b"first");

    let mut senders = match kind {
        StoreKind::S3 => {
            let mut dead = held_by_server(&lab, "dead");
            dead.machine.kill9();
            let stopped = held_by_server(&lab, "stopped");
            signal(&stopped.machine, Signal::STOP);
            vec![dead, stopped, held_by_server(&lab, "stubborn")]
        }
        StoreKind::File => {
            let mut dead = stopped_in_the_middle(&lab, "dead");
            dead.machine.kill9();
            vec![dead, stopped_in_the_middle(&lab, "stopped")]
        }
    };
    let (first, last) = (senders[0].sent, senders[senders.len() - 1].sent);
    assert!(first.elapsed() < HEARD, "it took too long to begin");
    // Others go on, and say something else of the same names.
    for Sender { dir, .. } in &senders {
        fs::create_dir_all(b.path(dir)).unwrap();
        file(&b.path(format!("{dir}/gone")), b"for a moment");
        file(&b.path(format!("{dir}/newer")), b"old");
    }
    b.flush();
    for Sender { dir, .. } in &senders {
        fs::remove_file(b.path(format!("{dir}/gone"))).unwrap();
        file(&b.path(format!("{dir}/newer")), NEWER);
    }
    b.flush();
    let mut number = 0;
    let mut newer = || {
        number += 1;
        let name = format!("newer-{number}");
        file(&b.path(&name), name.as_bytes());
        b.flush();
        c.until_content(&name, name.as_bytes());
        name
    };
    let lives_until = |moment: Instant, newer: &mut dyn FnMut() -> String| {
        while Instant::now() < moment {
            newer();
            thread::sleep(Duration::from_secs(3).min(moment.saturating_duration_since(Instant::now())));
        }
    };
    lives_until(last + HEARD, &mut newer);
    if kind == StoreKind::S3 {
        lab.server().set_faults(Faults::default());
        let stubborn = &senders[2];
        wait::until("what was sent again is seen", SOON, || {
            stubborn.has(&c).then_some(())
        });
    }
    // Everybody passes by: a machine that keeps its cursor on its disk, a fork that sees this moment, a catalog.
    let name = newer();
    rests.until_content(&name, name.as_bytes());
    rests.unmount();
    fork(&lab, "moment", "main", &["--at", "now"]);
    lives_until(first + Duration::from_secs(80), &mut newer);
    let compacted = offline_json(&lab, &["compact", "--trail=1s"]);
    assert_eq!(compacted["outcome"], "compacted");
    let watermark = compacted["watermark_millis"].as_u64().unwrap();
    for Sender { sent_millis, dir, .. } in &senders {
        assert!(watermark > sent_millis + 20_000, "{watermark} {sent_millis}");
        for machine in [&b, &c] {
            let seen = machine.counter("/follow/caught_up_millis");
            assert!(seen > sent_millis + 20_000, "{seen} {sent_millis}");
            let is_there = !is_absent(&machine.path(format!("{dir}/kept")));
            assert_eq!(is_there, dir.starts_with("stubborn"), "{dir} is not late");
        }
    }

    // It lands.
    lives_until(first + SOON_LANDS, &mut newer);
    for sender in &mut senders {
        let landed = sender.sent + LATE + Duration::from_millis(500);
        thread::sleep(landed.saturating_duration_since(Instant::now()));
        match &sender.left {
            // As it does on a file server that had the request already.
            Some((left, key)) if sender.dir.starts_with("dead") => {
                match fs::create_dir(key.parent().unwrap()) {
                    Err(err) if err.kind() != io::ErrorKind::AlreadyExists => panic!("{err}"),
                    _ => {}
                }
                fs::hard_link(left, key).unwrap();
                File::open(key.parent().unwrap()).unwrap().sync_all().unwrap();
                fs::remove_file(left).unwrap();
            }
            _ if sender.dir.starts_with("stopped") => signal(&sender.machine, Signal::CONT),
            _ => {}
        }
    }
    rests.restart();
    let d = machine(&lab, "d", "main");
    let moment = machine(&lab, "fork", "moment");
    for sender in &senders {
        for machine in [&b, &c, &rests, &d, &moment] {
            let what = format!("{} sees {}", machine.spec.name, sender.dir);
            wait::until(&what, FULL_LISTING, || sender.has(machine).then_some(()));
        }
    }

    // What its machine does not know to be read in time it said again; both are there.
    for sender in &senders {
        if !sender.dir.starts_with("dead") {
            sender.machine.flush();
            assert!(sender.has(&sender.machine), "{} itself", sender.dir);
        }
        let segments = sender.segments(&lab);
        let keys: Vec<_> = segments.iter().map(|(key, _)| key).collect();
        let times = segments
            .iter()
            .map(|(_, of)| of.head.published_millis - sender.sent_millis);
        let times: Vec<_> = times.collect();
        eprintln!("{}: {keys:?} {times:?}", sender.dir);
        assert!(times[0] < 20_000, "{times:?}");
        let least = match sender.dir.split('-').next().unwrap() {
            "dead" => {
                assert_eq!(times.len(), 1);
                continue;
            }
            "stopped" => LATE.as_millis() as u64,
            // The program gives a request up after 20 s, once more after another 20 s, and begins anew.
            _ => 30_000,
        };
        assert!(times.len() > 1 && times[times.len() - 1] >= least, "{times:?}");
    }

    // The next catalog has what was behind the watermark of the one before.
    newer();
    let compacted = offline_json(&lab, &["compact", "--trail=0s"]);
    assert_eq!(compacted["outcome"], "compacted");
    for object in lab.objects() {
        if object.key.starts_with(&layout::log_prefix("main")) {
            lab.tamper(&object.key, None);
        }
    }
    let after = machine(&lab, "after", "main");
    for sender in &senders {
        assert!(sender.has(&after), "{} is not in the catalog", sender.dir);
    }
}
