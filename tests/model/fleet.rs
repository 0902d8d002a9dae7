//! Real machines with one store, which live through stories beside the model of them.

use std::{path::PathBuf, thread, time::Duration};

use super::{
    answer::Time,
    compare, drive,
    fs::{Fs, Id},
    lab::{Lab, StoreKind},
    ops::Op,
    real::Real,
    s3server::Faults,
    script::{Line, What},
    steps::{Step, Trouble},
    support::{machine::Machine, posix, wait},
    world::World,
};

/// How the machines are called, in scripts too.
const NAMES: [&str; 2] = ["A", "B"];

/// How long machines may take to hear of each other.
const SOON: Duration = Duration::from_secs(60);

/// How long the kernel may take to hear what the daemon knows, where much else runs.
const HEARD: Duration = Duration::from_secs(5);

/// Stamps are in milliseconds: operations of different machines are not done in the same.
const APART: Duration = Duration::from_millis(3);

/// How many directories for stories are made at a time.
const STOCK: u64 = 100;

pub struct Fleet {
    lab: Lab,
    kind: StoreKind,
    machines: Vec<Machine>,
    trouble: Option<Trouble>,
    /// How often machines agreed, and how many stories began.
    marks: u64,
    stories: u64,
    fresh: u64,
    /// Operations that were done, and that were not because what comes of them is not promised.
    done: u64,
    left_out: u64,
}

/// A story under way.
struct Story {
    world: World,
    reals: Vec<Real>,
    dir: String,
    lines: Vec<Line>,
    /// Who was at work since the last agreement.
    at_work: Option<usize>,
    last: usize,
}

impl Fleet {
    pub fn new(kind: StoreKind, machines: usize, args: &[&str]) -> Self {
        drive::prepare();
        let lab = Lab::new(kind);
        let start = |name: &&str| {
            let mut spec = lab.spec(name).arg("--xattr");
            spec.args.extend(args.iter().map(Into::into));
            spec.start()
        };
        let machines = NAMES[..machines].iter().map(start).collect();
        Self {
            lab,
            kind,
            machines,
            trouble: None,
            marks: 0,
            stories: 0,
            fresh: 0,
            done: 0,
            left_out: 0,
        }
    }

    /// Lives through a story. The script of it is the error when something is not as the model has it.
    pub fn live(&mut self, steps: &[Step]) -> Result<(), String> {
        self.set_trouble(None);
        if self.stories.is_multiple_of(STOCK) {
            for number in 0..STOCK {
                let dir = self.machines[0].path(format!("{}", self.stories + number));
                std::fs::create_dir(dir).expect("a directory can be made");
            }
            self.tell_all(&vec![false; self.machines.len()]);
        }
        let dir = self.stories.to_string();
        self.stories += 1;
        let real = |machine: &Machine| Real::new(&machine.path(&dir));
        let mut story = Story {
            world: World::new(self.machines.len()),
            reals: self.machines.iter().map(real).collect(),
            lines: Vec::new(),
            at_work: None,
            last: 0,
            dir,
        };
        for step in steps {
            self.step(&mut story, step)?;
        }
        self.agree(&mut story)?;
        self.compare_fresh(&mut story)
    }

    /// Asserts that the stories told something.
    pub fn assert_told_much(&self) {
        eprintln!(
            "{} stories, {} operations, {} left out",
            self.stories, self.done, self.left_out
        );
        assert!(self.left_out * 20 <= self.done, "too much is left out");
    }

    fn step(&mut self, story: &mut Story, step: &Step) -> Result<(), String> {
        match step {
            Step::Do(who, op) => self.act(story, *who, op),
            Step::Agree => self.agree(story),
            Step::Trouble(trouble) => {
                // A directory is there or it is not.
                let trouble = match self.kind {
                    StoreKind::File => Trouble::Away,
                    StoreKind::S3 => *trouble,
                };
                if self.trouble.is_none() {
                    self.agree_if_needed(story)?;
                    self.set_trouble(Some(trouble));
                    story.say("A", format!(": the store is {trouble:?}"));
                }
                Ok(())
            }
            Step::Kill(who) => self.kill(story, *who),
            Step::Remount(who) => self.remount(story, *who),
        }
    }

    fn act(&mut self, story: &mut Story, who: usize, op: &Op) -> Result<(), String> {
        if self.trouble.is_none() && story.at_work.is_some_and(|one| one != who) {
            self.agree(story)?;
        }
        let away = self.trouble == Some(Trouble::Away);
        if story.world.is_unpromised(who, op, self.trouble.is_some(), away) {
            self.left_out += 1;
            return Ok(());
        }
        self.done += 1;
        if story.last != who {
            thread::sleep(APART);
        }
        story.last = who;
        story.at_work = Some(who);
        story.one(who, op)
    }

