//! What handlers may do to a node: nothing that harms others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use pgcue::config::QueueConfig;
use pgcue::{Config, Job, JobError, JobResult, Node, Outcome, RetryPolicy, Task};
use serde::{Deserialize, Serialize};

use crate::support::{Db, database, eventually, value};

#[derive(Serialize, Deserialize, Clone)]
enum Mood {
    Fine,
    Panic,
    Block(u64),
    Never,
    Error(String),
    Cancel,
    Fail,
    SnoozeOnce,
    WaitForCancel,
}

impl Task for Mood {
    const KIND: &'static str = "mood";
    fn retry() -> RetryPolicy {
        RetryPolicy::fixed(Duration::from_millis(20))
    }
}

struct Moody {
    seen: u32,
}

impl Actor for Moody {
    type Context = Context<Self>;
}

impl Handler<Job<Mood>> for Moody {
    type Result = ResponseActFuture<Self, JobResult>;

    fn handle(&mut self, job: Job<Mood>, _: &mut Context<Self>) -> Self::Result {
        self.seen += 1;
        let seen = self.seen;
        Box::pin(act(job, seen).into_actor(self))
    }
}

async fn act(job: Job<Mood>, seen: u32) -> JobResult {
    match job.args {
        Mood::Fine => Outcome::result(&seen),
        Mood::Panic => panic!("no mood"),
        Mood::Block(ms) => {
            std::thread::sleep(Duration::from_millis(ms));
            Ok(Outcome::Complete)
        }
        Mood::Never => std::future::pending().await,
        Mood::Error(text) => Err(JobError::new(text)),
        Mood::Cancel => Ok(Outcome::Cancel("not wanted".into())),
        Mood::Fail => Ok(Outcome::Fail("hopeless".into())),
        Mood::SnoozeOnce if job.meta.attempt == 1 && job.meta.headers.is_none() => Ok(Outcome::Complete),
        Mood::SnoozeOnce => Ok(Outcome::Snooze(Duration::from_millis(1))),
        Mood::WaitForCancel => {
            job.meta.cancelled.cancelled().await;
            Err(JobError::new("told to stop"))
        }
    }
}

/// A node with one slot for the actor, counting how often its factory was used.
async fn one_slot(db: &Db) -> (pgcue::Running, Arc<AtomicU32>) {
    let built = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&built);
    let queues = [("default".to_owned(), QueueConfig::with_slots(1))].into();
    let node = Node::new(Config { queues, ..db.config() }).await.unwrap();
    let node = node.handle_actor::<Mood, _>(move || {
        count.fetch_add(1, Ordering::SeqCst);
        Moody { seen: 0 }
    });
    (node.start().await.unwrap(), built)
}

