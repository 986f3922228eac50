//! The checker: it finds nothing where nodes are killed all the time, and each guard that is taken out of
//! the protocol makes it find something.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgcue::NewJob;
use pgcue::checker::{Checker, Rule, Violation, read_effects};
use pgcue::lifecycle::{Settled, Verdict};
use pgcue::store::{Claim, ClaimedRun, EndedRun};
use serde_json::{Value, json};

use crate::crashes::{jobs, node, stop};
use crate::support::{Db, database, value};

/// The state of `append`.
fn appended(state: Option<&Value>, payload: &Value) -> Option<Value> {
    let mut all = state.and_then(Value::as_array).cloned().unwrap_or_default();
    all.push(payload["n"].clone());
    Some(Value::Array(all))
}

async fn check(db: &Db, record: Option<&std::path::Path>) -> Vec<Violation> {
    let effects = record.map(|path| read_effects(path).unwrap());
    Checker { fold: Some(&appended), effects, strict_order: true }.check(&db.store).await.unwrap()
}

/// `n` jobs over some cursors, enqueued by eight clients (each has its own cursors), drained by three
/// processes of which one is killed and restarted all the time.
async fn killed_all_the_time(cursors: i64, n: i64, fail_rate: f64) {
    let db = database().await;
    let directory = tempfile::tempdir().unwrap();
    let record = directory.path().join("effects");
    let job = |n: i64| {
        let payload = json!({"n": n, "fail_rate": fail_rate, "record": record});
        NewJob::new("append", payload.to_string()).cursor(format!("k{}", n % cursors)).max_attempts(1000)
    };
    let clients = (0..cursors.min(8)).map(|client| {
        let (db, job) = (&db, &job);
        async move {
            for n in (0..n).filter(|n| n % cursors % 8 == client) {
                db.client.enqueue(job(n)).await.unwrap();
            }
        }
    });
    let sql = db.sql().await;
    let nodes = async {
        let mut nodes: Vec<_> = (0..3).map(|_| node(&db)).collect();
        let (begin, mut kills) = (Instant::now(), 0);
        loop {
            tokio::time::sleep(Duration::from_millis(if n > 10_000 { 3000 } else { 1500 })).await;
            let left = value::<i64>(&sql, "select count(*) from jobs").await;
            let done = value::<i64>(&sql, "select count(*) from finished_jobs").await;
            if left == 0 && done >= n {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(280), "{left} left after {kills} kills");
            if kills as i64 == jobs(6, 1000) {
                continue; // enough; on a slow machine it would go on for ever
            }
            let mut victim = std::mem::replace(&mut nodes[kills % 3], node(&db));
            victim.kill().unwrap();
            victim.wait().unwrap();
            kills += 1;
        }
        for node in nodes {
            assert!(stop(node).await.success());
        }
        kills
    };
    let (_, kills) = tokio::join!(futures_util::future::join_all(clients), nodes);
    let lost: i64 = value(&sql, "select count(*) from finished_jobs where losses > 0").await;
    let attempts: i64 = value(&sql, "select sum(attempt)::bigint from finished_jobs").await;
    let quarantined: Vec<i64> = sql
        .query("select (payload->>'n')::bigint from finished_jobs where state = 'lost'", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    println!(
        "{n} jobs over {cursors} cursors, {kills} kills, {lost} lost and run again, {attempts} attempts, quarantined: {quarantined:?}"
    );
    // A job that was running alone on two nodes that were killed, and on one before, is set aside as poison.
    assert!(quarantined.len() as i64 <= n / 1000 + 1, "{quarantined:?}");
    assert!(kills > 0, "a fault must have been injected");
    assert_eq!(check(&db, Some(&record)).await, []);
    let mut expected: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    (0..n)
        .filter(|n| !quarantined.contains(n))
        .for_each(|n| expected.entry(format!("k{}", n % cursors)).or_default().push(n));
    for row in sql.query("select key, state from cursors", &[]).await.unwrap() {
        assert_eq!(row.get::<_, Value>(1), json!(expected[row.get::<_, &str>(0)]), "each number once, in order");
    }
}

#[actix::test]
async fn two_hundred_cursors_keep_their_order_while_nodes_are_killed() {
    killed_all_the_time(jobs(40, 200), jobs(4000, 20_000), 0.0).await;
}

#[actix::test]
async fn one_cursor_keeps_its_order_while_nodes_are_killed_and_attempts_fail() {
    killed_all_the_time(1, jobs(500, 5000), 0.1).await;
}

/// Take a guard out of a function of the protocol.
async fn without(sql: &tokio_postgres::Client, function: &str, guard: &str, instead: &str) {
    let query = "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'pgcue' and p.proname = $1 order by p.pronargs desc limit 1";
    let text: String = sql.query_one(query, &[&function]).await.unwrap().get(0);
    assert!(text.contains(guard), "{function} has the guard {guard}");
    sql.batch_execute(&text.replace(guard, instead)).await.unwrap();
}

/// Two nodes that take turns on one cursor, as a slow one and its successor would.
struct Nodes<'a> {
    db: &'a Db,
    tokens: i64,
}