    /// Ends a daemon without a word. What is open is lost for programs, and counts as closed.
    fn kill(&mut self, story: &mut Story, who: usize) -> Result<(), String> {
        if self.trouble.is_none() && story.at_work.is_some_and(|one| one != who) {
            self.agree(story)?;
        }
        story.at_work = Some(who);
        self.tell_of_copies(story, who)?;
        // Between two stamps, like any operation of another machine.
        thread::sleep(APART);
        story.say(
            NAMES[who],
            format!(": kill -9 the daemon of {}, mount again", NAMES[who]),
        );
        self.machines[who].kill9();
        story.reals[who].close_all();
        self.machines[who].restart();
        thread::sleep(APART);
        story.world.step += 1;
        let step = story.world.step;
        let model = &mut story.world.machines[who];
        (model.step, model.now) = (step, drive::now());
        model.shadows.clear();
        model.handles = Fs::new().handles;
        let dirty: Vec<Id> = model
            .nodes
            .iter()
            .filter(|(_, node)| node.dirty)
            .map(|(id, _)| *id)
            .collect();
        for id in dirty {
            // A file that was emptied by its open shows the time of that, which dies with the daemon; its
            // staging file has that of some milliseconds before.
            if model.node(id).body.is_empty_file() {
                model.node_mut(id).mtime = Time::Any;
            }
            model.record(id);
        }
        Self::check(story, who)
    }

    /// Tells of what others than `who` have open and wrote.
    ///
    /// To start a daemon is to start a program: the child has copies of the descriptors of this process
    /// until it executes, and the close of such a copy tells of the file like any other close. Here that
    /// is done before, at a moment that the model knows. Of a file made by its open a close of a copy tells
    /// nothing, see `Opened::created`.
    fn tell_of_copies(&self, story: &mut Story, who: usize) -> Result<(), String> {
        for one in (0..self.machines.len()).filter(|one| *one != who) {
            for slot in 0..super::ops::SLOTS {
                let model = &story.world.machines[one];
                let handle = model.handles[slot].as_ref();
                if handle
                    .is_some_and(|handle| handle.is_writer() && !handle.made && model.node(handle.node).dirty)
                {
                    thread::sleep(APART);
                    story.one(one, &Op::Fsync { slot })?;
                    story.last = one;
                }
            }
        }
        Ok(())
    }

    fn remount(&mut self, story: &mut Story, who: usize) -> Result<(), String> {
        if self.trouble.is_some() {
            return Ok(());
        }
        self.agree_if_needed(story)?;
        for slot in 0..super::ops::SLOTS {
            story.one(who, &Op::Close { slot })?;
        }
        story.say(NAMES[who], format!(": unmount {0}, mount {0} again", NAMES[who]));
        self.flush_whole(who, false);
        self.machines[who].unmount();
        self.machines[who].restart();
        story.at_work = Some(who);
        Self::check(story, who)
    }

    /// Compares a machine with what the model has of it.
    fn check(story: &mut Story, who: usize) -> Result<(), String> {
        let root = story.reals[who].root().to_owned();
        // The kernel hears of changes of others a moment after the daemon.
        let model = &mut story.world.machines[who];
        let mut differences = Vec::new();
        let _ = wait::try_until(HEARD, || {
            differences = compare::differences(model, &root);
            differences.is_empty().then_some(())
        });
        drive::same(&differences, NAMES[who], &mut story.lines)
    }

    fn agree_if_needed(&mut self, story: &mut Story) -> Result<(), String> {
        if story.at_work.is_some() {
            self.agree(story)?;
        }
        Ok(())
    }

    fn agree(&mut self, story: &mut Story) -> Result<(), String> {
        let machines = 0..self.machines.len();
        for who in machines.clone() {
            for slot in story.world.to_close(who) {
                thread::sleep(APART);
                story.one(who, &Op::Close { slot })?;
            }
        }
        for who in machines.clone() {
            for slot in story.world.to_close_for_others(who) {
                story.one(who, &Op::Close { slot })?;
            }
        }
        for who in machines.clone() {
            // Without a trouble the others may have heard of some of it by now.
            if self.trouble.is_some() || story.at_work.is_none_or(|one| one == who) {
                Self::check(story, who)?;
            }
        }
        // Each repair makes less to repair; twice does in all cases that were thought of.
        for _ in 0..4 {
            self.set_trouble(None);
            let open = story.world.machines.iter();
            let open: Vec<_> = open
                .map(|model| model.handles.iter().any(Option::is_some))
                .collect();
            self.tell_all(&open);
            story.say(
                "A",
                ": casmount flush on all machines, and wait until they see the same".to_owned(),
            );
            let repairs = story.world.agree();
            for who in machines.clone() {
                Self::check(story, who)?;
            }
            story.at_work = None;
            if repairs.is_empty() {
                return Ok(());
            }
            thread::sleep(APART);
            for repair in repairs {
                story.last = 0;
                story.one(0, &repair)?;
            }
        }
        panic!("machines do not agree");
    }

