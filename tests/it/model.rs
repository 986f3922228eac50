//! A pure model of cursors beside the real thing: random sequences of everything that moves jobs are
//! applied to both, and after each step they must agree, and the protocol's invariants must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcue::cursor::Fold;
use pgcue::lifecycle::{Settled, Verdict};
use pgcue::store::{Claim, ClaimedRun, CursorVerb, EndedRun, Settlement};
use pgcue::{Collapse, NewJob, OnFailure, OnRetry};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::Client;

use crate::support::{Db, database, value};

/// Each query must find nothing.
const INVARIANTS: &[(&str, &str)] = &[
    ("a plain job is never blocked", "select id from jobs where cursor_key is null and stage = 'blocked'"),
    (
        "the head of a free cursor is in the line, or held back by a scheduled one",
        "select c.key from cursors c cross join lateral (
           (select m.stage from jobs m where m.id = c.hold) union all
           (select m.stage from jobs m where m.queue = c.queue and m.cursor_key = c.key and m.stage <> 'scheduled'
             order by -(m.priority::int), m.expected_at, m.id limit 1) limit 1) h
         where c.owner is null and c.halted_at is null and h.stage = 'blocked'",
    ),
    (
        "no waiting job but the held one stands before the mark, or before the next one",
        "select j.id from jobs j join cursors c on c.queue = j.queue and c.key = j.cursor_key
         cross join lateral (select case when c.owner is null then c.mark else c.next_mark end as mark) m
         where j.stage <> 'scheduled' and j.token is null and j.id is distinct from c.hold
           and -(j.priority::int) = (m.mark).rank and j.expected_at = (m.mark).expected_at and j.id < (m.mark).id",
    ),
    (
        "an owner is an open claim",
        "select key from cursors where owner is not null and owner not in (select token from claims)",
    ),
    (
        "one owner: running jobs of a cursor have its owner's token",
        "select j.id from jobs j join cursors c on c.queue = j.queue and c.key = j.cursor_key
         where j.token is not null and j.token is distinct from c.owner",
    ),
    (
        "a claim is open as long as jobs run under it",
        "select c.token from claims c where c.open <> (select count(*) from jobs j where j.token = c.token)",
    ),
    (
        "no job runs without a claim",
        "select id from jobs where token is not null and token not in (select token from claims)",
    ),
    (
        "versions are 1..n",
        "select cursor_key from finished_jobs where cursor_version is not null group by queue, cursor_key
         having max(cursor_version) <> count(*) or count(distinct cursor_version) <> count(*)",
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Waiting,
    Scheduled,
    Running(i64),
}

#[derive(Debug, Clone)]
struct Job {
    key: Option<&'static str>,
    priority: i16,
    on_retry: OnRetry,
    on_failure: OnFailure,
    max_attempts: u16,
    collapses: bool,
    at: At,
    attempt: u16,
    losses: u16,
    cancelled: bool,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Cursor {
    owner: Option<i64>,
    hold: Option<i64>,
    halted: bool,
    version: i64,
    state: Option<String>,
}

#[derive(Default)]
struct Model {
    jobs: BTreeMap<i64, Job>,
    cursors: BTreeMap<&'static str, Cursor>,
    /// Which lease a token belongs to.
    leases: BTreeMap<i64, i64>,
}

impl Model {
    /// The jobs of a cursor in the order in which they must run.
    fn mailbox(&self, key: &str) -> Vec<i64> {
        let hold = self.cursors.get(key).and_then(|cursor| cursor.hold);
        let mine = |job: &Job| job.key == Some(key) && job.at == At::Waiting;
        let mut ids: Vec<i64> = self.jobs.iter().filter(|(_, job)| mine(job)).map(|(id, _)| *id).collect();
        ids.sort_by_key(|id| (hold != Some(*id), -i32::from(self.jobs[id].priority), *id));
        ids
    }

