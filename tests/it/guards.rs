//! Each guard of the protocol has a story in which it matters: with the guard every promise is kept, and without
//! it the checker or `verify` finds which one is broken.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcue::checker::{Checker, Rule, Violation};
use pgcue::lifecycle::{Settled, Verdict};
use pgcue::record::{Entry, Event, Fate};
use pgcue::store::{Claim, ClaimedRun, EndedRun};
use pgcue::{Config, NewJob};
use serde_json::{Value, json};

use crate::support::{Db, database, value};

/// The state of `append`.
fn appended(state: Option<&Value>, payload: &Value) -> Option<Value> {
    let mut all = state.and_then(Value::as_array).cloned().unwrap_or_default();
    all.push(payload["n"].clone());
    Some(Value::Array(all))
}

pub async fn check(db: &Db, record: Vec<Entry>) -> Vec<Violation> {
    Checker { fold: Some(&appended), record: Some(record), strict_order: true }.check(&db.store).await.unwrap()
}

/// Take a guard out of a function of the protocol.
pub async fn without(sql: &tokio_postgres::Client, function: &str, guard: &str, instead: &str) {
    let query = "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'pgcue' and p.proname = $1 order by p.pronargs desc limit 1";
    let text: String = sql.query_one(query, &[&function]).await.unwrap().get(0);
    assert!(text.contains(guard), "{function} has the guard {guard}");
    sql.batch_execute(&text.replace(guard, instead)).await.unwrap();
}

/// Two nodes that take turns, as a slow one and its successor would, and a record of what they do.
pub struct Nodes<'a> {
    db: &'a Db,
    tokens: i64,
    clock: Cell<u64>,
    record: RefCell<Vec<Entry>>,
}

impl<'a> Nodes<'a> {
    pub fn new(db: &'a Db) -> Self {
        Nodes { db, tokens: 100, clock: Cell::default(), record: RefCell::default() }
    }

    pub fn record(self) -> Vec<Entry> {
        self.record.into_inner()
    }

    fn note(&self, event: Event) {
        self.clock.set(self.clock.get() + 60_000_000_000); // a minute
        self.record.borrow_mut().push(Entry { at: self.clock.get(), process: 1, event });
    }

    async fn enqueue(&self, key: &str, numbers: impl IntoIterator<Item = i64>) {
        let numbers: Vec<i64> = numbers.into_iter().collect();
        let job = |n: &i64| {
            NewJob::new("append", json!({"key": n.to_string(), "n": n}).to_string()).cursor(key).max_attempts(4)
        };
        self.db.client.enqueue_many(numbers.iter().map(job)).await.unwrap();
        numbers.iter().for_each(|n| self.note(Event::Enqueued { key: n.to_string(), fate: Fate::Committed }));
    }

    async fn claim(&mut self, lease: i64, run_length: usize) -> Option<ClaimedRun> {
        self.tokens += 1;
        let claim = Claim {
            lease,
            token: self.tokens,
            queue: &Arc::from("default"),
            kinds: &[Arc::from("append")],
            max_jobs: 10,
            run_length,
            longest_run: run_length,
            to_park: 100,
            marks: &[],
        };
        let run = self.db.store.claim(&claim).await.ok()?.runs.into_iter().next()?;
        for job in &run.jobs {
            self.note(Event::Started { job: job.meta.id, attempt: job.meta.attempt, token: job.token });
        }
        Some(run)
    }

    /// Complete the jobs of a run, or let its first one retry.
    async fn settle(&self, run: &ClaimedRun, retry: bool) {
        let mut ended = EndedRun::new("default".into(), run.cursor.clone(), run.jobs.len());
        for job in &run.jobs {
            let state = ended.cursor.as_ref().unwrap().current().map(|state| serde_json::from_str(state).unwrap());
            let new = appended(state.as_ref(), &serde_json::from_str(job.payload.as_deref().unwrap()).unwrap());
            let mut verdict = Verdict { state: new.map(|new| new.to_string()), ..Verdict::default() };
            if retry {
                verdict =
                    Verdict { outcome: Settled::Retry, delay: Some(Duration::from_micros(1)), ..Verdict::default() };
            }
            let (id, attempt, token) = (job.meta.id, job.meta.attempt, job.token);
            self.note(Event::Effect { job: id, attempt });
            self.note(Event::Ended { job: id, attempt, token, outcome: verdict.outcome.as_str().into() });
            ended.end(job.clone(), verdict, None, 0);
        }
        let (jobs, tokens) = ended.jobs.iter().map(|job| (job.id, job.token)).unzip();
        let outcomes = ended.jobs.iter().map(|job| job.verdict.outcome.as_str().into()).collect();
        let refused = self.db.store.settle(&[ended]).await.unwrap();
        self.note(Event::Settled { jobs, tokens, outcomes, refused });
    }

