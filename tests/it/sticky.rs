//! Actors that stay with their cursor.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::prelude::*;
use pgcue::store::CursorVerb;
use pgcue::{Config, CursorLeft, CursorTask, Job, JobError, JobResult, Node, Outcome, Parting, Task};
use serde::{Deserialize, Serialize};

use crate::support::{Db, database, eventually};

#[derive(Serialize, Deserialize)]
enum Visit {
    Greet,
    Fail,
    Panic,
}

impl Task for Visit {
    const KIND: &'static str = "visit";
    const MAX_ATTEMPTS: u16 = 1;
}

impl CursorTask for Visit {
    type State = u32;
}

/// The partings that were told.
type Told = Arc<Mutex<Vec<(String, Parting)>>>;

/// Remembers how often it was visited since it was built.
struct Host {
    visits: u32,
    told: Told,
}

impl Actor for Host {
    type Context = Context<Self>;
}

impl Handler<Job<Visit>> for Host {
    type Result = JobResult;

    fn handle(&mut self, job: Job<Visit>, _: &mut Self::Context) -> JobResult {
        self.visits += 1;
        match job.args {
            Visit::Greet => {
                let sum = job.cursor()?.unwrap_or(0) + 1;
                Outcome::result(&self.visits)?.with_state(&sum)
            }
            Visit::Fail => Err(JobError::new("not today")),
            Visit::Panic => panic!("no"),
        }
    }
}

impl Handler<CursorLeft> for Host {
    type Result = ();

    fn handle(&mut self, CursorLeft { key, why }: CursorLeft, _: &mut Self::Context) {
        self.told.lock().unwrap().push((key.to_string(), why));
    }
}

async fn hosts(db: &Db, idle: Duration) -> (pgcue::Running, Told) {
    let told = Told::default();
    let config = Config { sticky_idle: idle, ..db.config() };
    let for_hosts = Arc::clone(&told);
    let node = Node::new(config).await.unwrap();
    let node = node.handle_sticky::<Visit, _>(move |_| Host { visits: 0, told: Arc::clone(&for_hosts) });
    (node.start().await.unwrap(), told)
}

/// One more visit; answers how many the actor remembers.
async fn visit(db: &Db, key: &str) -> u32 {
    let id = db.client.enqueue(Visit::Greet.job().cursor(key)).await.unwrap().id;
    db.reaches(id, "completed").await.result.unwrap().get().parse().unwrap()
}

async fn is_told(told: &Told, what: (&str, Parting)) {
    eventually(&format!("{what:?} in {told:?}"), Duration::from_secs(10), || async {
        told.lock().unwrap().iter().any(|(key, why)| (key.as_str(), *why) == what)
    })
    .await;
}

#[actix::test]
async fn an_actor_remembers_as_long_as_nobody_else_owns_its_cursor() {
    let db = database().await;
    let (first, told) = hosts(&db, Duration::from_secs(60)).await;
    assert_eq!((visit(&db, "a").await, visit(&db, "a").await, visit(&db, "b").await), (1, 2, 1));
    db.store.set_cursor_state("default", "a", Some("7")).await.unwrap();
    assert_eq!(visit(&db, "a").await, 1, "an operator changed the state: a new actor");
    is_told(&told, ("a", Parting::Elsewhere)).await;
    db.store.cursor(CursorVerb::Halt, "default", "a").await.unwrap();
    db.store.cursor(CursorVerb::Resume, "default", "a").await.unwrap();
    assert_eq!(visit(&db, "a").await, 2, "halting changes nothing of it");
    for bad in [Visit::Fail, Visit::Panic] {
        let id = db.client.enqueue(bad.job().cursor("a")).await.unwrap().id;
        db.reaches(id, "failed").await;
        assert_eq!(visit(&db, "a").await, 1, "after a failure it is built anew");
    }
    is_told(&told, ("a", Parting::Failed)).await;
    first.drain().await.unwrap();
    is_told(&told, ("b", Parting::Drained)).await;

    let (second, _) = hosts(&db, Duration::from_secs(60)).await;
    assert_eq!(visit(&db, "b").await, 1, "another node builds its own");
    let plain = db.client.enqueue(Visit::Greet).await.unwrap().id;
    let error = db.reaches(plain, "failed").await.error.unwrap();
    assert!(error.contains("enqueue it with a cursor"), "{error}");
    second.drain().await.unwrap();
}

#[actix::test]
async fn an_idle_actor_is_parted_with() {
    let db = database().await;
    let (node, told) = hosts(&db, Duration::from_millis(100)).await;
    assert_eq!(visit(&db, "a").await, 1);
    is_told(&told, ("a", Parting::Idle)).await;
    assert_eq!(visit(&db, "a").await, 1);
    node.drain().await.unwrap();
}
