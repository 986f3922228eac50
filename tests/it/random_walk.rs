//! Random sequences of everything that moves jobs, over a few cursors and plain jobs, with the
//! protocol's invariants checked after every step, and everything drained at the end.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::Client;

use crate::support::{database, value};

/// Each query must find nothing.
const INVARIANTS: &[(&str, &str)] = &[
    ("a plain job is never blocked", "select id from jobs where cursor_key is null and stage = 'blocked'"),
    (
        "the head of a free cursor is in the line, or held back by a scheduled one",
        "select c.key from cursors c cross join lateral (
           (select m.stage from jobs m where m.id = c.hold) union all
           (select m.stage from jobs m where m.queue = c.queue and m.cursor_key = c.key and m.stage <> 'scheduled'
             order by m.priority desc, m.expected_at, m.id limit 1) limit 1) h
         where c.owner is null and h.stage = 'blocked'",
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

async fn check(sql: &Client, what: &str) {
    for (name, query) in INVARIANTS {
        let found = sql.query(*query, &[]).await.unwrap();
        assert!(found.is_empty(), "{name}: broken by {what}");
    }
}

/// A run as it was claimed: token, ids, cursor.
type Run = (i64, Vec<i64>, Option<String>);

async fn claim(sql: &Client, lease: i64, token: i64, max: i32, run_length: i32) -> Vec<Run> {
    sql.execute(
        "select begin_lease($1, 'walk', '1 h') where not exists (select from leases where id = $1 and dead_at is null)",
        &[&lease],
    )
    .await
    .unwrap();
    let query =
        "select id, cursor_key from claim_lanes($1, $2, 'default', null, $3, $4, '{}', '{}') where id is not null";
    let mut runs: Vec<Run> = Vec::new();
    for row in sql.query(query, &[&lease, &token, &max, &run_length]).await.unwrap() {
        let (id, key): (i64, Option<String>) = (row.get(0), row.get(1));
        match runs.last_mut() {
            Some(run) if key.is_some() && run.2 == key => run.1.push(id),
            _ => runs.push((token, vec![id], key)),
        }
    }
    runs
}

/// End a run as a node does: in order, up to the first job that runs again; the rest is given back.
async fn settle(sql: &Client, (token, ids, _): Run, outcomes: &[&str]) {
    let mut over = false;
    let outcomes: Vec<&str> = (0..ids.len())
        .map(|n| {
            let outcome = if over { "release" } else { outcomes[n % outcomes.len()] };
            over |= ["retry", "snooze", "release"].contains(&outcome);
            outcome
        })
        .collect();
    let tokens = vec![token; ids.len()];
    let states: Vec<Option<String>> = ids.iter().map(|id| Some(id.to_string())).collect();
    let delays = vec![0f64; ids.len()];
    let call = "select settle(null::tid[], $1, $2, $3::text[], null, null, $4, null, null, $5::text[])";
    sql.query(call, &[&ids, &tokens, &outcomes, &delays, &states]).await.unwrap();
}

async fn walk(seed: u64, steps: usize) {
    let db = database().await;
    let sql = db.sql().await;
    let mut random = StdRng::seed_from_u64(seed);
    let mut running: Vec<Run> = Vec::new();
    for step in 0..steps {
        let token = 1000 + step as i64;
        let what = match random.random_range(0..10) {
            0..3 => {
                let key = ["'a'", "'b'", "'c'", "null"][random.random_range(0..4)];
                let (n, priority) = (random.random_range(1..6), random.random_range(-1..2));
                let jobs = format!(
                    "select enqueue_many('walk', array_fill('1'::json, array[{n}]), cursor_key => {key}, priority => {priority})"
                );
                sql.batch_execute(&jobs).await.unwrap();
                "enqueue"
            }
            3..6 => {
                let (max, length) = (random.random_range(1..8), random.random_range(1..5));
                running.extend(claim(&sql, random.random_range(1..3), token, max, length).await);
                "claim"
            }
            6..8 if !running.is_empty() => {
                let run = running.swap_remove(random.random_range(0..running.len()));
                let outcome = || ["completed", "completed", "failed", "cancelled", "retry", "snooze", "release"];
                let outcomes: Vec<&str> = (0..3).map(|_| outcome()[random.random_range(0..7)]).collect();
                settle(&sql, run, &outcomes).await;
                "settle"
            }
            8 => {
                let some = "select cancel(id) from (select id from jobs order by random() limit 1) j";
                sql.batch_execute(some).await.unwrap();
                "cancel"
            }
            9 if random.random_range(0..3) == 0 => {
                sql.batch_execute(
                    "update leases set ttl = '0', expires_at = now() - interval '1 s' where id = 1; select reap()",
                )
                .await
                .unwrap();
                "reap"
            }
            _ => {
                sql.batch_execute("select promote(10)").await.unwrap();
                "promote"
            }
        };
        check(&sql, &format!("{what}, step {step} of seed {seed}")).await;
    }
    for run in running {
        settle(&sql, run, &["completed"]).await;
    }
    for token in 1_000_000..1_001_000 {
        if value::<i64>(&sql, "select count(*) from jobs").await == 0 {
            break;
        }
        sql.batch_execute("select promote(100)").await.unwrap();
        for run in claim(&sql, 3, token, 20, 5).await {
            settle(&sql, run, &["completed"]).await;
        }
        check(&sql, &format!("draining after seed {seed}")).await;
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0, "seed {seed}: everything drains");
    assert_eq!(value::<i64>(&sql, "select count(*) from claims").await, 0, "seed {seed}: no claim is left");
}

#[actix::test]
async fn every_step_keeps_the_invariants() {
    let seeds = if std::env::var_os("LONG_TESTS").is_some() { 100 } else { 4 };
    for seed in 0..seeds {
        walk(seed, 120).await;
    }
}
