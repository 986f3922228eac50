//! The rules of the SQL protocol, spoken from plain connections: who gets what, in which order, and
//! what a stale claim may still do (nothing).

use std::time::Duration;

use pgcue::RetryPolicy;
use pgcue::lifecycle::{End, Settled, judge};
use tokio_postgres::{Client, Row};

use crate::support::{Db, database, eventually, value};

/// Claim as a node does, under a lease that is begun if it is new. Job rows and lane rows apart.
async fn claim(
    sql: &Client,
    lease: i64,
    token: i64,
    max: i32,
    marks: Option<(&[i16], &[i64])>,
) -> (Vec<Row>, Vec<Row>) {
    sql.execute(
        "select begin_lease($1, 'test', '30 s') where not exists (select from leases where id = $1)",
        &[&lease],
    )
    .await
    .unwrap();
    let (lanes, marks) = marks.unwrap_or_default();
    let query = "select * from claim_lanes($1, $2, 'default', null, $3, 50, $4, $5)";
    let rows = sql.query(query, &[&lease, &token, &max, &lanes, &marks]).await.unwrap();
    let line: Vec<i64> = rows.iter().find_map(|row| row.get("in_order")).unwrap_or_default();
    let (mut jobs, heads): (Vec<Row>, Vec<Row>) =
        rows.into_iter().partition(|row| row.get::<_, Option<i64>>("id").is_some());
    jobs.sort_by_key(|row| line.iter().position(|id| *id == row.get::<_, i64>("id")));
    (jobs, heads)
}

fn ids(rows: &[Row]) -> Vec<i64> {
    rows.iter().map(|row| row.get("id")).collect()
}

async fn settle(sql: &Client, id: i64, token: i64, outcome: &str) -> Result<(), tokio_postgres::Error> {
    sql.batch_execute(&format!("select settle({id}, {token}, '{outcome}')")).await
}

async fn enqueue(sql: &Client, n: i32) -> Vec<i64> {
    let rows = sql.query("insert into jobs (kind) select 'noop' from generate_series(1, $1) returning id", &[&n]).await;
    ids(&rows.unwrap())
}

#[actix::test]
async fn jobs_are_claimed_by_priority_then_expected_at_then_arrival() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "insert into jobs (id, kind, priority, expected_at) overriding system value values
         (1, 'noop', 0, 'infinity'), (2, 'noop', 5, 'infinity'), (3, 'noop', -5, '2000-01-01'), (4, 'noop', 0, '2030-01-02'),
         (5, 'noop', 0, '2030-01-01'), (6, 'noop', 5, '2040-01-01'), (7, 'noop', 0, 'infinity')",
    )
    .await
    .unwrap();
    let (jobs, lanes) = claim(&sql, 1, 10, 100, None).await;
    assert_eq!(ids(&jobs), [6, 2, 5, 4, 1, 7, 3]);
    assert_eq!(lanes.iter().map(|l| l.get::<_, i16>("priority")).collect::<Vec<_>>(), [5, 0, -5]);
}

#[actix::test]
async fn concurrent_claimers_share_no_job_and_take_no_more_than_asked() {
    let db = database().await;
    let sql = db.sql().await;
    enqueue(&sql, 2000).await;
    let claimers = (0..4).map(|n| {
        let db = &db;
        async move {
            let sql = db.sql().await;
            let mut mine = Vec::new();
            let mut idle = 0;
            for token in 0.. {
                let (jobs, _) = claim(&sql, n, 1_000 * (n + 1) + token, 37, None).await;
                assert!(jobs.len() <= 37);
                idle = if jobs.is_empty() { idle + 1 } else { 0 };
                mine.extend(ids(&jobs));
                if idle == 20 {
                    break;
                }
            }
            mine
        }
    });
    let mut all: Vec<i64> = futures_util::future::join_all(claimers).await.concat();
    all.sort();
    assert_eq!(all, (1..=2000).collect::<Vec<_>>());
}

#[actix::test]
async fn a_claim_asks_for_kinds_and_skips_others() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute("select enqueue_many('foreign', array_fill('1'::json, array[50])); select enqueue('mine')")
        .await
        .unwrap();
    let rows = sql.query("select id, kind from claim('default', 10, '{mine}')", &[]).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, String>("kind"), "mine");
}