    /// A claim brought this run: may it have?
    fn claimed(&mut self, run: &ClaimedRun, token: i64, lease: i64, longest: usize) {
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

    fn entry(&mut self, key: &str) -> (&'static str, &mut Cursor) {
        let name = KEYS.iter().find(|k| **k == key).expect("a known key");
        (name, self.cursors.entry(name).or_default())
    }

    /// An attempt ended: what becomes of the job. True if it is a failure.
    fn ended(&mut self, id: i64, outcome: Settled, lost: bool, scheduled: bool) -> bool {
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

    fn settled(&mut self, run: &EndedRun) {
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
    fn given_back(&mut self, which: impl Fn(i64, &Job) -> bool, lost: bool) {
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

    fn remove(&mut self, id: i64) {
        if let Some(job) = self.jobs.remove(&id)
            && let Some(key) = job.key
        {
            let (_, cursor) = self.entry(key);
            cursor.hold = cursor.hold.filter(|hold| *hold != id);
        }
    }
}

const KEYS: [&str; 3] = ["a", "b", "c"];

/// The model and the database, side by side.
struct Walk {
    db: Db,
    sql: Client,
    model: Model,
    random: StdRng,
    running: Vec<ClaimedRun>,
    stale: Vec<ClaimedRun>,
    steps: i64,
}

impl Walk {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.random.random_range(0..from.len())]
    }

    async fn enqueue(&mut self) {
        let key = self.pick(&[Some("a"), Some("b"), Some("c"), None]);
        let collapse = key.is_some() && self.random.random_range(0..4) == 0;
        for _ in 0..self.random.random_range(1..5) {
            let mut made = Job {
                key,
                priority: self.pick(&[-1, 0, 0, 1]),
                on_retry: self.pick(&[OnRetry::Hold, OnRetry::Hold, OnRetry::Pass]),
                on_failure: self.pick(&[OnFailure::Continue, OnFailure::Continue, OnFailure::Halt]),
                max_attempts: self.pick(&[2, 5, 25]),
                collapses: collapse,
                at: At::Waiting,
                attempt: 0,
                losses: 0,
                cancelled: false,
            };
            let mut job = NewJob::new("walk", "{}")
                .priority(made.priority)
                .on_retry(made.on_retry)
                .on_failure(made.on_failure)
                .max_attempts(made.max_attempts);
            job = key.into_iter().fold(job, NewJob::cursor);
            if collapse {
                job = job.collapse(Collapse::Merge);
            }
            if self.random.random_range(0..8) == 0 {
                job = job.delay(Duration::from_micros(1));
                made.at = At::Scheduled;
            }
            let enqueued = self.db.client.enqueue(job).await.unwrap();
            let waits = self.model.jobs.iter().find(|(_, job)| collapse && job.key == key && job.collapses);
            assert_eq!(waits.map(|(id, _)| *id), enqueued.collapsed.then_some(enqueued.id), "one waits at most");
            match self.model.jobs.get_mut(&enqueued.id) {
                Some(_) => {} // of a cursor: its new time is found by promote
                None => drop(self.model.jobs.insert(enqueued.id, made)),
            }
        }
    }

    async fn claim(&mut self, lease: i64, max_jobs: usize, run_length: usize) {
        let token = self.steps + 1000;
        self.sql
            .execute(
                "select begin_lease($1, 'walk', '1 h') where not exists (select from leases where id = $1 and dead_at is null)",
                &[&lease],
            )
            .await
            .unwrap();
        let claim = Claim {
            lease,
            token,
            queue: &Arc::from("default"),
            kinds: &[Arc::from("walk")],
            max_jobs,
            run_length,
            longest_run: run_length * 2,
            to_park: self.random.random_range(0..10),
            marks: &[],
        };
        let claimed = self.db.store.claim(&claim).await.unwrap();
        assert!(claimed.jobs() <= max_jobs);
        for run in claimed.runs {
            self.model.claimed(&run, token, lease, run_length * 2);
            self.running.push(run);
        }
    }

    /// End a run as a node does.
    async fn settle(&mut self, run: ClaimedRun, outcomes: &[Settled]) -> bool {
        let mut ended = EndedRun { queue: "default".into(), cursor: run.cursor.map(Fold::new), jobs: Vec::new() };
        let mut goes_on = true;
        for job in run.jobs {
            let outcome = if goes_on { self.pick(outcomes) } else { Settled::Release };
            let mut verdict = Verdict { outcome, ..Verdict::default() };
            if !outcome.is_final() && outcome != Settled::Release {
                verdict.delay = Some(self.pick(&[Duration::ZERO, Duration::from_micros(1)]));
            }
            if outcome.is_final() && (outcome == Settled::Completed || self.random.random_range(0..3) == 0) {
                verdict.state = Some(format!("[{}]", job.meta.id)).filter(|_| self.random.random_range(0..4) > 0);
            }
            if outcome == Settled::Retry && job.meta.attempt >= job.meta.max_attempts {
                verdict.outcome = Settled::Failed; // as `judge` does
            }
            let step =
                ended.cursor.as_mut().map(|fold| fold.ended(job.meta.id, &verdict, job.on_retry, job.on_failure));
            goes_on = step.is_none_or(|step| step.goes_on);
            ended.jobs.push(Settlement {
                id: job.meta.id,
                kind: "walk".into(),
                token: job.token,
                tid: job.tid,
                verdict,
                started: Instant::now(),
                ran: None,
                snapshot: None,
                version: step.and_then(|step| step.version),
            });
        }
        let refused: BTreeSet<i64> = self.db.store.settle(&[ended.clone()]).await.unwrap().into_iter().collect();
        let running = |job: &Settlement| self.model.jobs.get(&job.id).is_some_and(|j| j.at == At::Running(job.token));
        let stale: BTreeSet<i64> = ended.jobs.iter().filter(|job| !running(job)).map(|job| job.id).collect();
        assert_eq!(refused, stale, "refused are those that do not run under this token");
        let valid = stale.is_empty();
        if valid {
            self.model.settled(&ended);
        }
        valid
    }

    async fn step(&mut self) -> &'static str {
        self.steps += 1;
        match self.random.random_range(0..20) {
            0..5 => {
                self.enqueue().await;
                "enqueue"
            }
            5..10 => {
                let (max, length) = (self.random.random_range(1..8), self.random.random_range(1..5));
                let lease = self.random.random_range(1..3);
                self.claim(lease, max, length).await;
                "claim"
            }
            10..13 if !self.running.is_empty() => {
                let run = self.running.swap_remove(self.random.random_range(0..self.running.len()));
                self.stale.push(ClaimedRun { cursor: run.cursor.clone(), jobs: run.jobs.clone() });
                let outcomes = [
                    Settled::Completed,
                    Settled::Completed,
                    Settled::Completed,
                    Settled::Failed,
                    Settled::Cancelled,
                    Settled::Retry,
                    Settled::Snooze,
                    Settled::Release,
                ];
                self.settle(run, &outcomes).await;
                "settle"
            }
            13 if !self.stale.is_empty() => {
                let ghost = self.stale.swap_remove(self.random.random_range(0..self.stale.len()));
                assert!(!self.settle(ghost, &[Settled::Completed]).await, "a ghost is refused");
                "a ghost's settle"
            }
            14 => {
                let ids: Vec<i64> = self.model.jobs.keys().copied().collect();
                if ids.is_empty() {
                    return "nothing";
                }
                let id = self.pick(&ids);
                let runs = matches!(self.model.jobs[&id].at, At::Running(_));
                let answer = self.db.store.cancel(id).await.unwrap();
                assert_eq!(answer.as_deref(), Some(if runs { "requested" } else { "cancelled" }));
                if runs {
                    self.model.jobs.get_mut(&id).unwrap().cancelled = true;
                } else {
                    self.model.remove(id);
                }
                "cancel"
            }
            15 => {
                let expire = "update leases set ttl = '0', expires_at = now() - interval '1 s' where id = 1";
                self.sql.batch_execute(expire).await.unwrap();
                self.db.store.reap().await.unwrap();
                let leases = self.model.leases.clone();
                self.model.given_back(|token, _| leases[&token] == 1, true);
                "reap"
            }
            16 => self.operate().await,
            17 => {
                let see = self.db.store.move_horizon(&Default::default()).await.unwrap();
                self.db.store.move_horizon(&see).await.unwrap();
                "the horizon"
            }
            _ => {
                self.db.store.promote(100).await.unwrap();
                for job in self.model.jobs.values_mut().filter(|job| job.at == At::Scheduled) {
                    job.at = At::Waiting;
                }
                "promote"
            }
        }
    }

    /// What operators do, to a cursor that exists.
    async fn operate(&mut self) -> &'static str {
        let key = self.pick(&KEYS);
        let Some(cursor) = self.model.cursors.get(key).cloned() else { return "nothing" };
        let verb = self.pick(&[
            CursorVerb::Halt,
            CursorVerb::Resume,
            CursorVerb::Resume,
            CursorVerb::Release,
            CursorVerb::Skip,
        ]);
        let answer = self.db.store.cursor(verb, "default", key).await;
        match verb {
            CursorVerb::Halt => self.model.entry(key).1.halted = true,
            CursorVerb::Resume => self.model.entry(key).1.halted = false,
            CursorVerb::Release => self.model.given_back(|_, job| job.key == Some(key), false),
            CursorVerb::Skip if cursor.owner.is_some() => {
                assert!(answer.unwrap_err().to_string().contains("is owned"));
                return "skip of an owned cursor";
            }
            _ => {
                let head = cursor.hold.or(self.model.mailbox(key).first().copied());
                assert_eq!(answer.unwrap(), head, "the head of {key} is skipped");
                head.into_iter().for_each(|id| self.model.remove(id));
            }
        }
        "an operator"
    }

