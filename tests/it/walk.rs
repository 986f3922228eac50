//! Random sequences of everything that moves jobs, applied to the pure model and to PostgreSQL: after each
//! step they must agree, and the protocol's invariants must hold.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pgcue::lifecycle::{Settled, Verdict};
use pgcue::store::{Claim, ClaimedRun, CursorVerb, EndedRun, Settlement};
use pgcue::{Collapse, NewJob, OnFailure, OnRetry};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::Client;

use crate::model::{At, Cursor, Job, KEYS, Model};
use crate::support::{Db, database, value};

/// What `verify` cannot promise of every snapshot: a job that is promoted at the instant of a claim may stand
/// before the mark until a claim meets it in the line. Here nothing happens at the same instant.
const BEFORE_THE_MARK: &str = "select j.id from jobs j join cursors c on c.queue = j.queue and c.key = j.cursor_key
     cross join lateral (select case when c.owner is null then c.mark else c.next_mark end as mark) m
     where j.stage <> 'scheduled' and j.token is null and j.id is distinct from c.hold
       and -(j.priority::int) = (m.mark).rank and j.expected_at = (m.mark).expected_at and j.id < (m.mark).id";

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
        let mut ended = EndedRun::new("default".into(), run.cursor, run.jobs.len());
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
            goes_on = ended.end(job, verdict, None, 0);
        }
        let refused = self.db.store.settle(&[ended.clone()]).await.unwrap();
        let refused: BTreeSet<i64> = refused.iter().map(|place| ended.jobs[*place].id).collect();
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
        assert_eq!(self.db.store.verify().await.unwrap(), [], "after {what}");
        let found = self.sql.query(BEFORE_THE_MARK, &[]).await.unwrap();
        assert!(found.is_empty(), "before the mark after {what}: {found:?}");
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
