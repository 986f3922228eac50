//! A pure model of cursors: what each step may do to jobs and cursors, in maps, without SQL. `walk.rs`
//! compares it with the real thing.

use std::collections::BTreeMap;

use pgcue::lifecycle::Settled;
use pgcue::store::{ClaimedRun, EndedRun};
use pgcue::{OnFailure, OnRetry};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Waiting,
    Scheduled,
    Running(i64),
}

#[derive(Debug, Clone)]
pub struct Job {
    pub key: Option<&'static str>,
    pub priority: i16,
    pub on_retry: OnRetry,
    pub on_failure: OnFailure,
    pub max_attempts: u16,
    pub collapses: bool,
    pub at: At,
    pub attempt: u16,
    pub losses: u16,
    pub cancelled: bool,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Cursor {
    pub owner: Option<i64>,
    pub hold: Option<i64>,
    pub halted: bool,
    pub version: i64,
    pub state: Option<String>,
}

#[derive(Default)]
pub struct Model {
    pub jobs: BTreeMap<i64, Job>,
    pub cursors: BTreeMap<&'static str, Cursor>,
    /// Which lease a token belongs to.
    pub leases: BTreeMap<i64, i64>,
}

impl Model {
    /// The jobs of a cursor in the order in which they must run.
    pub fn mailbox(&self, key: &str) -> Vec<i64> {
        let hold = self.cursors.get(key).and_then(|cursor| cursor.hold);
        let mine = |job: &Job| job.key == Some(key) && job.at == At::Waiting;
        let mut ids: Vec<i64> = self.jobs.iter().filter(|(_, job)| mine(job)).map(|(id, _)| *id).collect();
        ids.sort_by_key(|id| (hold != Some(*id), -i32::from(self.jobs[id].priority), *id));
        ids
    }

    /// A claim brought this run: may it have?
    pub fn claimed(&mut self, run: &ClaimedRun, token: i64, lease: i64, longest: usize) {
        let ids: Vec<i64> = run.jobs.iter().map(|job| job.meta.id).collect();
        let key = run.jobs[0].meta.cursor_key.as_deref();
        if let Some(key) = key {
            let mailbox = self.mailbox(key);
            let (name, cursor) = self.entry(key);
            assert_eq!((cursor.owner, cursor.halted), (None, false), "cursor {name} is free");
            let held = cursor.hold.is_some_and(|hold| mailbox.first() != Some(&hold));
            assert!(!held, "a held cursor waits for its job: {ids:?} of {mailbox:?}");
            assert_eq!(ids, mailbox[..ids.len()], "a run is the head of the mailbox");
            let owned = run.cursor.as_ref().expect("a run of a cursor owns it");
            assert_eq!((owned.version, owned.state.as_deref()), (cursor.version, cursor.state.as_deref()));
            cursor.owner = Some(token);
        }
        assert!(ids.len() <= if key.is_some() { longest } else { 1 });
        for id in ids {
            let job = self.jobs.get_mut(&id).expect("only live jobs are claimed");
            assert_eq!(job.at, At::Waiting);
            job.at = At::Running(token);
            job.attempt += 1;
            job.collapses = false;
        }
        self.leases.insert(token, lease);
    }

    pub fn entry(&mut self, key: &str) -> (&'static str, &mut Cursor) {
        let name = KEYS.iter().find(|k| **k == key).expect("a known key");
        (name, self.cursors.entry(name).or_default())
    }

    /// An attempt ended: what becomes of the job. True if it is a failure.
    pub fn ended(&mut self, id: i64, outcome: Settled, lost: bool, scheduled: bool) -> bool {
        let job = self.jobs.get_mut(&id).expect("it ran");
        let again = !outcome.is_final()
            && !job.cancelled
            && !((outcome == Settled::Retry || lost) && job.attempt >= job.max_attempts)
            && !(lost && job.losses >= 2);
        if again {
            job.at = if scheduled { At::Scheduled } else { At::Waiting };
            job.attempt -= u16::from(matches!(outcome, Settled::Snooze | Settled::Release) && !lost);
            job.losses = match (lost, outcome) {
                (true, _) => job.losses + 1,
                (_, Settled::Release) => job.losses,
                _ => 0,
            };
            return false;
        }
        let failed = match outcome {
            Settled::Completed | Settled::Cancelled => false,
            Settled::Failed => true,
            _ => !job.cancelled,
        };
        let (key, halts) = (job.key, job.on_failure == OnFailure::Halt);
        self.jobs.remove(&id);
        if let Some(cursor) = key.and_then(|key| self.cursors.get_mut(key)) {
            cursor.halted |= failed && halts;
            cursor.hold = cursor.hold.filter(|hold| *hold != id);
        }
        failed
    }

    pub fn settled(&mut self, run: &EndedRun) {
        if let Some(fold) = &run.cursor {
            let held = run.jobs.iter().map(|job| (job.id, job.verdict.outcome)).collect::<BTreeMap<_, _>>();
            let (_, cursor) = self.entry(&fold.cursor.key);
            cursor.owner = None;
            cursor.version = fold.version;
            cursor.state = fold.state.as_deref().map(str::to_owned).or(cursor.state.take());
            cursor.hold = fold.hold.or(cursor.hold.filter(|hold| held.get(hold) == Some(&Settled::Release)));
        }
        for job in &run.jobs {
            let scheduled = job.verdict.delay.is_some_and(|delay| !delay.is_zero());
            self.ended(job.id, job.verdict.outcome, false, scheduled);
        }
    }

    /// The jobs of these tokens go back, lost or released.
    pub fn given_back(&mut self, which: impl Fn(i64, &Job) -> bool, lost: bool) {
        let ids: Vec<i64> = self
            .jobs
            .iter()
            .filter(|(_, job)| matches!(job.at, At::Running(token) if which(token, job)))
            .map(|(id, _)| *id)
            .collect();
        for id in &ids {
            if let Some(key) = self.jobs[id].key {
                self.entry(key).1.owner = None;
            }
        }
        for id in ids {
            self.ended(id, Settled::Release, lost, false);
        }
    }

    pub fn remove(&mut self, id: i64) {
        if let Some(job) = self.jobs.remove(&id)
            && let Some(key) = job.key
        {
            let (_, cursor) = self.entry(key);
            cursor.hold = cursor.hold.filter(|hold| *hold != id);
        }
    }
}

pub const KEYS: [&str; 3] = ["a", "b", "c"];
