//! Every way of making a row claimable wakes a sleeping node. The ticks are a minute apart here: a job
//! that starts was woken, not found by chance.

use std::time::{Duration, Instant};

use pgcue::{Config, NewJob, Node, Running};

use crate::support::{Db, database, eventually};

/// Far below the tick, and far above what a busy machine needs: the slowest way is printed, and takes
/// some 50 ms in a release build.
const SOON: Duration = Duration::from_secs(10);

async fn node(db: &Db, name: &str) -> Running {
    let config = Config { demo: true, name: name.into(), poll: Duration::from_secs(60), ..db.config() };
    Node::new(config).await.unwrap().start().await.unwrap()
}

async fn state(node: &Running) -> String {
    let all = node.observe().await;
    all.iter().find(|(name, _)| name == "dispatcher default").unwrap().1.state.clone()
}

async fn asleep(nodes: &[&Running]) {
    eventually("one sentry, the others guarded", Duration::from_secs(30), || async {
        let mut states = Vec::new();
        for node in nodes {
            states.push(state(node).await);
        }
        states.iter().filter(|s| *s == "sentry").count() == 1
            && states.iter().filter(|s| *s == "guarded").count() == nodes.len() - 1
    })
    .await;
}

#[actix::test]
async fn two_sleeping_nodes_wake_however_a_job_becomes_claimable() {
    let db = database().await;
    let sql = db.sql().await;
    let (one, two) = (node(&db, "one").await, node(&db, "two").await);
    let mut slowest = (Duration::ZERO, "");
    let id = |row: tokio_postgres::Row| row.get::<_, i64>(0);
    for way in [
        "function",
        "function many",
        "insert",
        "copy",
        "rust",
        "rust transaction",
        "delayed",
        "retried by a consumer",
        "released by a consumer",
        "resumed queue",
        "cursor passed on by cancel",
        "cursor passed on by settle",
    ] {
        asleep(&[&one, &two]).await;
        let mut due = Instant::now();
        let job = match way {
            "function" => id(sql.query_one("select enqueue('noop')", &[]).await.unwrap()),
            "function many" => {
                id(sql.query("select enqueue_many('noop', array['1', '2']::json[])", &[]).await.unwrap().remove(1))
            }
            "insert" => id(sql.query_one("insert into jobs (kind) values ('noop') returning id", &[]).await.unwrap()),
            "copy" => {
                db.client.copy([Ok(NewJob::new("noop", "1"))]).await.unwrap();
                id(sql.query_one("select max(id) from all_jobs", &[]).await.unwrap())
            }
            "rust" => db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id,
            "rust transaction" => {
                let mut connection = db.sql().await;
                let tx = connection.transaction().await.unwrap();
                let job = db.client.within(&tx).enqueue(NewJob::new("noop", "1")).await.unwrap().id;
                tokio::time::sleep(Duration::from_millis(50)).await;
                due = Instant::now();
                tx.commit().await.unwrap();
                job
            }
            "delayed" => {
                let delay = Duration::from_millis(300);
                let job = db.client.enqueue(NewJob::new("noop", "1").delay(delay)).await.unwrap().id;
                due += delay;
                job
            }
            "retried by a consumer" | "released by a consumer" => {
                // A foreign worker holds the job under a lease of its own and lets it go. The nodes do
                // not take it before that: it is in a queue that only the consumer sees first.
                sql.batch_execute("select pause('default')").await.unwrap();
                let job = id(sql.query_one("select enqueue('noop')", &[]).await.unwrap());
                sql.batch_execute("update queues set paused_at = null").await.unwrap();
                let claimed = sql.query("select token from claim('default')", &[]).await.unwrap();
                let Some(row) = claimed.first() else { continue }; // a node was faster; nothing to test
                let token = id(row.clone());
                asleep(&[&one, &two]).await;
                due = Instant::now();
                let end = if way.starts_with("retried") { "'retry', delay => '0'" } else { "'release'" };
                sql.batch_execute(&format!("select settle({job}, {token}, {end})")).await.unwrap();
                job
            }
            "resumed queue" => {
                sql.batch_execute("select pause('default')").await.unwrap();
                let job = id(sql.query_one("select enqueue('noop')", &[]).await.unwrap());
                tokio::time::sleep(Duration::from_millis(300)).await;
                asleep(&[&one, &two]).await;
                due = Instant::now();
                sql.batch_execute("select resume('default')").await.unwrap();
                job
            }
            "cursor passed on by cancel" => {
                // The head is of a kind that nobody handles; the job behind it waits for it.
                let head = id(sql.query_one("select enqueue('foreign', cursor_key => 'c')", &[]).await.unwrap());
                let job = id(sql.query_one("select enqueue('noop', cursor_key => 'c')", &[]).await.unwrap());
                db.reaches(job, "blocked").await;
                asleep(&[&one, &two]).await;
                due = Instant::now();
                sql.batch_execute(&format!("select cancel({head})")).await.unwrap();
                job
            }
            _ => {
                let head = id(sql.query_one("select enqueue('foreign', cursor_key => 'd')", &[]).await.unwrap());
                let token: i64 = sql
                    .query_one("select token from claim('default', kinds => '{foreign}')", &[])
                    .await
                    .unwrap()
                    .get(0);
                let job = id(sql.query_one("select enqueue('noop', cursor_key => 'd')", &[]).await.unwrap());
                db.reaches(job, "blocked").await;
                asleep(&[&one, &two]).await;
                due = Instant::now();
                sql.batch_execute(&format!("select settle({head}, {token})")).await.unwrap();
                job
            }
        };
        db.reaches(job, "completed").await;
        let took = Instant::now().saturating_duration_since(due);
        assert!(took < SOON, "{way}: took {took:?}");
        if took > slowest.0 {
            slowest = (took, way);
        }
    }
    println!("slowest wake-up: {slowest:?}");
    one.drain().await.unwrap();
    two.drain().await.unwrap();
}