#[actix::test]
async fn a_stale_token_settles_nothing() {
    let db = database().await;
    let sql = db.sql().await;
    let id = enqueue(&sql, 1).await[0];
    claim(&sql, 1, 10, 1, None).await;
    let error = settle(&sql, id, 11, "completed").await.unwrap_err();
    assert!(error.as_db_error().unwrap().message().contains("is not running under this token"));
    // Lost and claimed again: the first token is as good as none.
    sql.batch_execute("update leases set expires_at = now() - interval '1 s', ttl = '0'; select reap()").await.unwrap();
    let (jobs, _) = claim(&sql, 2, 20, 1, None).await;
    assert_eq!(ids(&jobs), [id]);
    assert!(settle(&sql, id, 10, "completed").await.is_err());
    assert_eq!(db.job(id).await.state, "running");
    settle(&sql, id, 20, "completed").await.unwrap();
    assert!(settle(&sql, id, 20, "completed").await.is_err(), "only once");
    let job = db.job(id).await;
    assert_eq!((job.state.as_str(), job.attempt, job.losses), ("completed", 2, 1));
    assert_eq!(value::<i64>(&sql, "select count(*) from claims").await, 0);
}

#[actix::test]
async fn a_row_that_moved_while_it_ran_is_settled_by_its_id() {
    let db = database().await;
    let sql = db.sql().await;
    let id = enqueue(&sql, 1).await[0];
    let (jobs, _) = claim(&sql, 1, 10, 1, None).await;
    assert_eq!(jobs.len(), 1);
    let tid: String = value(&sql, "select ctid::text from jobs").await;
    sql.batch_execute("update jobs set headers = '{}'").await.unwrap();
    let refused: Vec<i64> = value(&sql, &format!(
        "select settle(array['{tid}'::tid], '{{{id}}}', '{{10}}', '{{completed}}', null, null, null, null, null, null)")).await;
    assert!(refused.is_empty());
    assert_eq!(db.job(id).await.state, "completed");
}

#[actix::test]
async fn only_enqueueing_works_in_any_isolation() {
    let db = database().await;
    let sql = db.sql().await;
    for call in ["select claim()", "select settle(1, 1)", "select cancel(1)", "select reap()"] {
        sql.batch_execute("begin isolation level repeatable read; select enqueue('noop')").await.unwrap();
        let error = sql.batch_execute(call).await.unwrap_err();
        assert_eq!(
            error.as_db_error().unwrap().message(),
            "pgcue: this call needs isolation level read committed, not repeatable read"
        );
        sql.batch_execute("rollback").await.unwrap();
    }
    sql.batch_execute("begin isolation level serializable; select enqueue('noop'); commit").await.unwrap();
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 1);
}

#[actix::test]
async fn a_dead_lease_claims_nothing_and_is_never_revived() {
    let db = database().await;
    let sql = db.sql().await;
    enqueue(&sql, 2).await;
    claim(&sql, 1, 10, 1, None).await;
    sql.batch_execute("update leases set expires_at = now() - interval '1 s', ttl = '0'").await.unwrap();
    let claim_again = "select claim_lanes(1, 11, 'default', null, 1, 1, '{}', '{}')";
    let code = |e: tokio_postgres::Error| e.code().unwrap().code().to_owned();
    assert_eq!(code(sql.batch_execute(claim_again).await.unwrap_err()), "PQ001");
    // The reaper waits for a claim that holds the lease, and marks it before it touches jobs.
    let other = db.sql().await;
    sql.batch_execute("begin; select from leases where id = 1 for key share").await.unwrap();
    assert_eq!(value::<i32>(&other, "select ended from reap()").await, 0, "a claim is in flight");
    sql.batch_execute("commit").await.unwrap();
    assert_eq!(value::<i32>(&other, "select ended from reap()").await, 1);
    assert!(!value::<bool>(&sql, "select alive from extend(1)").await);
    assert_eq!(code(sql.batch_execute(claim_again).await.unwrap_err()), "PQ001");
}

#[actix::test]
async fn the_reaper_leaves_locked_rows_for_later_and_says_so() {
    let db = database().await;
    let sql = db.sql().await;
    enqueue(&sql, 3).await;
    claim(&sql, 1, 10, 3, None).await;
    sql.batch_execute("update leases set expires_at = now() - interval '1 s', ttl = '0'").await.unwrap();
    let holder = db.sql().await;
    holder.batch_execute("begin; select from jobs where id = 2 for update").await.unwrap();
    let row = sql.query_one("select ended, moved, stuck from reap()", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1), row.get::<_, i32>(2)), (0, 2, 1));
    holder.batch_execute("rollback").await.unwrap();
    let row = sql.query_one("select ended, moved, stuck from reap()", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1), row.get::<_, i32>(2)), (1, 1, 0));
}

