//! Jobs with a fork of their own: what a good one did becomes a part of the parent, what any other did does not.

#[path = "support/lab.rs"]
mod lab;
#[path = "support/log.rs"]
mod log;
mod s3server;
mod support;
#[path = "support/volumes.rs"]
mod volumes;

use std::{fs, time::Duration};

use casmount::{base::id::MachineId, tier::layout};
use lab::{Lab, StoreKind};
use log::{now_millis, put_log};
use serde_json::Value;
use support::{
    machine::{Machine, MachineSpec},
    posix::{content, file},
    tempdir, tree, wait,
};
use volumes::{
    assert_says, fork, is_absent, machine, objects_of, offline_json, offline_ok, parent, refusal, spec,
    until_caught_up,
};

on_both_stores!(
    a_good_job_is_merged_when_it_is_unmounted,
    a_job_that_is_not_said_to_be_good_leaves_its_parent_untouched,
    jobs_that_end_at_once_are_merged_all,
    a_job_commits_while_it_runs,
    a_killed_job_goes_on_in_its_fork,
    a_good_job_whose_store_is_away_is_told_so_and_merged_later,
    the_first_job_of_a_store_makes_the_parent,
    what_is_no_job_is_refused,
    who_merges_a_job_makes_a_catalog_of_the_parent_when_its_log_has_grown,
);

fn job(lab: &Lab, name: &str) -> MachineSpec {
    spec(lab, name, name).arg("--fork-from=main")
}

fn good_job(lab: &Lab, name: &str) -> Machine {
    job(lab, name).arg("--commit=on-success").start()
}

fn a_good_job_is_merged_when_it_is_unmounted(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let mut job = good_job(&lab, "job-1");
    assert_eq!(content(&job.path("kept")), b"kept");
    file(&job.path("written"), b"by the job");
    file(&job.path("dir/new"), &vec![b'n'; 3_000_000]);
    fs::remove_file(job.path("deleted")).unwrap();
    let expected = tree::read(job.root());
    let out = job.unmount_with(&["--success"]);
    assert_eq!(
        out,
        "promoted 3 paths of volume job-1 into main, 1 of them removed\n"
    );
    parent.until_content("written", b"by the job");
    parent.until_gone("deleted");
    until_caught_up(&parent);
    tree::assert_same_but_dir_times(&expected, &tree::read(parent.root()));
    // The fork is still there, and can be deleted.
    let listed = offline_json(&lab, &["volume", "list"]);
    assert_eq!(listed[0]["volume"], "job-1");
    assert_eq!(listed[0]["parent"], "main");
    offline_ok(&lab, &["fork", "delete", "job-1", "--yes"]);
    until_caught_up(&parent);
    tree::assert_same_but_dir_times(&expected, &tree::read(parent.root()));
}