    /// The database says what the model says.
    async fn compare(&mut self, what: &str) {
        for (name, query) in INVARIANTS {
            let found = self.sql.query(*query, &[]).await.unwrap();
            assert!(found.is_empty(), "{name}: broken by {what}: {found:?}");
        }
        let rows =
            self.sql.query("select id, stage::text, token, attempt, losses from jobs order by id", &[]).await.unwrap();
        let read = |row: &tokio_postgres::Row| {
            let at = match (row.get::<_, Option<i64>>(2), row.get::<_, &str>(1)) {
                (Some(token), _) => At::Running(token),
                (None, "scheduled") => At::Scheduled,
                _ => At::Waiting,
            };
            (row.get::<_, i64>(0), at, row.get::<_, i16>(3) as u16, row.get::<_, i16>(4) as u16)
        };
        let real: Vec<_> = rows.iter().map(read).collect();
        let ideal: Vec<_> = self.model.jobs.iter().map(|(id, job)| (*id, job.at, job.attempt, job.losses)).collect();
        assert_eq!(real, ideal, "jobs after {what}");
        let query = "select key, owner, hold, halted_at is not null, version, state::text from cursors order by key";
        for row in self.sql.query(query, &[]).await.unwrap() {
            let real = Cursor {
                owner: row.get(1),
                hold: row.get(2),
                halted: row.get(3),
                version: row.get(4),
                state: row.get(5),
            };
            assert_eq!(&real, self.model.entry(row.get(0)).1, "cursor {} after {what}", row.get::<_, &str>(0));
        }
    }