/// A job that keeps losing its node is isolated and then quarantined; its neighbours are not.
#[actix::test]
async fn poison_is_quarantined_and_its_neighbours_finish() {
    let db = database().await;
    let sql = db.sql().await;
    let all = enqueue(&sql, 5).await;
    let poison = all[2];
    let die = "update leases set expires_at = now() - interval '1 s', ttl = '0'; select reap()";
    let mut finished = 0;
    for node in 1..50 {
        // A node with two slots: takes a batch, then suspects one by one, and dies if it meets the poison.
        let mut died = false;
        for round in 0..4 {
            let token = node * 10 + round;
            let (jobs, _) = claim(&sql, node, token, 10, None).await;
            let met = ids(&jobs);
            if jobs.iter().any(|j| j.get::<_, i16>("attempt") > 1) {
                assert_eq!(met.len(), 1, "a suspect is claimed alone");
            }
            if met.contains(&poison) {
                sql.batch_execute(die).await.unwrap();
                died = true;
                break;
            }
            for id in met {
                settle(&sql, id, token, "completed").await.unwrap();
                finished += 1;
            }
        }
        if !died {
            break;
        }
    }
    assert_eq!(finished, 4);
    let job = db.job(poison).await;
    assert_eq!((job.state.as_str(), job.losses), ("lost", 3));
}

#[actix::test]
async fn a_suspect_lost_twice_has_no_company() {
    let db = database().await;
    let sql = db.sql().await;
    enqueue(&sql, 3).await;
    sql.batch_execute("update jobs set stage = 'suspect', losses = case when id = 1 then 2 else 1 end").await.unwrap();
    sql.batch_execute("update jobs set pos = -1 where id = 2").await.unwrap();
    let (first, _) = claim(&sql, 1, 10, 5, None).await;
    let (second, _) = claim(&sql, 1, 11, 5, None).await;
    let (third, _) = claim(&sql, 1, 12, 5, None).await;
    assert_eq!((ids(&first), ids(&second), ids(&third)), (vec![2], vec![3], vec![]), "job 1 waits for an empty lease");
    let (other, _) = claim(&sql, 2, 20, 5, None).await;
    assert_eq!(ids(&other), [1]);
}

/// The remedy for watermarks: what commits late lies behind them, and a claim from the start finds it.
#[actix::test]
async fn a_late_commit_is_behind_the_mark_and_a_full_pass_finds_it() {
    let db = database().await;
    let (sql, slow) = (db.sql().await, db.sql().await);
    slow.batch_execute("begin; insert into jobs (kind) values ('noop')").await.unwrap();
    let fast = enqueue(&sql, 1).await;
    let (jobs, lanes) = claim(&sql, 1, 10, 10, None).await;
    assert_eq!(ids(&jobs), fast);
    slow.batch_execute("commit").await.unwrap();
    let (lanes, marks): (Vec<i16>, Vec<i64>) =
        lanes.iter().map(|l| (l.get::<_, i16>("priority"), l.get::<_, i64>("mark"))).unzip();
    let (jobs, _) = claim(&sql, 1, 11, 10, Some((&lanes, &marks))).await;
    assert!(jobs.is_empty(), "the mark has passed it");
    let (jobs, _) = claim(&sql, 1, 12, 10, None).await;
    assert_eq!(jobs.len(), 1);
}

#[actix::test]
async fn a_locked_row_is_skipped_and_reported() {
    let db = database().await;
    let (sql, holder) = (db.sql().await, db.sql().await);
    enqueue(&sql, 3).await;
    holder.batch_execute("begin; select from jobs where id = 2 for update").await.unwrap();
    let (jobs, lanes) = claim(&sql, 1, 10, 10, None).await;
    assert_eq!(ids(&jobs), [1, 3]);
    assert!(lanes[0].get::<_, bool>("contended"));
}

#[actix::test]
async fn a_plain_insert_for_later_is_born_scheduled_and_promoted_when_due() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute("insert into jobs (kind, run_at) values ('noop', now() + interval '2 s')").await.unwrap();
    assert_eq!(db.job(1).await.state, "scheduled");
    assert!(claim(&sql, 1, 10, 10, None).await.0.is_empty());
    let (promoted, due) = db.store.promote(10).await.unwrap();
    assert!(promoted == 0 && due.unwrap() < Duration::from_secs(2));
    eventually("due", Duration::from_secs(20), || async { db.store.promote(10).await.unwrap().0 == 1 }).await;
    assert_eq!(ids(&claim(&sql, 1, 11, 10, None).await.0), [1]);
}

