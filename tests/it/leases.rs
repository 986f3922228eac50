//! Leases and claims that their node gives up for lost, though the database would still accept them.

use std::time::Duration;

use pgcue::{Config, Job, JobError, JobResult, Node, Outcome, Task};
use serde::{Deserialize, Serialize};

use crate::guards::without;
use crate::support::{database, eventually, somebody_waits, value};

/// If so, runs until it is told to stop, the first time.
#[derive(Serialize, Deserialize)]
struct Wait(bool);

impl Task for Wait {
    const KIND: &'static str = "wait";
}

async fn wait(job: Job<Wait>) -> JobResult {
    if job.args.0 && job.meta.attempt == 1 {
        job.meta.cancelled.cancelled().await;
        return Err(JobError::new("it was told to stop"));
    }
    Ok(Outcome::Complete)
}

/// A claim whose connection broke is given back while the server is still at it.
#[actix::test]
async fn a_claim_that_commits_while_it_is_given_back_keeps_its_row() {
    let db = database().await;
    let (sql, slow, gate) = (db.sql().await, db.sql().await, db.sql().await);
    sql.batch_execute("select enqueue('noop'), begin_lease(1, 'tester', '1 h')").await.unwrap();
    let look = "moved := cardinality(free.ids);";
    without(&sql, "give_back", look, &format!("perform pg_advisory_xact_lock(5); {look}")).await;
    gate.batch_execute("select pg_advisory_lock(5)").await.unwrap();
    slow.batch_execute("begin; select claim_lanes(1, 7, 'default', null, 1, 1, '{}', '{}')").await.unwrap();
    let (moved, ()) = tokio::join!(db.store.give_back(7), async {
        somebody_waits(&gate).await;
        slow.batch_execute("commit").await.unwrap();
        gate.batch_execute("select pg_advisory_unlock(5)").await.unwrap();
    });
    assert_eq!(moved.unwrap(), 0, "there was nothing yet");
    assert_eq!(db.store.verify().await.unwrap(), []);
    assert_eq!(db.store.give_back(7).await.unwrap(), 1, "now there is");
}

/// Jobs end faster than the database settles them.
#[actix::test]
async fn a_node_claims_no_more_while_what_ended_is_not_settled() {
    let db = database().await;
    let (sql, gate) = (db.sql().await, db.sql().await);
    sql.batch_execute(
        "create function wait_at_gate() returns trigger language plpgsql as
          'begin perform pg_advisory_xact_lock_shared(5); return null; end';
        create trigger wait_at_gate before insert on finished_jobs for each statement execute function wait_at_gate();
        insert into jobs (kind) select 'noop' from generate_series(1, 20000)",
    )
    .await
    .unwrap();
    gate.batch_execute("select pg_advisory_lock(5)").await.unwrap();
    let node = db.demo_node().await.start().await.unwrap();
    somebody_waits(&gate).await;
    let claimed = async || value::<i64>(&sql, "select coalesce(sum(open), 0)::bigint from claims").await;
    let mut before = -1;
    while std::mem::replace(&mut before, claimed().await) != before {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // 4,000 that ended, a claim that began just before, 2,000 that wait and what the slots run.
    assert!((4000..=7100).contains(&before), "{before} jobs are claimed");
    gate.batch_execute("select pg_advisory_unlock(5)").await.unwrap();
    eventually("all jobs complete", Duration::from_secs(60), async || {
        value::<i64>(&sql, "select count(*) from finished_jobs where state = 'completed'").await == 20_000
    })
    .await;
    node.drain().await.unwrap();
}

#[actix::test]
async fn what_a_lost_lease_held_goes_back_whole() {
    let db = database().await;
    let (sql, holder) = (db.sql().await, db.sql().await);
    let config = Config { lease: Duration::from_secs(3), ..db.config() };
    let node = Node::new(config).await.unwrap().handle_fn(wait).start().await.unwrap();
    // Jobs that are quick, as the node has seen, are claimed in runs.
    let quick = db.client.enqueue_many((0..200).map(|_| Wait(false))).await.unwrap();
    db.reaches(quick[199].id, "completed").await;
    let jobs = (0..5).map(|n| Wait(n == 0).job().cursor("k"));
    let first = db.client.enqueue_many(jobs).await.unwrap()[0].id;
    db.reaches(first, "running").await;
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs where token is not null").await, 5, "one run");
    // No heartbeat gets through until the node gives up; the database's time is not over then.
    holder.batch_execute("begin; lock table leases in access exclusive mode").await.unwrap();
    let lost = async || node.observe().await.iter().any(|(name, seen)| name == "lease" && seen.state == "lost");
    eventually("the lease is given up", Duration::from_secs(20), lost).await;
    holder.batch_execute("commit").await.unwrap();
    eventually("all complete", Duration::from_secs(30), || async {
        assert_eq!(db.store.verify().await.unwrap(), []);
        value::<i64>(&sql, "select count(*) from finished_jobs where state = 'completed'").await == 205
    })
    .await;
    assert_eq!(value::<i64>(&sql, "select max(version) from cursors").await, 5);
    assert_eq!(value::<i64>(&sql, "select sum(losses)::bigint from finished_jobs").await, 0, "nothing was lost");
    node.drain().await.unwrap();
}
