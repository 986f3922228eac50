//! Cursors, as far as a node needs them: one job at a time, in order, with their state.

use std::time::Duration;

use jiff::Timestamp;
use pgcue::{Config, CursorTask, Job, JobResult, NewJob, Node, OnRetry, Outcome, Task};
use serde::{Deserialize, Serialize};

use crate::support::{database, value};

fn append(n: usize, key: &str) -> NewJob {
    NewJob::new("append", format!("{{\"n\":{n}}}")).cursor(key)
}

#[actix::test]
async fn each_cursor_sees_its_jobs_in_order_and_keeps_their_fold() {
    let db = database().await;
    let jobs = (0..600).map(|n| append(n, &format!("k{}", n % 7)));
    db.client.enqueue_many(jobs).await.unwrap();
    let nodes = [db.demo_node().await.start().await.unwrap(), db.demo_node().await.start().await.unwrap()];
    let sql = db.sql().await;
    crate::support::eventually("all done", Duration::from_secs(30), || async {
        value::<i64>(&sql, "select count(*) from jobs").await == 0
    })
    .await;
    for key in 0..7 {
        let state: serde_json::Value = value(&sql, &format!("select state from cursors where key = 'k{key}'")).await;
        let expected: Vec<usize> = (0..600).filter(|n| n % 7 == key).collect();
        assert_eq!(state, serde_json::json!(expected));
        let chain =
            format!("select array_agg(cursor_version order by id) from finished_jobs where cursor_key = 'k{key}'");
        let chain: Vec<i64> = value(&sql, &chain).await;
        assert_eq!(chain, (1..=expected.len() as i64).collect::<Vec<_>>(), "versions are 1..n in order");
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from cursors where owner is not null or hold is not null").await, 0);
    for node in nodes {
        node.drain().await.unwrap();
    }
}

#[actix::test]
async fn a_retrying_job_holds_its_cursor_and_others_do_not_wait() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    let sql = db.sql().await;
    sql.batch_execute("begin").await.unwrap();
    sql.batch_execute(
        "select enqueue('fail', '{\"times\":1}', cursor_key => 'a'); select enqueue('append', '{\"n\":1}', cursor_key => 'a', priority => 9);
         select enqueue('append', '{\"n\":1}', cursor_key => 'b'); commit",
    )
    .await
    .unwrap();
    // The job of greater priority goes first, then the failing one holds the cursor until it is done.
    let late = db.client.enqueue(append(2, "a")).await.unwrap().id;
    db.reaches(3, "completed").await;
    let failing = db.reaches(1, "completed").await;
    let late = db.reaches(late, "completed").await;
    assert_eq!(failing.attempt, 2);
    assert!(late.started_at >= failing.finished_at, "{late:?} before {failing:?}");
    assert_eq!(
        value::<serde_json::Value>(&sql, "select state from cursors where key = 'a'").await,
        serde_json::json!([1, 2])
    );
    node.drain().await.unwrap();
}