    /// Everything that can still happen to a cursor in two nodes' hands: a ghost settles late, twice; a
    /// second node tries to claim what the first one runs; a job retries, and fails for good.
    pub async fn story(&mut self) {
        let sql = self.db.sql().await;
        sql.batch_execute("select begin_lease(1, 'slow', '1 h'), begin_lease(2, 'quick', '1 h')").await.unwrap();
        self.enqueue("another", [0]).await;
        let another = self.claim(1, 1).await.unwrap();
        self.settle(&another, false).await;
        self.enqueue("k", 1..=6).await;
        // The slow node takes two, falls silent, and its jobs go to the quick one.
        let ghost = self.claim(1, 2).await.unwrap();
        self.note(Event::LeaseLost { lease: 1 });
        let expire = "update leases set ttl = '0', expires_at = now() - interval '1 s' where id = 1";
        sql.batch_execute(&format!("{expire}; select reap(); select begin_lease(3, 'slow again', '1 h')"))
            .await
            .unwrap();
        let first = self.claim(2, 1).await;
        self.settle(&ghost, false).await;
        if let Some(first) = first {
            self.settle(&first, false).await;
        }
        if let Some(second) = self.claim(2, 1).await {
            self.settle(&second, false).await;
        }
        // One that runs, while a new one arrives and the other node looks for work.
        let running = self.claim(2, 1).await;
        self.enqueue("k", [7]).await;
        let other = self.claim(3, 1).await;
        for run in [&running, &other].into_iter().flatten() {
            self.settle(run, false).await;
        }
        self.settle(&ghost, false).await;
        // One retries; the next must wait for it.
        if let Some(run) = self.claim(3, 1).await {
            self.settle(&run, true).await;
        }
        if let Some(run) = self.claim(2, 1).await {
            self.settle(&run, false).await;
        }
        self.drain(false).await;
        // One retries until it is out of attempts, though its node does not count.
        self.enqueue("stubborn", [8]).await;
        self.drain(true).await;
    }

    /// Run what there is, one after the other.
    async fn drain(&mut self, retry: bool) {
        for round in 0..20 {
            self.db.store.promote(10).await.unwrap();
            if let Some(run) = self.claim(2, 1).await {
                self.settle(&run, retry && round < 15).await;
            }
        }
    }
}

#[actix::test]
async fn each_guard_that_is_taken_out_is_missed() {
    // What is missed, where: (function, guard, instead), and what is broken then.
    type Guard<'a> = (&'a str, &'a [(&'a str, &'a str, &'a str)], Rule);
    let guards: &[Guard<'_>] = &[
        (
            "tokens fence jobs",
            &[("finish", "and j.token is not distinct from e.token", ""), ("settle", "and j.token = e.token", "")],
            Rule::Versions,
        ),
        (
            "owner and version fence the state",
            &[("let_go", "c.owner = r.token and c.version = r.version", "true")],
            Rule::State,
        ),
        (
            "an owned cursor is not claimed, and no run skips a running job",
            &[
                ("take_runs", "and c.owner is null", ""),
                (
                    "mailbox",
                    "and j.id is distinct from mailbox.hold",
                    "and j.id is distinct from mailbox.hold and j.token is null",
                ),
            ],
            Rule::Versions,
        ),
        ("a retrying job holds its cursor", &[("let_go", "when r.hold is not null then r.hold", "")], Rule::Order),
        (
            "letting go passes on",
            &[("settle", "perform pass_on(settle.run_queues, settle.run_keys);", "")],
            Rule::Drained,
        ),
        (
            "a run follows the mailbox",
            &[("mailbox", "order by -(j.priority::int), j.expected_at, j.id limit", "order by j.id desc limit")],
            Rule::Order,
        ),
        (
            "attempts are limited",
            &[("finish", "or e.outcome in ('retry', 'lost') and j.attempt >= j.max_attempts", "")],
            Rule::Attempts,
        ),
        ("the version counts on", &[("let_go", "version = r.new_version", "version = c.version")], Rule::Versions),
    ];
    let story = async |guards: &[(&str, &str, &str)]| {
        let db = database().await;
        for (function, guard, instead) in guards {
            without(&db.sql().await, function, guard, instead).await;
        }
        let mut nodes = Nodes::new(&db);
        nodes.story().await;
        check(&db, nodes.record()).await
    };
    assert_eq!(story(&[]).await, [], "with every guard in place");
    for (name, guards, rule) in guards {
        let found = story(guards).await;
        assert!(found.iter().any(|violation| violation.rule == *rule), "without the guard that {name}: {found:?}");
    }
}

