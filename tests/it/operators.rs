//! What operators see of cursors and do to them, through the real program.

use std::time::Duration;

use pgcue::{NewJob, OnFailure};

use crate::cli::run;
use crate::support::{Db, database, value};

async fn cursors(db: &Db, arguments: &[&str]) -> (i32, String, String) {
    let mut all = vec!["cursors"];
    all.extend(arguments);
    run(&db.url, &all).await
}

async fn status(db: &Db, key: &str) -> serde_json::Value {
    let (_, text, _) = cursors(db, &["show", key, "--json"]).await;
    serde_json::from_str(&text).unwrap()
}

async fn why(db: &Db, id: i64) -> String {
    run(&db.url, &["why", &id.to_string()]).await.1
}

#[actix::test]
async fn each_status_is_seen_and_each_verb_works_while_jobs_run() {
    let db = database().await;
    let sql = db.sql().await;
    let ids = db
        .client
        .enqueue_many((1..=3).map(|n| NewJob::new("append", format!(r#"{{"n":{n}}}"#)).cursor("a")))
        .await
        .unwrap();
    let [first, second, third] = [ids[0].id, ids[1].id, ids[2].id];
    assert!(why(&db, second).await.contains("none that lives serves queue default and kind append"));
    let claim = async || sql.query_one("select id, token from claim(lease_for => '1 h')", &[]).await.unwrap();
    let row = claim().await;
    let token: i64 = row.get(1);
    assert_eq!(row.get::<_, i64>(0), first);

    assert_eq!((&status(&db, "a").await["status"], &status(&db, "a").await["waiting"]), (&"owned".into(), &2.into()));
    assert!(why(&db, second).await.contains("waits for its cursor a, which node"), "{}", why(&db, second).await);
    assert!(why(&db, first).await.starts_with(&format!("job {first} runs on node")));
    let (code, _, error) = cursors(&db, &["skip", "a"]).await;
    assert!(code == 1 && error.contains("is owned") && error.contains("Halt it"), "{error}");
    let (code, _, error) = cursors(&db, &["set-state", "a", "[9]"]).await;
    assert!(code == 1 && error.contains("is owned"), "{error}");
    let (code, said, _) = cursors(&db, &["release", "a"]).await;
    assert_eq!((code, said.as_str()), (0, "cursor a is released; 1 jobs went back\n"));
    let error = sql.batch_execute(&format!("select settle({first}, {token})")).await.unwrap_err();
    assert!(
        error.as_db_error().unwrap().message().contains("not running under this token"),
        "the old owner is refused"
    );
    assert_eq!(db.job(first).await.attempt, 0, "uncounted");

    let row = claim().await;
    let retry = format!("select settle({first}, {}, 'retry', delay => '1 h', error => 'boo')", row.get::<_, i64>(1));
    sql.batch_execute(&retry).await.unwrap();
    assert_eq!(
        (&status(&db, "a").await["status"], &status(&db, "a").await["held_by"]),
        (&"held".into(), &first.into())
    );
    let sentence = why(&db, first).await;
    assert!(sentence.contains("for attempt 2 of 25; the last one ended with: boo"), "{sentence}");
    sql.batch_execute("select begin_lease(1, 'n', '1 h')").await.unwrap();
    let sentence = why(&db, second).await;
    assert!(sentence.contains(&format!("which job {first} holds until it runs again at")), "{sentence}");
    assert_eq!(cursors(&db, &["skip", "a"]).await.1, format!("job {first} of cursor a is cancelled\n"));
    assert_eq!(status(&db, "a").await["status"], "idle");

    cursors(&db, &["halt", "a"]).await;
    assert!(sql.query("select claim()", &[]).await.unwrap().is_empty(), "halted");
    assert!(why(&db, third).await.contains("halted since") && why(&db, third).await.contains("by an operator"));
    assert_eq!(cursors(&db, &["set-state", "a", r#"{"b": 1, "a": 2}"#]).await.0, 0);
    assert_eq!(status(&db, "a").await["state"].to_string(), r#"{"a":2,"b":1}"#);
    let (code, _, error) = cursors(&db, &["delete", "a"]).await;
    assert!(code == 1 && error.contains("2 jobs wait for cursor a"), "{error}");
    assert_eq!(cursors(&db, &["resume", "a"]).await.1, "cursor a goes on\n");
    assert!(why(&db, second).await.contains("is the next in line"));
    assert!(why(&db, third).await.contains("1 jobs stand before it"));
    for id in [second, third] {
        assert_eq!(cursors(&db, &["skip", "a"]).await.1, format!("job {id} of cursor a is cancelled\n"));
    }
    assert_eq!(cursors(&db, &["skip", "a"]).await.1, "no job of cursor a waits\n");
    let (_, table, _) = cursors(&db, &["list"]).await;
    assert!(table.starts_with("KEY  STATUS") && table.contains("a    idle"), "{table}");
    assert_eq!(cursors(&db, &["delete", "a"]).await.0, 0);
    let (code, _, error) = cursors(&db, &["show", "a"]).await;
    assert_eq!((code, error.as_str()), (1, "pgcue: there is no cursor a in queue default\n"));
    let (code, _, error) = cursors(&db, &["halt", "a"]).await;
    assert!(code == 1 && error.contains("there is no cursor a in queue default"), "{error}");
    assert!(why(&db, first).await.contains("was cancelled at"));
    assert_eq!(why(&db, 99).await, "job 99 does not exist\n");
    let (code, _, error) = cursors(&db, &["set-state", "a", "[1,"]).await;
    assert!(code == 64 && error.starts_with("pgcue: state is [1,: malformed JSON"), "{error}");
}

#[actix::test]
async fn a_failure_may_halt_its_cursor_until_it_is_resumed() {
    let db = database().await;
    let node = db.demo_node().await.start().await.unwrap();
    let append = |n: i64| NewJob::new("append", format!(r#"{{"n":{n}}}"#)).cursor("a");
    let bad = NewJob::new("panic", "1").cursor("a").max_attempts(1).on_failure(OnFailure::Halt);
    let ids = db.client.enqueue_many([append(1), bad, append(2)]).await.unwrap();
    db.reaches(ids[1].id, "failed").await;
    assert_eq!(
        (&status(&db, "a").await["status"], &status(&db, "a").await["halted_by"]),
        (&"halted".into(), &ids[1].id.into())
    );
    assert!(why(&db, ids[2].id).await.contains(&format!("by the failure of job {}", ids[1].id)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(db.job(ids[2].id).await.attempt, 0, "nothing of it starts");
    cursors(&db, &["resume", "a"]).await;
    db.reaches(ids[2].id, "completed").await;
    let state: serde_json::Value = value(&db.sql().await, "select state from cursors").await;
    assert_eq!(state, serde_json::json!([1, 2]));
    node.drain().await.unwrap();
}

#[actix::test]
async fn a_queue_may_keep_nothing_of_what_completes() {
    let db = database().await;
    let sql = db.sql().await;
    // Two jobs of a cursor complete, and one fails.
    let three = async || {
        let n = |n| NewJob::new("append", format!(r#"{{"n":{n}}}"#)).cursor("a");
        db.client.enqueue_many((1..=2).map(n)).await.unwrap();
        db.client.enqueue(NewJob::new("fail", "null")).await.unwrap();
        for _ in 0..3 {
            let settle =
                "select settle(c.id, c.token, case kind when 'fail' then 'failed' else 'completed' end) from claim() c";
            sql.batch_execute(settle).await.unwrap();
        }
    };
    let history = async || {
        let of = "select coalesce(string_agg(state || coalesce(' ' || cursor_version, ''), ', ' order by id), '') from finished_jobs";
        sql.query_one(of, &[]).await.unwrap().get::<_, String>(0)
    };
    sql.batch_execute("select keep_history('default', false)").await.unwrap();
    three().await;
    assert_eq!(history().await, "failed");
    sql.batch_execute("select keep_history('default', true)").await.unwrap();
    three().await;
    assert_eq!(history().await, "failed, completed 3, completed 4, failed");
    sql.batch_execute("select keep_history('default', false)").await.unwrap();
    three().await;
    sql.batch_execute("select keep_history('default', true), keep_history('default', true)").await.unwrap();
    three().await;
    assert_eq!(history().await, "failed, completed 3, completed 4, failed, failed, completed 7, completed 8, failed");
    assert_eq!(run(&db.url, &["verify"]).await.0, 0, "what was not kept is no gap");
}