fn a_job_that_is_not_said_to_be_good_leaves_its_parent_untouched(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let before = objects_of(&lab, "main");
    let tree_before = tree::read(parent.root());
    let work = |machine: &Machine| {
        file(&machine.path("written"), b"by the job");
        fs::remove_file(machine.path("deleted")).unwrap();
    };
    // Unmounted without a word, ended by a signal, killed, taken away; and one that never wanted to be merged.
    let mut plain = good_job(&lab, "plain");
    work(&plain);
    assert_eq!(plain.unmount_with(&[]), "");
    let mut signalled = good_job(&lab, "signalled");
    work(&signalled);
    let pid = rustix::process::Pid::from_raw(signalled.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    signalled.wait_until_ended();
    let mut killed = good_job(&lab, "killed");
    work(&killed);
    killed.flush();
    killed.kill9();
    let mut taken = good_job(&lab, "taken");
    work(&taken);
    tempdir::unmount_below(&taken.spec.mountpoint);
    taken.wait_until_ended();
    let mut never = job(&lab, "never").start();
    work(&never);
    assert_eq!(never.unmount_with(&["--success"]), "");

    until_caught_up(&parent);
    assert!(objects_of(&lab, "main") == before, "a job wrote to its parent");
    tree::assert_same(&tree_before, &tree::read(parent.root()));
    // What they did is not lost: it is in their forks.
    for name in ["plain", "signalled", "killed", "taken", "never"] {
        let difference = offline_json(&lab, &["volume", "diff", "main", name]);
        let expected = serde_json::json!([
            { "path": "deleted", "what": "removed" },
            { "path": "written", "what": "content" },
        ]);
        assert_eq!(difference, expected, "{name}");
    }
}

fn jobs_that_end_at_once_are_merged_all(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let names = ["job-a", "job-b", "job-c", "job-d"];
    let mut jobs: Vec<Machine> = names.iter().map(|name| good_job(&lab, name)).collect();
    for (job, name) in jobs.iter().zip(names) {
        file(&job.path(name), name.as_bytes());
        fs::create_dir(job.path("out")).unwrap();
        file(&job.path(format!("out/{name}")), name.as_bytes());
        file(&job.path("written"), name.as_bytes());
    }
    std::thread::scope(|scope| {
        for job in &mut jobs {
            scope.spawn(move || assert_says(&job.unmount_with(&["--success"]), &["promoted 4 paths"]));
        }
    });
    for name in names {
        parent.until_content(name, name.as_bytes());
        parent.until_content(&format!("out/{name}"), name.as_bytes());
    }
    until_caught_up(&parent);
    let written = content(&parent.path("written"));
    assert!(names.iter().any(|name| name.as_bytes() == written), "{written:?}");
    assert_eq!(content(&parent.path("kept")), b"kept");
    let late = machine(&lab, "late", "main");
    tree::assert_same_but_dir_times(&tree::read(parent.root()), &tree::read(late.root()));
}

fn a_job_commits_while_it_runs(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let mut job = job(&lab, "job").start();
    file(&job.path("first"), b"first");
    assert_eq!(
        job.control_ok("commit", &[]),
        "promoted 1 path of volume job into main\n"
    );
    parent.until_content("first", b"first");
    file(&job.path("second"), b"second");
    let report: Value = serde_json::from_str(&job.control_ok("commit", &["--json"])).unwrap();
    assert_eq!(report["committed"]["changes"], 2);
    assert_eq!(report["drained"]["complete"], true);
    parent.until_content("second", b"second");
    // Not while something is half written: the part would be taken for the whole.
    let open = fs::File::create(job.path("open")).unwrap();
    file(&job.path("third"), b"third");
    let output = job.control("commit", &["--deadline", "20s"]);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert_says(&err, &["nothing was promoted", "still open for writing", "open"]);
    drop(open);
    job.unmount();
    until_caught_up(&parent);
    assert!(is_absent(&parent.path("third")));
    // What is no fork has nothing to commit into.
    let output = parent.control("commit", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_says(
        &String::from_utf8_lossy(&output.stderr),
        &["volume main is no fork"],
    );
}

fn a_killed_job_goes_on_in_its_fork(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let mut job = good_job(&lab, "job");
    file(&job.path("first"), b"closed before the end");
    job.kill9();
    // The same command again: the fork is there, and so is what was closed.
    job.restart();
    assert_eq!(content(&job.path("first")), b"closed before the end");
    file(&job.path("second"), b"second");
    job.unmount_with(&["--success"]);
    parent.until_content("first", b"closed before the end");
    parent.until_content("second", b"second");
    // Also by another machine, which has nothing of it.
    let mut other = spec(&lab, "other", "job")
        .arg("--fork-from=main")
        .arg("--commit=on-success")
        .start();
    file(&other.path("third"), b"third");
    other.unmount_with(&["--success"]);
    parent.until_content("third", b"third");
}

fn a_good_job_whose_store_is_away_is_told_so_and_merged_later(kind: StoreKind) {
    let lab = Lab::new(kind);
    let parent = parent(&lab);
    let mut job = good_job(&lab, "job");
    file(&job.path("new"), b"new");
    lab.set_down(true);
    let output = job.control("unmount", &["--success", "--deadline", "3s"]);
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert_says(
        &err,
        &["nothing was promoted into main", "not everything is in the store"],
    );
    wait::until("the daemon has ended", Duration::from_secs(30), || {
        (!tempdir::mountpoints().contains(&job.spec.mountpoint)).then_some(())
    });
    job.kill9();
    lab.set_down(false);
    until_caught_up(&parent);
    assert!(is_absent(&parent.path("new")));
    job.restart();
    job.unmount_with(&["--success"]);
    parent.until_content("new", b"new");
}

fn the_first_job_of_a_store_makes_the_parent(kind: StoreKind) {
    let lab = Lab::new(kind);
    let mut job = good_job(&lab, "job-1");
    file(&job.path("new"), b"new");
    job.unmount_with(&["--success"]);
    let next = good_job(&lab, "job-2");
    assert_eq!(content(&next.path("new")), b"new");
    let main = machine(&lab, "main", "main");
    assert_eq!(content(&main.path("new")), b"new");
    let listed = offline_json(&lab, &["volume", "list"]);
    let names: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|of| of["volume"].as_str())
        .collect();
    assert_eq!(names, ["job-1", "job-2", "main"]);
    assert_eq!(listed[2]["parent"], Value::Null);
}

fn what_is_no_job_is_refused(kind: StoreKind) {
    let lab = Lab::new(kind);
    let _parent = parent(&lab);
    fork(&lab, "other", "main", &[]);
    fork(&lab, "of-other", "other", &[]);
    offline_ok(&lab, &["fork", "create", "gone", "--from", "main"]);
    offline_ok(&lab, &["fork", "delete", "gone", "--yes"]);
    for (volume, words) in [
        (
            "of-other",
            &["volume of-other exists and is no fork of volume main"][..],
        ),
        ("gone", &["volume gone was deleted"]),
    ] {
        let spec = spec(&lab, volume, volume).arg("--fork-from=main");
        assert_says(&refusal(&spec), words);
        assert!(!spec.cache_dir.exists());
    }
    for (args, words) in [
        (
            &["--volume=main", "--fork-from=main"][..],
            "needs another name than main",
        ),
        (&["--fork-from=main"], "needs another name than main"),
        (&["--volume=main", "--commit=on-success"], "needs a fork"),
        (&["--fork-from=Main"], "not a volume name"),
        (&["--commit=always"], "always"),
    ] {
        let spec = lab.spec("odd");
        let mut command = spec.mount_command();
        command.args(args).arg("--foreground").arg(&spec.mountpoint);
        let output = wait::run(&mut command, Duration::from_secs(60));
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert_says(&String::from_utf8_lossy(&output.stderr), &[words]);
    }
}

fn who_merges_a_job_makes_a_catalog_of_the_parent_when_its_log_has_grown(kind: StoreKind) {
    let lab = Lab::new(kind);
    let has_catalog = || objects_of(&lab, "main").contains_key(&layout::head("main"));
    // As much as makes a catalog due for anybody.
    lab.with_bucket(async |bucket| {
        let began = now_millis(&bucket).await - 600_000;
        put_log(&bucket, "main", MachineId(5), began..began + 4100).await;
    });
    let mut job = good_job(&lab, "job-1");
    file(&job.path("new"), b"new");
    // At the end of its mount, or from anywhere.
    if kind == StoreKind::S3 {
        assert!(!has_catalog());
        job.unmount_with(&["--success"]);
    } else {
        job.unmount();
        assert!(!has_catalog());
        offline_ok(&lab, &["fork", "promote", "job-1", "--into", "main"]);
    }
    assert!(has_catalog(), "nobody compacts what jobs write");
    let late = machine(&lab, "late", "main");
    assert_eq!(content(&late.path("new")), b"new");
    assert_eq!(fs::read_dir(late.root()).unwrap().count(), 101);
}