#[actix::test]
async fn a_panic_costs_one_attempt_and_the_slot_is_rebuilt_from_its_factory() {
    let db = database().await;
    let (node, built) = one_slot(&db).await;
    let first = db.client.enqueue(Mood::Fine).await.unwrap().id;
    let bad = db.client.enqueue(Mood::Panic.job().max_attempts(2)).await.unwrap().id;
    let job = db.reaches(bad, "failed").await;
    assert_eq!((job.attempt, job.max_attempts), (2, 2));
    let error = job.error.unwrap();
    assert!(error.starts_with("panicked: no mood at tests/it/handlers.rs:"), "{error}");
    let after = db.client.enqueue(Mood::Fine).await.unwrap().id;
    assert_eq!(db.reaches(first, "completed").await.result.unwrap().get(), "1");
    assert_eq!(db.reaches(after, "completed").await.result.unwrap().get(), "1", "a new actor counts anew");
    assert_eq!(built.load(Ordering::SeqCst), 3, "once, and once after each panic");
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_handler_that_never_returns_or_blocks_its_thread_gives_its_slot_back() {
    let db = database().await;
    let (node, built) = one_slot(&db).await;
    let limited = |mood: Mood| mood.job().timeout(Duration::from_millis(100)).max_attempts(1);
    let never = db.client.enqueue(limited(Mood::Never)).await.unwrap().id;
    let job = db.reaches(never, "failed").await;
    assert_eq!(job.error.as_deref(), Some("timed out after 100ms"));
    let blocks = db.client.enqueue(limited(Mood::Block(60_000))).await.unwrap().id;
    let job = db.reaches(blocks, "failed").await;
    assert!(job.error.unwrap().starts_with("blocked its thread beyond its timeout of 100ms"));
    let after = db.client.enqueue(Mood::Fine).await.unwrap().id;
    db.reaches(after, "completed").await;
    assert_eq!(built.load(Ordering::SeqCst), 3);
    node.drain().await.unwrap();
}

#[actix::test]
async fn neighbours_of_unruly_handlers_are_undisturbed() {
    let db = database().await;
    let node = Node::new(db.config()).await.unwrap();
    let _node = node.handle_fn(|job: Job<Mood>| act(job, 0)).start().await.unwrap();
    for mood in [Mood::Block(30_000), Mood::Never, Mood::Panic] {
        db.client.enqueue(mood.job().timeout(Duration::from_secs(20)).max_attempts(1)).await.unwrap();
    }
    let begin = Instant::now();
    let ids = db.client.enqueue_many((0..500).map(|_| Mood::Fine)).await.unwrap();
    for job in ids {
        db.reaches(job.id, "completed").await;
    }
    assert!(begin.elapsed() < Duration::from_secs(15), "took {:?}", begin.elapsed());
}

#[actix::test]
async fn outcomes_become_states() {
    let db = database().await;
    let (node, _) = one_slot(&db).await;
    let cancelled = db.client.enqueue(Mood::Cancel).await.unwrap().id;
    let failed = db.client.enqueue(Mood::Fail).await.unwrap().id;
    let errs = db.client.enqueue(Mood::Error("a\0b".into()).job().max_attempts(3)).await.unwrap().id;
    assert_eq!(db.reaches(cancelled, "cancelled").await.error.as_deref(), Some("not wanted"));
    let job = db.reaches(failed, "failed").await;
    assert_eq!((job.attempt, job.error.as_deref()), (1, Some("hopeless")));
    let job = db.reaches(errs, "failed").await;
    assert_eq!((job.attempt, job.error.as_deref()), (3, Some("a\u{fffd}b")));
    let snoozes =
        db.client.enqueue(Mood::SnoozeOnce.job().headers(&serde_json::json!({"snooze": true}))).await.unwrap().id;
    eventually("snoozed without losing attempts", Duration::from_secs(20), || async {
        let job = db.job(snoozes).await;
        job.attempt == 0 && job.state == "scheduled"
    })
    .await;
    db.store.cancel(snoozes).await.unwrap();
    node.drain().await.unwrap();
}

#[actix::test]
async fn cancelling_a_running_job_tells_its_handler_and_ends_it() {
    let db = database().await;
    let (node, _) = one_slot(&db).await;
    let id = db.client.enqueue(Mood::WaitForCancel).await.unwrap().id;
    eventually("it runs", Duration::from_secs(20), || async {
        node.observe().await.iter().any(|(name, pool)| name == "pool default" && pool.load == 1)
    })
    .await;
    assert_eq!(db.store.cancel(id).await.unwrap().as_deref(), Some("requested"));
    let job = db.reaches(id, "cancelled").await;
    assert_eq!(job.error.as_deref(), Some("told to stop"));
    assert_eq!(db.store.cancel(id).await.unwrap(), None, "no such live job");
    node.drain().await.unwrap();
}

#[actix::test]
async fn draining_gives_back_what_outlives_the_grace_period_uncounted() {
    let db = database().await;
    let config = Config { grace: Duration::from_millis(300), demo: true, ..db.config() };
    let node = Node::new(config).await.unwrap().start().await.unwrap();
    let enqueue =
        async |ms: u64| db.client.enqueue(pgcue::NewJob::new("sleep", format!("{{\"ms\":{ms}}}"))).await.unwrap().id;
    let (short, long) = (enqueue(150).await, enqueue(60_000).await);
    eventually("both run", Duration::from_secs(20), || async {
        node.observe().await.iter().any(|(name, pool)| name == "pool default" && pool.load == 2)
    })
    .await;
    let error = node.drain().await.unwrap_err();
    assert_eq!(error.to_string(), "stopped before all jobs had finished: 1 were given back while they ran");
    assert_eq!(db.job(short).await.state, "completed");
    let job = db.job(long).await;
    assert_eq!((job.state.as_str(), job.attempt, job.losses), ("ready", 0, 0));
    assert!(db.store.nodes().await.unwrap().is_empty(), "the lease ended");
}

#[actix::test]
async fn a_payload_that_does_not_fit_fails_with_its_path() {
    let db = database().await;
    let (node, _) = one_slot(&db).await;
    let id = db.client.enqueue(pgcue::NewJob::new("mood", r#"{"Block":"soon"}"#)).await.unwrap().id;
    let job = db.reaches(id, "failed").await;
    let error = job.error.unwrap();
    assert!(error.starts_with("payload does not fit the task: Block: invalid type: string"), "{error}");
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_kind_has_one_handler() {
    let db = database().await;
    let node = Node::new(db.config()).await.unwrap();
    let twice = node.handle_fn(|job: Job<Mood>| act(job, 0)).handle_fn(|job: Job<Mood>| act(job, 0));
    let error = twice.start().await.err().unwrap();
    assert_eq!(error.to_string(), "kind \"mood\" has two handlers; register it once");
}

#[actix::test]
async fn one_slot_starts_jobs_in_the_order_of_the_line() {
    let db = database().await;
    let sql = db.sql().await;
    // In the order of their pages they would start from 1 on.
    sql.batch_execute(
        "insert into jobs (kind, priority, expected_at) select 'noop', p, e
         from unnest(array[-2, 0, 7, 0, 7], array['infinity', 'infinity', 'infinity', '2030-01-01', '2031-01-01']::timestamptz[])
           with ordinality j(p, e, n) order by n",
    )
    .await
    .unwrap();
    let queues = [("default".to_owned(), QueueConfig { slots: 1, threads: 1 })].into();
    let node = Node::new(Config { demo: true, queues, ..db.config() }).await.unwrap().start().await.unwrap();
    let finished = async || value::<i64>(&sql, "select count(*) from finished_jobs").await == 5;
    eventually("all are finished", Duration::from_secs(30), finished).await;
    let order: Vec<i64> = value(&sql, "select array_agg(id order by finished_at, started_at) from finished_jobs").await;
    assert_eq!(order, [5, 3, 4, 2, 1]);
    node.drain().await.unwrap();
}