/// A job that commits long after it drew its place in the line, while others came and went: a full
/// pass finds it. Without full passes it stays, so this test can fail.
#[actix::test]
async fn a_late_commit_is_found_by_full_passes_and_only_by_them() {
    for (full_passes, left) in [(false, 1), (true, 0)] {
        let db = database().await;
        let config = Config { demo: true, full_passes, poll: Duration::from_millis(100), ..db.config() };
        let node = pgcue::Node::new(config).await.unwrap().start().await.unwrap();
        let (late, sql) = (db.sql().await, db.sql().await);
        late.batch_execute("begin; insert into jobs (kind) values ('noop')").await.unwrap();
        let mut committed = Instant::now();
        for n in 0..60 {
            // The node reads on and on, far past the late one's place.
            let id = value(&sql, "insert into jobs (kind) values ('noop') returning id").await;
            db.reaches(id, "completed").await;
            if n == 50 {
                late.batch_execute("commit").await.unwrap();
                committed = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        let count = async || value::<i64>(&sql, "select count(*) from jobs").await;
        while count().await > left || committed.elapsed() < Duration::from_secs(2) {
            assert!(committed.elapsed() < Duration::from_secs(30), "full passes {full_passes}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(count().await, left, "full passes {full_passes}");
        node.drain().await.unwrap();
    }
}

/// A node lost its lease, got one of its jobs again, and settles both attempts in one call: one counts.
#[actix::test]
async fn one_call_may_settle_a_job_under_an_old_and_a_new_token() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "select enqueue('noop'), enqueue('noop'), begin_lease(1, 'slow', '1 h'), begin_lease(2, 'slow', '1 h')",
    )
    .await
    .unwrap();
    let claim = "select id from claim_lanes($1, $2, 'default', null, 2, 1, '{}', '{}') where id is not null";
    assert_eq!(sql.query(claim, &[&1i64, &10i64]).await.unwrap().len(), 2);
    // One of the old claim's jobs is locked, so that the claim outlives its lease.
    let holder = db.sql().await;
    holder.batch_execute("begin; select from jobs where id = 2 for update").await.unwrap();
    let expire = "update leases set ttl = '0', expires_at = now() - interval '1 s' where id = 1";
    sql.batch_execute(&format!("{expire}; select reap()")).await.unwrap();
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(sql.query(claim, &[&2i64, &11i64]).await.unwrap().len(), 1);
    let both = "select settle(array[null, null]::tid[], '{1,1}', '{10,11}', '{completed,completed}', null, null, null, null, null, null)";
    assert_eq!(value::<Vec<i64>>(&sql, both).await, [1], "the first place is refused");
    assert_eq!(db.store.verify().await.unwrap(), []);
    assert_eq!(db.job(1).await.state, "completed");
}

/// A producer draws its place and commits late, when the line has long gone on.
#[actix::test]
async fn a_floor_rises_past_a_late_commit_only_without_its_guard() {
    for guarded in [true, false] {
        let db = database().await;
        let (sql, producer) = (db.sql().await, db.sql().await);
        sql.batch_execute("select begin_lease(1, 'tester', '1 h', '{default}')").await.unwrap();
        if !guarded {
            without(&sql, "move_horizon", "if not writers && new_writers then", "if writers is not null then").await;
        }
        producer.batch_execute("begin; select enqueue('noop')").await.unwrap();
        sql.batch_execute("select setval('line', 500000)").await.unwrap();
        let raise = async || {
            let seen = db.store.move_horizon(&Default::default()).await.unwrap();
            db.store.move_horizon(&seen).await.unwrap();
            value::<i64>(&sql, "select coalesce(max(pos), 0) from floors").await
        };
        assert_eq!(raise().await > 0, !guarded);
        producer.batch_execute("commit").await.unwrap();
        let found = db.store.verify().await.unwrap();
        let claim = "select id from claim_lanes(1, 2, 'default', null, 1, 1, '{}', '{}') where id is not null";
        if !guarded {
            assert_eq!(found.iter().map(|f| &*f.rule).collect::<Vec<_>>(), ["stands before its floor"]);
            assert!(sql.query(claim, &[]).await.unwrap().is_empty(), "nobody reads there");
            assert!(db.store.repair(&found[0]).await.unwrap());
        }
        assert_eq!(db.store.verify().await.unwrap(), []);
        assert_eq!(sql.query(claim, &[]).await.unwrap().len(), 1);
        sql.batch_execute("select settle(1, 2)").await.unwrap();
        assert_eq!(raise().await, 500_000, "now nothing is before it");
    }
}