    /// Let everything run; nothing may be left.
    async fn drain(&mut self, seed: u64) {
        for key in KEYS {
            let _ = self.db.store.cursor(CursorVerb::Resume, "default", key).await;
            self.model.entry(key).1.halted = false;
        }
        for round in 0.. {
            self.steps += 1;
            for run in std::mem::take(&mut self.running) {
                self.settle(run, &[Settled::Completed]).await;
            }
            self.compare(&format!("round {round} of draining seed {seed}")).await;
            if self.model.jobs.is_empty() {
                break;
            }
            assert!(round < 500, "seed {seed}: stuck with {:?}, {:?}", self.model.jobs, self.model.cursors);
            self.db.store.promote(100).await.unwrap();
            for job in self.model.jobs.values_mut().filter(|job| job.at == At::Scheduled) {
                job.at = At::Waiting;
            }
            self.claim(3, 20, 5).await;
        }
        assert_eq!(value::<i64>(&self.sql, "select count(*) from claims").await, 0, "seed {seed}: no claim is left");
    }
}

async fn walk(seed: u64, steps: usize) {
    let db = database().await;
    let mut walk = Walk {
        sql: db.sql().await,
        db,
        model: Model::default(),
        random: StdRng::seed_from_u64(seed),
        running: Vec::new(),
        stale: Vec::new(),
        steps: 0,
    };
    for step in 0..steps {
        let what = walk.step().await;
        walk.compare(&format!("{what}, step {step} of seed {seed}")).await;
    }
    walk.drain(seed).await;
}

#[actix::test]
async fn database_and_model_agree_after_every_step() {
    let (seeds, steps) = if std::env::var_os("LONG_TESTS").is_some() { (100, 500) } else { (8, 250) };
    for seed in 0..seeds {
        walk(seed, steps).await;
    }
}