#[actix::test]
async fn failure_keeps_the_state_and_the_cursor_goes_on() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    db.client.enqueue(append(1, "a")).await.unwrap();
    let bad = db.client.enqueue(NewJob::new("panic", "1").max_attempts(1).cursor("a")).await.unwrap().id;
    let last = db.client.enqueue(append(2, "a")).await.unwrap().id;
    db.reaches(bad, "failed").await;
    let last = db.reaches(last, "completed").await;
    assert_eq!(last.result.unwrap().get(), "2");
    assert_eq!(last.cursor_snapshot.unwrap().get(), "[1]");
    assert_eq!(last.cursor_version, Some(2));
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_dead_owner_lets_go_of_its_cursors() {
    let db = database().await;
    let sql = db.sql().await;
    db.client.enqueue_many([append(1, "a"), append(2, "a")]).await.unwrap();
    sql.batch_execute(
        "select begin_lease(1, 'dead', '1 s'); select claim_lanes(1, 10, 'default', null, 10, 50, '{}', '{}')",
    )
    .await
    .unwrap();
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs where token = 10").await, 2, "a run of two");
    sql.batch_execute("update leases set expires_at = now() - interval '1 s', ttl = '0'").await.unwrap();
    let config = Config { demo: true, lease: Duration::from_secs(3), ..db.config() };
    let node = Node::new(config).await.unwrap().start().await.unwrap();
    let job = db.reaches(2, "completed").await;
    assert_eq!((job.result.unwrap().get(), job.losses), ("2", 1));
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_retry_without_delay_does_not_strand_its_cursor() {
    let db = database().await;
    let sql = db.sql().await;
    for outcome in ["retry", "snooze"] {
        let ids = db.client.enqueue_many([append(1, outcome), append(2, outcome)]).await.unwrap();
        for (id, end) in [
            (ids[0].id, format!("'{outcome}', delay => '0'")),
            (ids[0].id, "'completed'".into()),
            (ids[1].id, "'completed'".into()),
        ] {
            let row = sql.query_one("select id, token from claim()", &[]).await.unwrap();
            assert_eq!(row.get::<_, i64>(0), id, "{outcome}: the held job comes first");
            sql.batch_execute(&format!("select settle({id}, {}, {end})", row.get::<_, i64>(1))).await.unwrap();
        }
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
}

#[actix::test]
async fn what_stands_behind_a_busy_cursors_jobs_does_not_wait() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "insert into jobs (kind, cursor_key) select 'append', 'busy' from generate_series(1, 300);
         insert into jobs (kind) values ('noop')",
    )
    .await
    .unwrap();
    sql.batch_execute("select claim()").await.unwrap();
    let next = sql.query_one("select kind from claim(max_jobs => 10)", &[]).await.unwrap();
    assert_eq!(next.get::<_, String>(0), "noop", "found in one claim, past 299 jobs that are parked");
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs where stage = 'blocked'").await, 299);
}

#[actix::test]
async fn an_ordinary_claim_does_not_take_a_suspect_through_its_cursor() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "insert into jobs (kind, cursor_key, stage, losses) values ('poison', 'a', 'suspect', 2), ('poison', null, 'suspect', 1);
         insert into jobs (kind, cursor_key) values ('noop', 'a'); insert into jobs (kind) values ('noop');
         update jobs set pos = -1 where id = 2;
         select begin_lease(1, 'test', '1 h')",
    )
    .await
    .unwrap();
    let claim = async |token: i64| {
        let query = "select id from claim_lanes(1, $1, 'default', null, 10, 50, '{}', '{}') where id is not null";
        sql.query(query, &[&token]).await.unwrap().iter().map(|row| row.get(0)).collect::<Vec<i64>>()
    };
    assert_eq!(claim(10).await, [2], "the suspect with one loss");
    assert_eq!(claim(11).await, [4], "job 3 waits for job 1, and that one for an empty lease");
    sql.batch_execute("select settle(2, 10); select settle(4, 11)").await.unwrap();
    assert_eq!(claim(12).await, [1]);
}

#[actix::test]
async fn a_claim_takes_no_more_jobs_than_asked_through_runs() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "insert into jobs (kind, cursor_key) select 'noop', 'k' || n % 10 from generate_series(1, 500) n;
         select begin_lease(1, 'test', '1 h')",
    )
    .await
    .unwrap();
    let mut taken = 0;
    for (token, max) in [(10i64, 20i32), (11, 7), (12, 100)] {
        let query = "select count(id) from claim_lanes(1, $1, 'default', null, $2, 50, '{}', '{}')";
        let got: i64 = sql.query_one(query, &[&token, &max]).await.unwrap().get(0);
        assert!(got > 0 && got <= max as i64, "{got} of {max}");
        taken += got;
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs where token is not null").await, taken);
}

#[actix::test]
async fn a_retrying_job_may_let_others_pass() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    let slow = NewJob::new("fail", r#"{"times":1}"#).cursor("a").on_retry(OnRetry::Pass);
    let ids = db.client.enqueue_many([slow, append(1, "a"), append(2, "a")]).await.unwrap();
    let passed = db.reaches(ids[2].id, "completed").await;
    let failing = db.reaches(ids[0].id, "completed").await;
    assert!(failing.attempt == 2 && failing.started_at > passed.finished_at, "{failing:?}");
    // A job that is scheduled for later holds nobody up either.
    let later = db.client.enqueue(append(9, "a").delay(Duration::from_secs(60))).await.unwrap().id;
    let next = db.client.enqueue(append(3, "a")).await.unwrap().id;
    assert_eq!(db.reaches(next, "completed").await.result.unwrap().get(), "3");
    assert_eq!(db.job(later).await.state, "scheduled");
    node.drain().await.unwrap();
}

