//! Collapse: at most one job of a key waits for its first start, and no call is lost.

use std::time::Duration;

use pgcue::{Collapse, Enqueued, NewJob, Task};
use serde::{Deserialize, Serialize};

use crate::support::{database, value};

#[derive(Serialize, Deserialize, Debug, PartialEq)]
struct Notify {
    events: Vec<i64>,
}

impl Task for Notify {
    const KIND: &'static str = "notify";
}

fn job(payload: &str) -> NewJob {
    NewJob::new("k", payload).cursor("a")
}

#[actix::test]
async fn a_second_call_returns_the_waiting_job_and_says_so() {
    let db = database().await;
    for (policy, payload) in [
        (Collapse::Keep, r#"{"a":1,"b":1}"#),
        (Collapse::Replace, r#"{"b":2}"#),
        (Collapse::Merge, r#"{"a": 1, "b": 2}"#),
    ] {
        let kind = policy.as_str();
        let job = |payload: &str| NewJob::new(kind, payload).collapse_key("x").collapse(policy);
        let first = db.client.enqueue(job(r#"{"a":1,"b":1}"#)).await.unwrap();
        let second = db.client.enqueue(job(r#"{"b":2}"#)).await.unwrap();
        assert_eq!((first.collapsed, second), (false, Enqueued { id: first.id, collapsed: true }));
        assert_eq!(db.job(first.id).await.payload.unwrap().get(), payload, "{kind}");
        assert!(!db.client.enqueue(job("1").queue("other")).await.unwrap().collapsed, "another queue");
        assert!(!db.client.enqueue(job("1").collapse_key("y")).await.unwrap().collapsed, "another key");
    }
    let many = db.client.enqueue_many((0..3).map(|_| job("{}").collapse(Collapse::Keep))).await.unwrap();
    assert_eq!(many.iter().map(|e| e.collapsed).collect::<Vec<_>>(), [false, true, true], "on the cursor's key");
    assert!(!db.client.enqueue(job("{}")).await.unwrap().collapsed, "who does not ask does not collapse");
}

#[actix::test]
async fn the_earlier_time_wins_so_that_a_delay_throttles() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    let count = |delay: u64| {
        let job = NewJob::new("count", r#"{"n":1}"#).cursor("a").collapse(Collapse::Keep);
        job.delay(Duration::from_millis(delay))
    };
    let first = db.client.enqueue(count(60_000)).await.unwrap().id;
    for _ in 0..20 {
        assert_eq!(db.client.enqueue(count(400)).await.unwrap(), Enqueued { id: first, collapsed: true });
    }
    db.reaches(first, "completed").await;
    let sql = db.sql().await;
    assert_eq!(value::<serde_json::Value>(&sql, "select state from cursors").await, 1, "twenty-one calls, one run");
    let late = db
        .client
        .enqueue(NewJob::new("noop", "1").collapse_key("z").collapse(Collapse::Keep).delay(Duration::from_secs(60)));
    let late = late.await.unwrap().id;
    let now = db.client.enqueue(NewJob::new("noop", "1").collapse_key("z").collapse(Collapse::Keep)).await.unwrap();
    assert_eq!(now.id, late);
    db.reaches(late, "completed").await;
    node.drain().await.unwrap();
}

#[actix::test]
async fn rules_of_ones_own_are_a_closure_or_an_sql_expression() {
    let db = database().await;
    let notify = |n: i64| Notify { events: vec![n] }.job().collapse_key("user 1");
    let join = |mut waiting: Notify, new: Notify| {
        waiting.events.extend(new.events);
        waiting
    };
    let first = db.client.collapse_with(notify(1), join).await.unwrap();
    let second = db.client.collapse_with(notify(2), join).await.unwrap();
    assert_eq!((first.collapsed, second), (false, Enqueued { id: first.id, collapsed: true }));
    let mut connection = db.sql().await;
    let tx = connection.transaction().await.unwrap();
    db.client.within(&tx).collapse_with(notify(3), join).await.unwrap();
    // While the payload is being resolved nobody can start the job.
    assert!(db.sql().await.query("select id from claim()", &[]).await.unwrap().is_empty());
    tx.commit().await.unwrap();
    connection
        .batch_execute(
            r#"insert into jobs as j (kind, collapse_key, payload) values ('notify', 'user 1', '{"events": [4]}')
               on conflict (queue, kind, collapse_key) where collapse_key is not null do update set payload =
                 json_build_object('events', (j.payload::jsonb->'events') || (excluded.payload::jsonb->'events'))"#,
        )
        .await
        .unwrap();
    let payload = db.job(first.id).await.payload.unwrap();
    assert_eq!(serde_json::from_str::<Notify>(payload.get()).unwrap(), Notify { events: vec![1, 2, 3, 4] });
}

/// Many producers collapse on a few keys while nodes run: each call is in a run that started after it.
#[actix::test]
async fn no_call_is_lost_to_a_job_that_has_just_started() {
    let db = database().await;
    let nodes = [db.demo_node().await.start().await.unwrap(), db.demo_node().await.start().await.unwrap()];
    let producers = (0..6).map(|producer: i64| {
        let db = &db;
        async move {
            for call in 0..100i64 {
                let key = format!("k{}", call % 3);
                let payload = format!(r#"{{"{producer} {call}": {call}}}"#);
                let job = NewJob::new("echo", payload).collapse_key(key).collapse(Collapse::Merge);
                db.client.enqueue(job).await.unwrap();
            }
        }
    });
    futures_util::future::join_all(producers).await;
    let sql = db.sql().await;
    crate::support::eventually("all done", Duration::from_secs(30), || async {
        value::<i64>(&sql, "select count(*) from jobs").await == 0
    })
    .await;
    let calls = "select count(distinct key) from finished_jobs, lateral json_object_keys(result) key";
    assert_eq!(value::<i64>(&sql, calls).await, 600, "what the handler saw holds every call");
    let runs = value::<i64>(&sql, "select count(*) from finished_jobs").await;
    println!("600 calls, {runs} runs");
    assert!(runs < 600, "some collapsed");
    for node in nodes {
        node.drain().await.unwrap();
    }
}

#[actix::test]
async fn bad_keys_are_refused_with_the_field_and_the_fix() {
    let db = database().await;
    let refused = async |job: NewJob| db.client.enqueue(job).await.unwrap_err().to_string();
    let noop = || NewJob::new("noop", "1");
    assert_eq!(
        refused(noop().collapse(Collapse::Keep)).await,
        "collapse is without a key: give a cursor or a collapse_key"
    );
    assert!(refused(noop().collapse_key("x")).await.contains("say what to do on a conflict"));
    assert_eq!(refused(noop().cursor("")).await, "cursor_key is empty: give 1 to 1024 bytes");
    assert!(refused(noop().cursor("k".repeat(10_000))).await.contains("cursor_key is 10000 bytes long"));
    assert!(refused(noop().collapse(Collapse::Keep).collapse_key("")).await.contains("collapse_key is empty"));
    let error = db.client.copy([Ok(noop().cursor("a").collapse(Collapse::Keep))]).await.unwrap_err();
    assert!(error.to_string().contains("cannot be copied"), "{error}");
    let sql = db.sql().await;
    for (call, says) in [
        ("select collapse('noop')", "collapse_key is null: give a collapse_key or a cursor_key"),
        ("select collapse('noop', cursor_key => 'a', on_conflict => 'mix')", "give keep, replace or merge"),
        ("select enqueue('noop', cursor_key => '')", "cursor_key is empty: give 1 to 1024 bytes"),
        ("select enqueue('noop', cursor_key => repeat('k', 10000))", "kkk.. (10000 bytes): give 1 to 1024 bytes"),
    ] {
        let error = sql.batch_execute(call).await.unwrap_err();
        assert!(error.as_db_error().unwrap().message().contains(says), "{call}: {error:?}");
    }
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
}