    /// Compares a machine that was never there before.
    fn compare_fresh(&mut self, story: &mut Story) -> Result<(), String> {
        self.fresh += 1;
        let fresh = self
            .lab
            .spec(&format!("fresh{}", self.fresh))
            .arg("--xattr")
            .start();
        self.await_marks(&fresh);
        let root = fresh.path(&story.dir);
        let mut model = story.world.machines[0].clone();
        for node in model.nodes.values_mut().filter(|node| node.is_dir()) {
            node.mtime = Time::Any;
        }
        let mut differences = Vec::new();
        let _ = wait::try_until(HEARD, || {
            differences = compare::differences(&mut model, &root);
            differences.is_empty().then_some(())
        });
        drop(fresh);
        drive::same(&differences, "a fresh machine", &mut story.lines)
    }

    /// Makes all machines see what each of them has to tell; some may have files open.
    fn tell_all(&mut self, open: &[bool]) {
        // A file that a first flush leaves out is told behind a mark that was made before it.
        let mut marked = false;
        while !marked {
            self.marks += 1;
            for machine in &self.machines {
                posix::file(&machine.path(mark_of(machine)), self.mark().as_bytes());
            }
            marked = true;
            for (who, is_open) in open.iter().enumerate() {
                marked &= self.flush_whole(who, *is_open) == 1;
            }
        }
        for machine in &self.machines {
            self.await_marks(machine);
        }
    }

    /// Flushes a machine until all that is closed on it is told; returns how often that took. It hears of a close
    /// a moment after close(2) has returned, and what was open when its daemon was killed counts as open until
    /// the kernel has let go of the dead mount, which can take seconds where much else runs.
    fn flush_whole(&self, who: usize, is_open: bool) -> u64 {
        let machine = &self.machines[who];
        let mut times = 0;
        wait::until("a flush leaves nothing out", SOON, || {
            times += 1;
            let said = machine.control("flush", &["--deadline", "90s"]);
            // 1 also when a file is still open for writing, which is no part of it.
            let done = match said.status.code() {
                Some(0) => true,
                Some(1) if is_open => machine.counter("/files/settling") == 0,
                Some(1) => false,
                _ => panic!("flush: {said:?}"),
            };
            done.then_some(())
        });
        times
    }

    fn mark(&self) -> String {
        format!("agreement {}", self.marks)
    }

    fn await_marks(&self, machine: &Machine) {
        let want = self.mark();
        for other in &self.machines {
            let path: PathBuf = machine.path(mark_of(other));
            wait::until("a machine hears of the others", SOON, || {
                (std::fs::read(&path).ok()? == want.as_bytes()).then_some(())
            });
        }
    }

    fn set_trouble(&mut self, trouble: Option<Trouble>) {
        if self.trouble == trouble {
            return;
        }
        match self.kind {
            StoreKind::File => self.lab.set_down(trouble.is_some()),
            StoreKind::S3 => {
                let refuses = |operation: &str| Faults {
                    only: vec![operation.to_owned()],
                    error_500: 1.0,
                    ..Faults::default()
                };
                self.lab.server().set_faults(match trouble {
                    None => Faults::default(),
                    Some(Trouble::Away) => Faults {
                        down: true,
                        ..Faults::default()
                    },
                    Some(Trouble::Deaf) => refuses("ListObjectsV2"),
                    Some(Trouble::Mute) => refuses("PutObject"),
                });
            }
        }
        self.trouble = trouble;
    }
}

impl Story {
    fn one(&mut self, who: usize, op: &Op) -> Result<(), String> {
        self.world.step += 1;
        let (model, real) = (&mut self.world.machines[who], &mut self.reals[who]);
        drive::one(NAMES[who], op, self.world.step, model, real, &mut self.lines)
    }

    fn say(&mut self, who: &'static str, words: String) {
        self.lines.push(Line {
            who,
            what: What::Event(words),
            note: String::new(),
        });
    }
}

fn mark_of(machine: &Machine) -> String {
    format!("mark-{}", machine.spec.name)
}