#[derive(Serialize, Deserialize)]
enum Set {
    Number(i64),
    Null,
    Text,
    Keep,
    Large,
    Fail,
    FailWith(i64),
}

impl Task for Set {
    const KIND: &'static str = "set";
    const MAX_ATTEMPTS: u16 = 1;
}

impl CursorTask for Set {
    type State = Option<i64>;
}

async fn set(job: Job<Set>) -> JobResult {
    let before = job.cursor()?;
    let outcome = match job.args {
        Set::Number(n) => Outcome::Complete.with_state(&n)?,
        Set::Null => Outcome::Complete.with_state(&None::<i64>)?,
        Set::Text => Outcome::Complete.with_state(&"x".repeat(2000))?,
        Set::Keep => Outcome::Complete,
        Set::Large => Outcome::Complete.with_state(&"x".repeat(5000))?,
        Set::Fail => Outcome::Fail("as asked".into()),
        Set::FailWith(n) => Outcome::Fail("as asked".into()).with_state(&n)?,
    };
    outcome.with_result(&format!("{before:?}"))
}

#[actix::test]
async fn the_state_is_what_the_last_finished_job_said() {
    let db = database().await;
    let sql = db.sql().await;
    let config = Config { max_state: 4000, ..db.config() };
    let node = Node::new(config).await.unwrap().handle_fn(set).start().await.unwrap();
    let step = async |set: Set, ends: &str| {
        let id = db.client.enqueue(set.job().cursor("a")).await.unwrap().id;
        let job = db.reaches(id, ends).await;
        let state: Option<String> = value(&sql, "select state::text from cursors").await;
        (job, state)
    };
    let result = |job: &pgcue::store::JobRow| job.result.as_ref().unwrap().get().to_owned();
    let (job, state) = step(Set::Keep, "completed").await;
    assert_eq!((result(&job).as_str(), state, job.cursor_version), ("\"None\"", None, Some(1)), "no state yet");
    let (_, state) = step(Set::Null, "completed").await;
    assert_eq!(state.as_deref(), Some("null"), "null is a state");
    let (job, state) = step(Set::Number(5), "completed").await;
    assert_eq!((result(&job).as_str(), state.as_deref()), ("\"Some(None)\"", Some("5")));
    let (job, state) = step(Set::Keep, "completed").await;
    assert_eq!((result(&job).as_str(), state.as_deref()), ("\"Some(Some(5))\"", Some("5")), "saying nothing keeps it");
    assert_eq!(job.cursor_snapshot.unwrap().get(), "5");
    let (job, state) = step(Set::Fail, "failed").await;
    assert_eq!((state.as_deref(), job.cursor_version), (Some("5"), None));
    let (job, state) = step(Set::FailWith(6), "failed").await;
    assert_eq!((state.as_deref(), job.cursor_version), (Some("6"), Some(5)), "a failure may leave a state");
    let (job, state) = step(Set::Large, "failed").await;
    let error = job.error.unwrap();
    assert_eq!(error, "the cursor state of 5002 bytes was refused: the limit is 4000 bytes (max_state)");
    assert_eq!(state.as_deref(), Some("6"), "the state stays");
    step(Set::Text, "completed").await;
    let (job, state) = step(Set::Keep, "failed").await;
    let error = job.error.unwrap();
    assert!(error.starts_with("cursor state does not fit: invalid type: string"), "{error}");
    assert_eq!((state.map(|s| s.len()), job.cursor_snapshot.is_none()), (Some(2002), true), "too large for a snapshot");
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_state_that_does_not_fit_names_the_path() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    db.client.enqueue(append(1, "a")).await.unwrap();
    let id = db.client.enqueue(NewJob::new("count", r#"{"n":1}"#).cursor("a")).await.unwrap().id;
    let job = db.reaches(id, "failed").await;
    assert!(job.error.unwrap().starts_with("cursor state does not fit: invalid type: sequence"));
    assert_eq!(job.attempt, 1, "retrying would not help");
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_drained_node_hands_its_cursors_over_at_once() {
    let db = database().await;
    let first = db.demo_node().await.start().await.unwrap();
    let sleep = |ms: u64| NewJob::new("sleep", format!(r#"{{"ms":{ms}}}"#)).cursor("a");
    let ids = db.client.enqueue_many([sleep(600), sleep(1), sleep(1)]).await.unwrap();
    db.reaches(ids[0].id, "running").await;
    tokio::time::sleep(Duration::from_millis(200)).await; // its handler runs, the others wait in the same run
    let second = db.demo_node().await.start().await.unwrap();
    first.drain().await.unwrap();
    let drained = Timestamp::now();
    let next = db.reaches(ids[1].id, "completed").await;
    let after = next.started_at.unwrap().duration_since(drained);
    println!("started {after:?} after the drain");
    // The promise is 100 ms; slow machines get more.
    assert!(after < jiff::SignedDuration::from_secs(2), "{after:?}");
    assert_eq!(db.job(ids[0].id).await.attempt, 1);
    second.drain().await.unwrap();
}

#[actix::test]
async fn a_job_that_falls_due_while_its_cursor_runs_is_not_behind_the_mark() {
    let db = database().await;
    let sql = db.sql().await;
    let setup = "select enqueue('noop', cursor_key => 'a', run_at => now() + interval '20 ms'); select enqueue('noop', cursor_key => 'a');
        select move_horizon(1000, 0, '{}')";
    sql.batch_execute(setup).await.unwrap();
    let claim = async || sql.query_one("select id, token from claim()", &[]).await.unwrap();
    let row = claim().await;
    assert_eq!(row.get::<_, i64>(0), 2);
    sql.batch_execute("select pg_sleep(0.03); select promote(10)").await.unwrap();
    sql.batch_execute(&format!("select settle(2, {})", row.get::<_, i64>(1))).await.unwrap();
    assert_eq!(claim().await.get::<_, i64>(0), 1, "though its id is smaller than what was settled");
}

#[actix::test]
async fn no_claim_waits_for_a_transaction_that_makes_the_same_cursor() {
    let db = database().await;
    let (one, two) = (db.sql().await, db.sql().await);
    db.client.enqueue_many([append(1, "a"), append(2, "a"), NewJob::new("noop", "1")]).await.unwrap();
    one.batch_execute("begin; select claim()").await.unwrap();
    two.batch_execute("set lock_timeout = '2 s'").await.unwrap();
    let kinds = two.query("select kind from claim(max_jobs => 10)", &[]).await.unwrap();
    assert_eq!(kinds.iter().map(|row| row.get(0)).collect::<Vec<String>>(), ["noop"]);
    one.batch_execute("rollback").await.unwrap();
    assert_eq!(two.query("select claim(max_jobs => 10)", &[]).await.unwrap().len(), 1);
}

#[actix::test]
async fn a_producer_that_collapses_slowly_holds_up_no_settle() {
    let db = database().await;
    let (producer, worker) = (db.sql().await, db.sql().await);
    let collapse = "select collapse('noop', cursor_key => 'a')";
    worker.batch_execute("select enqueue('noop', cursor_key => 'a')").await.unwrap();
    let row = worker.query_one("select id, token from claim()", &[]).await.unwrap();
    worker.batch_execute(collapse).await.unwrap();
    assert!(worker.query("select claim()", &[]).await.unwrap().is_empty());
    producer.batch_execute(&format!("begin; {collapse}")).await.unwrap();
    let settle = format!("set lock_timeout = '2 s'; select settle({}, {})", row.get::<_, i64>(0), row.get::<_, i64>(1));
    worker.batch_execute(&settle).await.unwrap();
    producer.batch_execute("commit").await.unwrap();
    assert_eq!(worker.query("select claim()", &[]).await.unwrap().len(), 1, "and the job is not stranded");
}