#[actix::test]
async fn the_other_node_takes_the_post_when_the_sentry_leaves() {
    let db = database().await;
    let (one, two) = (node(&db, "one").await, node(&db, "two").await);
    asleep(&[&one, &two]).await;
    let one_is_sentry = state(&one).await == "sentry";
    let (name, sentry, other) = if one_is_sentry { ("one", one, two) } else { ("two", two, one) };
    let sql = db.sql().await;
    let sessions = format!(
        "select count(*) from pg_stat_activity where application_name = 'pgcue {name}' and datname = current_database()"
    );
    assert!(crate::support::value::<i64>(&sql, &sessions).await >= 2);
    sentry.drain().await.unwrap();
    eventually("a drained node holds no session", Duration::from_secs(20), || async {
        crate::support::value::<i64>(&sql, &sessions).await == 0
    })
    .await;
    asleep(&[&other]).await;
    let job = db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id;
    db.reaches(job, "completed").await;
    other.drain().await.unwrap();
}

#[actix::test]
async fn producers_are_silent_while_nodes_are_awake_and_notify_a_sentry() {
    let db = database().await;
    let sql = db.sql().await;
    // Nobody sleeps: the lock is granted, and held to the end of the transaction.
    let locks = "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ShareLock'
        and database = (select oid from pg_database where datname = current_database())";
    sql.batch_execute("begin; insert into jobs (kind) values ('noop')").await.unwrap();
    assert_eq!(crate::support::value::<i64>(&sql, locks).await, 1);
    // Meanwhile nobody can become the sentry, and sees why.
    let listener = db.sql().await;
    assert_eq!(crate::support::value::<String>(&listener, "select stand_sentry('default')").await, "busy");
    sql.batch_execute("commit").await.unwrap();
    assert_eq!(crate::support::value::<String>(&listener, "select stand_sentry('default')").await, "sentry");
    let third = db.sql().await;
    assert_eq!(crate::support::value::<String>(&third, "select stand_sentry('default')").await, "guarded");
    // Somebody sleeps: refused, so it notified.
    sql.batch_execute("begin; insert into jobs (kind) values ('noop')").await.unwrap();
    assert_eq!(crate::support::value::<i64>(&sql, locks).await, 0);
    sql.batch_execute("rollback").await.unwrap();
}

#[actix::test]
async fn without_a_listener_everything_works_later() {
    let db = database().await;
    let config = Config { demo: true, listen: false, poll: Duration::from_millis(50), ..db.config() };
    let node = Node::new(config).await.unwrap().start().await.unwrap();
    for delay in [0, 100] {
        let job = NewJob::new("noop", "1").delay(Duration::from_millis(delay));
        let id = db.client.enqueue(job).await.unwrap().id;
        db.reaches(id, "completed").await;
    }
    node.drain().await.unwrap();
}

/// A node with nothing to do must not keep the database busy, whatever the reason.
#[actix::test]
async fn an_idle_node_is_quiet() {
    let db = database().await;
    let sql = db.sql().await;
    let node = node(&db, "one").await;
    let calls = "select pg_stat_force_next_flush() is null or true, xact_commit from pg_stat_database where datname = current_database()";
    for reason in ["no job ever", "paused"] {
        asleep(&[&node]).await;
        let count = async || sql.query_one(calls, &[]).await.unwrap().get::<_, i64>(1);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = count().await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let made = count().await - before;
        assert!(made < 40, "{reason}: {made} transactions in 1.5 s");
        sql.batch_execute("select pause('default'); select enqueue('noop')").await.unwrap();
    }
    node.drain().await.unwrap();
}