#[actix::test]
async fn an_unknown_claim_is_given_back_uncounted() {
    let db = database().await;
    let sql = db.sql().await;
    enqueue(&sql, 2).await;
    claim(&sql, 1, 10, 10, None).await;
    let open: Vec<i64> = value(&sql, "select open_claims from extend(1)").await;
    assert_eq!(open, [10]);
    assert_eq!(db.store.give_back(10).await.unwrap(), 2);
    let job = db.job(1).await;
    assert_eq!((job.state.as_str(), job.attempt, job.losses), ("ready", 0, 0));
    assert_eq!(value::<i64>(&sql, "select count(*) from claims").await, 0);
}

/// Rust decides what an attempt becomes, SQL enforces it for everybody: both must agree.
#[actix::test]
async fn rust_and_sql_agree_on_what_an_attempt_becomes() {
    let db = database().await;
    let sql = db.sql().await;
    let policy = RetryPolicy::default();
    let (mut id, mut token) = (0, 100);
    for max in 1..4u16 {
        for attempt in 1..=max {
            for end in
                [End::TimedOut(Duration::from_secs(1)), End::Released, End::Returned(Ok(pgcue::Outcome::Complete))]
            {
                id += 1;
                token += 1;
                sql.batch_execute(&format!(
                    "insert into jobs (id, kind, max_attempts, attempt) overriding system value values ({id}, 'noop', {max}, {attempt} - 1)"
                ))
                .await
                .unwrap();
                assert_eq!(ids(&claim(&sql, 1, token, 1, None).await.0), [id]);
                let verdict = judge(end.clone(), attempt, max, &policy, 0.5);
                // A foreign worker that just says "retry" ends the same way as a node that decided it.
                let said = if matches!(end, End::TimedOut(_)) { "retry" } else { verdict.outcome.as_str() };
                settle(&sql, id, token, said).await.unwrap();
                let job = db.job(id).await;
                let expected = match verdict.outcome {
                    Settled::Retry => ("scheduled", attempt as i16),
                    Settled::Release => ("ready", attempt as i16 - 1),
                    other => (other.as_str(), attempt as i16),
                };
                assert_eq!((job.state.as_str(), job.attempt), expected, "{end:?} of {attempt}/{max}");
                sql.batch_execute("delete from jobs").await.unwrap();
            }
        }
    }
    for attempt in 1..20 {
        let whole = RetryPolicy { jitter: 0.0, ..policy }.delay(attempt, 0.0).as_secs_f64();
        let sql_delay: f64 = value(&sql, &format!("select extract(epoch from backoff({attempt}))::float8")).await;
        assert!(sql_delay <= whole && sql_delay >= whole / 2.0 - 0.001, "attempt {attempt}: {sql_delay} of {whole}");
    }
}

#[actix::test]
async fn two_installs_in_one_database_do_not_disturb_each_other() {
    let db = database().await;
    let other = pgcue::store::Store::new(db.store.target().clone(), "Other \"queue\"", 2);
    other.migrate().await.unwrap();
    let sql = db.sql().await;
    enqueue(&sql, 1).await;
    assert!(other.jobs(&pgcue::store::Filter { limit: 10, ..Default::default() }).await.unwrap().is_empty());
    assert_eq!(value::<String>(&sql, "select stand_sentry('default')").await, "sentry");
    let there = db.sql().await;
    there.batch_execute("set search_path = \"Other \"\"queue\"\"\"").await.unwrap();
    assert_eq!(value::<String>(&there, "select stand_sentry('default')").await, "sentry", "a post of its own");
    pgcue::Client::new(other.clone(), 100).enqueue(pgcue::NewJob::new("noop", "1")).await.unwrap();
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 1);
}

#[actix::test]
async fn migrating_is_idempotent_safe_at_once_and_refuses_a_newer_schema() {
    let url = crate::support::empty_database().await;
    let db = Db::open(url);
    let error = db.store.check_schema().await.unwrap_err();
    assert_eq!(error.to_string(), "schema \"pgcue\" is not there; run `pgcue migrate`");
    let at_once = futures_util::future::join_all((0..4).map(|_| {
        let store = pgcue::store::Store::new(db.store.target().clone(), "pgcue", 1);
        async move { store.migrate().await.unwrap().from }
    }))
    .await;
    assert_eq!(at_once.iter().filter(|from| **from == 0).count(), 1, "{at_once:?}");
    let sql = db.sql().await;
    enqueue(&sql, 1).await;
    db.store.migrate().await.unwrap();
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 1);
    sql.batch_execute("update meta set version = 99").await.unwrap();
    let error = db.store.migrate().await.unwrap_err();
    assert_eq!(error.to_string(), "schema \"pgcue\" is at version 99, newer than this pgcue knows (1); upgrade pgcue");
}