impl Nodes<'_> {
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
        self.db.store.claim(&claim).await.unwrap().runs.into_iter().next()
    }

    /// Complete the jobs of a run, or let its first one retry.
    async fn settle(&self, run: &ClaimedRun, retry: bool) {
        let mut ended = EndedRun::new("default".into(), run.cursor.clone(), run.jobs.len());
        for job in &run.jobs {
            let state = ended.cursor.as_ref().unwrap().current().map(|state| serde_json::from_str(state).unwrap());
            let new = appended(state.as_ref(), &serde_json::from_str(&job.payload).unwrap());
            let mut verdict = Verdict { state: new.map(|new| new.to_string()), ..Verdict::default() };
            if retry {
                verdict =
                    Verdict { outcome: Settled::Retry, delay: Some(Duration::from_micros(1)), ..Verdict::default() };
            }
            ended.end(job.clone(), verdict, None, 0);
        }
        self.db.store.settle(&[ended]).await.unwrap();
    }

    /// Everything that can still happen to a cursor in two nodes' hands: a ghost settles late, twice; a
    /// second node tries to claim what the first one runs; a job retries.
    async fn story(&mut self) {
        let sql = self.db.sql().await;
        sql.batch_execute("select begin_lease(1, 'slow', '1 h'), begin_lease(2, 'quick', '1 h')").await.unwrap();
        let job = |n: i64| NewJob::new("append", json!({"n": n}).to_string()).cursor("k");
        self.db.client.enqueue(job(0).cursor("another")).await.unwrap();
        let another = self.claim(1, 1).await.unwrap();
        self.settle(&another, false).await;
        self.db.client.enqueue_many((1..=6).map(job)).await.unwrap();
        // The slow node takes two, falls silent, and its jobs go to the quick one.
        let ghost = self.claim(1, 2).await.unwrap();
        let end = "update leases set ttl = '0', expires_at = now() - interval '1 s' where id = 1; select reap();
            select begin_lease(3, 'slow again', '1 h')";
        sql.batch_execute(end).await.unwrap();
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
        self.db.client.enqueue(job(7)).await.unwrap();
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
        for _ in 0..20 {
            self.db.store.promote(10).await.unwrap();
            if let Some(run) = self.claim(2, 1).await {
                self.settle(&run, false).await;
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
                    "take_runs",
                    "and j.id is distinct from c.hold",
                    "and j.id is distinct from c.hold and j.token is null",
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
            &[("take_runs", "order by -(j.priority::int), j.expected_at, j.id limit", "order by j.id desc limit")],
            Rule::Drained,
        ),
        ("the version counts on", &[("let_go", "version = r.new_version", "version = c.version")], Rule::Versions),
    ];
    let story = async |guards: &[(&str, &str, &str)]| {
        let db = database().await;
        for (function, guard, instead) in guards {
            without(&db.sql().await, function, guard, instead).await;
        }
        Nodes { db: &db, tokens: 100 }.story().await;
        check(&db, None).await
    };
    assert_eq!(story(&[]).await, [], "with every guard in place");
    for (name, guards, rule) in guards {
        let found = story(guards).await;
        assert!(found.iter().any(|violation| violation.rule == *rule), "without the guard that {name}: {found:?}");
    }
}

#[actix::test]
async fn overlapping_and_missing_effects_are_found() {
    let db = database().await;
    let nodes = db.demo_node().await.start().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let record = directory.path().join("effects");
    let job = |n: i64| NewJob::new("append", json!({"n": n, "record": record}).to_string()).cursor("k");
    let last = db.client.enqueue_many((0..5).map(job)).await.unwrap()[4].id;
    db.reaches(last, "completed").await;
    nodes.drain().await.unwrap();
    assert_eq!(check(&db, Some(&record)).await, []);
    let mut effects = read_effects(&record).unwrap();
    let rules = async |effects: Vec<pgcue::checker::Effect>| {
        let checker = Checker { fold: Some(&appended), effects: Some(effects), strict_order: true };
        checker.check(&db.store).await.unwrap().iter().map(|v| v.rule).collect::<Vec<_>>()
    };
    assert_eq!(rules(effects[1..].to_vec()).await, [Rule::Effect], "the first begin is missing");
    effects[3].at += 1_000_000_000;
    assert_eq!(rules(effects).await, [Rule::Overlap], "the second job seems to have ended after the third began");
}

#[actix::test]
async fn an_empty_history_proves_nothing() {
    let db = database().await;
    assert!(Checker::default().check(&db.store).await.unwrap_err().to_string().contains("no finished job"));
}
