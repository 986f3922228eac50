//! Bad input of every sort, with a real node: a clear error or a clear outcome, and a node that goes on.

use std::time::Duration;

use pgcue::config::QueueConfig;
use pgcue::store::CursorVerb;
use pgcue::{Collapse, Config, Job, JobError, JobResult, NewJob, Node, Outcome, RetryPolicy, Running, Task};
use serde::{Deserialize, Serialize};

use crate::cli::{pgcue, run};
use crate::support::{Db, database, eventually, value};

/// What a job may ask of its handler.
#[derive(Serialize, Deserialize, Clone)]
enum Do {
    Nothing,
    PanicWith(u8),
    Spin(u64),
    Ignore,
    LongError,
    LongResult,
    LongState,
    OddTexts,
    SnoozeForEver,
    EnqueueThenBlock(u64),
}

impl Task for Do {
    const KIND: &'static str = "do";

    /// Nobody's idea of a delay.
    fn retry() -> RetryPolicy {
        RetryPolicy { base: Duration::MAX, factor: f64::INFINITY, max: Duration::MAX, jitter: 0.0 }
    }
}

async fn act(job: Job<Do>, client: pgcue::Client) -> JobResult {
    match job.args {
        Do::Nothing => {}
        Do::PanicWith(0) => std::panic::panic_any(7u32),
        Do::PanicWith(_) => panic!("{}", "ä\0".repeat(5 << 20)),
        Do::Spin(ms) => {
            let begin = std::time::Instant::now();
            while begin.elapsed() < Duration::from_millis(ms) {
                std::hint::spin_loop();
            }
        }
        Do::Ignore => loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
        },
        Do::LongError => return Err(JobError::fatal("ö".repeat(5 << 20))),
        Do::LongResult => return Outcome::result(&"r".repeat(10 << 20)),
        Do::LongState => return Outcome::state(&"s".repeat(10 << 20)),
        Do::OddTexts => {
            let odd = serde_json::json!({"nul": "a\0b", "\0": String::from_utf8_lossy(&[0xff, b'x', 0xc3])});
            return Outcome::Fail("nul \0 and \u{fffd}".into()).with_result(&odd)?.with_state(&odd);
        }
        Do::SnoozeForEver => return Ok(Outcome::Snooze(Duration::MAX)),
        Do::EnqueueThenBlock(ms) => {
            // Many at once, so that the pool makes new connections here.
            let jobs = (0..12).map(|_| client.enqueue(Do::Nothing));
            for enqueued in futures_util::future::join_all(jobs).await {
                enqueued?;
            }
            std::thread::sleep(Duration::from_millis(ms));
        }
    }
    Ok(Outcome::Complete)
}

async fn node(db: &Db, slots: usize, threads: usize) -> Running {
    let queues = [("default".to_owned(), QueueConfig { slots, threads })].into();
    let node = Node::new(Config { demo: true, queues, connections: 12, ..db.config() }).await.unwrap();
    let client = node.client();
    node.handle_fn(move |job| act(job, client.clone())).start().await.unwrap()
}

/// The node takes new work, and all its actors live.
async fn lives(db: &Db, node: &Running) {
    let id = db.client.enqueue(NewJob::new("noop", "1").priority(i16::MAX)).await.unwrap().id;
    db.reaches(id, "completed").await;
    let observed = node.observe().await;
    assert!(observed.iter().all(|(_, actor)| actor.state != "gone"), "{observed:?}");
}

#[actix::test]
async fn any_json_text_is_kept_to_the_letter_and_shown() {
    let db = database().await;
    let node = node(&db, 4, 4).await;
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    for text in [
        deep.as_str(),
        r#""\ud800""#,
        r#"{"\u0000":"\u0000"}"#,
        r#"{"\udfff\ud800":1}"#,
        r#"{"a":1,"a":2,"a":{"a":3,"a":4}}"#,
        "1e400000",
        "-0.0000000000000000000000000000000000000000000000000000000000000001e-99999",
        "  [1 ,\t2\r\n]  ",
    ] {
        let echo = db.client.enqueue(NewJob::new("echo", text)).await.unwrap().id;
        let typed = db.client.enqueue(NewJob::new("do", text)).await.unwrap().id;
        let job = db.reaches(echo, "completed").await;
        let shown = &text[..text.len().min(40)];
        assert_eq!(job.payload.unwrap().get().trim(), text.trim(), "{shown}");
        assert_eq!(job.result.unwrap().get().trim(), text.trim(), "{shown}");
        let error = db.reaches(typed, "failed").await.error.unwrap();
        assert!(error.starts_with("payload does not fit the task: "), "{shown}: {error}");
        for form in [vec!["jobs", "show"], vec!["jobs", "show", "--json"]] {
            let id = echo.to_string();
            let (code, out, error) = run(&db.url, &[form.as_slice(), &[id.as_str()]].concat()).await;
            assert!(code == 0 && out.contains(text.trim()), "{form:?} {shown}: {error}");
        }
        assert!(db.store.why(typed).await.unwrap().contains("failed at"));
    }
    // What not even PostgreSQL reads is said to be the payload.
    let deeper = "[".repeat(1_000_000) + &"]".repeat(1_000_000);
    for error in [
        db.client.enqueue(NewJob::new("echo", &*deeper).headers(&serde_json::json!({}))).await.unwrap_err(),
        db.client.enqueue(NewJob::new("echo", &*deeper).collapse_key("k").collapse(Collapse::Keep)).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("payload is"), "{error}");
        assert_eq!(error.exit_code(), 64);
    }
    lives(&db, &node).await;
    node.drain().await.unwrap();
}

#[actix::test]
async fn bad_names_and_times_are_refused_with_field_value_and_fix() {
    let db = database().await;
    let noop = || NewJob::new("noop", "1");
    for (job, says) in [
        (NewJob::new("a\0b", "1"), r#"kind is "a\0b": leave out the NUL character"#),
        (noop().queue("\0"), r#"queue is "\0": leave out the NUL character"#),
        (noop().cursor("k\0"), r#"cursor_key is "k\0": leave out the NUL character"#),
        (noop().collapse(Collapse::Keep).collapse_key("\0k"), "collapse_key is"),
        (noop().timeout(Duration::from_nanos(1)), "timeout is 1ns: give a microsecond to 1000 years"),
        (noop().timeout(Duration::MAX), "timeout is 18446744073709551615.999999999s: give"),
        (noop().delay(Duration::MAX), "delay is 18446744073709551615.999999999s: give up to 1000 years"),
        (noop().expected_at(jiff::Timestamp::MIN), "expected_at is -009999-01-02T01:59:59Z: give a time"),
        (noop().headers(&serde_json::json!({"a": "x".repeat(2 << 20)})), "headers is 2097160 bytes long: the limit is"),
        (
            NewJob::new("noop", format!("\"{}\"", "x".repeat(100 << 20))),
            "payload is 104857602 bytes long: the limit is",
        ),
    ] {
        let copied = db.client.copy([Ok(job.clone())]).await.unwrap_err().to_string();
        let error = db.client.enqueue(job).await.unwrap_err();
        assert!(error.to_string().contains(says) && error.exit_code() == 64, "{error}");
        assert!(copied.contains(says) || says.starts_with("collapse"), "{copied}");
    }
    let error = db.store.cursor(CursorVerb::Halt, "default", "a\0").await.unwrap_err();
    assert_eq!(error.to_string(), r#"cursor_key is "a\0": leave out the NUL character"#);
    let error = db.store.set_cursor_state("\0", "a", None).await.unwrap_err();
    assert_eq!(error.to_string(), r#"queue is "\0": leave out the NUL character"#);
    let sql = db.sql().await;
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
    // The furthest that is allowed works.
    let furthest = noop().timeout(Duration::from_secs(360_000 * 86_400)).delay(Duration::from_secs(360_000 * 86_400));
    let id = db.client.enqueue(furthest.expected_at(jiff::Timestamp::MAX)).await.unwrap().id;
    assert_eq!(db.job(id).await.state, "scheduled");
}

#[actix::test]
async fn what_cannot_be_merged_is_said_and_harms_no_other_call() {
    let db = database().await;
    let merge = |payload: &str| NewJob::new("k", payload).collapse_key("x").collapse(Collapse::Merge);
    for bad in [r#"{"a":"\u0000"}"#, r#"{"\ud800":1}"#, r#"{"a":1e400000}"#] {
        let error = db.client.enqueue(merge(bad)).await.unwrap_err().to_string();
        assert!(error.contains("payload cannot be merged: ") && error.contains("on_conflict"), "{error}");
    }
    let first = db.client.enqueue(merge(r#"{"a":1}"#)).await.unwrap();
    let second = db.client.enqueue(merge(r#"{"b":2}"#)).await.unwrap();
    assert_eq!((second.id, second.collapsed), (first.id, true));
    assert_eq!(db.job(first.id).await.payload.unwrap().get(), r#"{"a": 1, "b": 2}"#);
    let replaced = db.client.enqueue(merge(r#"["\u0000"]"#)).await.unwrap();
    assert_eq!((replaced.id, replaced.collapsed), (first.id, true), "what is no object is replaced");
    // One that was enqueued otherwise and waits is named.
    let kept = merge(r#"{"a":"\u0000"}"#).collapse(Collapse::Replace);
    db.client.enqueue(kept).await.unwrap();
    let error = db.client.enqueue(merge("{}")).await.unwrap_err().to_string();
    assert!(error.contains(&format!("payload of waiting job {} cannot be merged", first.id)), "{error}");
}

/// Whatever a handler does costs its attempt, and says so; the slots beside it, also of the same thread, and the
/// jobs after it do not notice.
#[actix::test]
async fn unruly_handlers_cost_their_attempt_only() {
    let db = database().await;
    let node = node(&db, 8, 2).await;
    let once = |what: Do| what.job().max_attempts(1);
    let short = |what: Do| once(what).timeout(Duration::from_millis(200));
    let beside = db.client.enqueue(NewJob::new("sleep", r#"{"ms":300}"#)).await.unwrap().id;
    for (job, state, says) in [
        (once(Do::PanicWith(0)), "failed", "panicked: a value that is no text at tests/it/inputs.rs"),
        (once(Do::PanicWith(1)), "failed", "panicked: ä\u{fffd}ä\u{fffd}"),
        (short(Do::Ignore), "failed", "timed out after 200ms"),
        (once(Do::LongError), "failed", "öööö"),
        (once(Do::LongResult), "completed", "the result of 10485762 bytes was dropped: the limit is 65536"),
        (once(Do::LongState).cursor("long"), "failed", "the cursor state of 10485762 bytes was refused"),
        (once(Do::OddTexts).cursor("odd"), "failed", "nul \u{fffd} and \u{fffd}"),
        (short(Do::Spin(3_000)), "failed", "blocked its thread beyond its timeout of 200ms; the slot was rebuilt"),
    ] {
        let id = db.client.enqueue(job).await.unwrap().id;
        let job = db.reaches(id, state).await;
        let error = job.error.unwrap();
        assert!(error.starts_with(says) && error.len() < 70_000, "{says}: {}", &error[..error.len().min(200)]);
        assert!(state == "completed" || db.store.why(id).await.unwrap().contains(says), "why says it too");
        lives(&db, &node).await;
    }
    assert_eq!(db.reaches(beside, "completed").await.attempt, 1);
    let cursor = |key: &'static str| pgcue::store::CursorFilter {
        queue: "default".into(),
        key: Some(key.into()),
        status: None,
        limit: 1,
    };
    let odd = db.store.cursors(&cursor("odd")).await.unwrap().pop().unwrap();
    assert_eq!(odd.state.unwrap().get(), "{\"\\u0000\":\"\u{fffd}x\u{fffd}\",\"nul\":\"a\\u0000b\"}");
    assert!(db.store.cursors(&cursor("long")).await.unwrap().pop().unwrap().state.is_none());
    // Delays that no calendar holds.
    let snoozes = db.client.enqueue(Do::SnoozeForEver).await.unwrap().id;
    let retries = db.client.enqueue(Do::PanicWith(0)).await.unwrap().id;
    for id in [snoozes, retries] {
        let job = db.reaches(id, "scheduled").await;
        assert!(job.run_at.to_string().starts_with("30"), "in a thousand years, {}", job.run_at);
    }
    lives(&db, &node).await;
    node.drain().await.unwrap();
}

/// A handler shares the node's connections; those that were made for it must not block with its thread.
#[actix::test]
async fn a_handler_that_enqueues_and_blocks_takes_no_connection_with_it() {
    let db = database().await;
    let node = node(&db, 4, 4).await;
    let block = Do::EnqueueThenBlock(40_000).job().max_attempts(1).timeout(Duration::from_secs(8));
    let id = db.client.enqueue(block).await.unwrap().id;
    let sql = db.sql().await;
    eventually("it has enqueued", Duration::from_secs(20), || async {
        value::<i64>(&sql, "select count(*) from all_jobs").await == 13
    })
    .await;
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        lives(&db, &node).await;
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "took {:?}", begin.elapsed());
    let error = db.reaches(id, "failed").await.error.unwrap();
    assert!(error.starts_with("blocked its thread"), "{error}");
    node.drain().await.unwrap();
}

/// A node that is a process of its own, killed when this is dropped.
struct Process(std::process::Child);

impl Process {
    fn start(db: &Db) -> Self {
        let mut command = pgcue(&db.url);
        command.args(["run", "--demo", "--queue", "default", "--slots", "4"]).stderr(std::process::Stdio::null());
        Process(command.spawn().unwrap())
    }

    /// The most memory that it has had, in MiB.
    fn peak(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Payloads that only plain SQL lets in: they run, a slot at a time, and what waits in memory stays small.
#[actix::test]
async fn large_payloads_run_without_filling_the_memory() {
    let db = database().await;
    let sql = db.sql().await;
    let many = if std::env::var_os("LONG_TESTS").is_some() { 1000 } else { 400 };
    sql.batch_execute(&format!(
        "insert into jobs (kind) select 'noop' from generate_series(1, 2000); -- many are claimed at once from here on
         insert into jobs (kind, payload) select 'noop', to_json(repeat('x', 1 << 20)) from generate_series(1, {many});
         insert into jobs (kind, payload, cursor_key)
           select 'noop', to_json(repeat('z', 1 << 20)), 'c' || n % 3 from generate_series(1, 100) n",
    ))
    .await
    .unwrap();
    let node = Process::start(&db);
    let all_ran = || async { value::<i64>(&sql, "select count(*) from jobs").await == 0 };
    eventually("all ran", Duration::from_secs(120), all_ran).await;
    let peak = node.peak();
    sql.batch_execute("insert into jobs (kind, payload) select 'noop', to_json(repeat('y', 100 << 20))").await.unwrap();
    eventually("the largest ran", Duration::from_secs(60), all_ran).await;
    println!("{} payloads of 1 MiB: {peak} MiB at most; one of 100 MiB: {} MiB", many + 100, node.peak());
    assert!(peak < 150, "{peak} MiB");
    let ended = "select string_agg(distinct state::text || attempt, ' ') from finished_jobs";
    assert_eq!(value::<String>(&sql, ended).await, "completed1");
}

/// SQL consumers get every payload with the claim.
#[actix::test]
async fn a_claim_in_sql_brings_large_payloads() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute("insert into jobs (kind, payload) select 'k', to_json(repeat('x', 1 << 20))").await.unwrap();
    assert_eq!(value::<i32>(&sql, "select octet_length(payload::text) from claim()").await, (1 << 20) + 2);
}

#[actix::test]
async fn a_node_lives_through_whatever_stands_in_the_tables() {
    let db = database().await;
    let sql = db.sql().await;
    sql.batch_execute(
        "insert into jobs (kind, priority) values ('noop', -32768), ('noop', 32767);
         insert into jobs (kind, queue) values (E'new\\nline\\t\\x1b[2J', 'default'), ('noop', E'q\\n');
         insert into jobs (kind, run_at) values ('noop', '4713-01-01 BC'), ('noop', '294276-12-31');
         insert into jobs (kind, created_at) values ('noop', '294276-12-31'), ('noop', '4713-01-01 BC');
         insert into jobs (kind, timeout) values ('noop', '1 microsecond'), ('noop', '1000 years');
         insert into jobs (kind, headers) values ('noop', '[1]'), ('noop', 'null'), ('noop', '\"\\ud800\"');
         insert into jobs (kind, expected_at) values ('noop', '-infinity'), ('noop', '4713-01-01 BC'), ('noop', '294276-12-31');
         insert into jobs (kind, cursor_key, payload) select 'append', repeat('🐘', 256), '{\"n\":1}' from generate_series(1, 3);
         insert into jobs (kind, cursor_key, expected_at) values ('noop', E'\\n', '-infinity'), ('noop', E'\\n', '294276-12-31');
         insert into jobs (kind, attempt, max_attempts) values ('noop', 32767, 1)",
    )
    .await
    .unwrap();
    let node = node(&db, 4, 4).await;
    let foreign = r"queue <> 'default' or kind like E'new\n%' or run_at > now()";
    eventually("all that can run has", Duration::from_secs(30), || async {
        value::<i64>(&sql, &format!("select count(*) from jobs where not ({foreign})")).await == 0
    })
    .await;
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 3, "foreign ones, and one for later");
    let ended = "select string_agg(distinct state::text || ' ' || coalesce(error, ''), ', ') from finished_jobs";
    let ended = value::<String>(&sql, ended).await;
    assert!(ended == "completed " || ended == "completed , failed timed out after 1ms", "{ended}");
    for arguments in [["jobs", "list", "--limit", "100"], ["cursors", "list", "--limit", "100"]] {
        let (code, out, error) = run(&db.url, &arguments).await;
        assert!(code == 0 && !out.contains('\x1b'), "{arguments:?}: {error}");
    }
    let list = run(&db.url, &["jobs", "list", "--limit", "100"]).await.1;
    assert_eq!(list.lines().count(), 1 + 22, "a line a job: {list}");
    for id in value::<Vec<i64>>(&sql, "select array_agg(id) from all_jobs").await {
        let (code, _, error) = run(&db.url, &["jobs", "show", &id.to_string()]).await;
        assert_eq!((code, error.as_str()), (0, ""));
        db.store.why(id).await.unwrap();
    }
    lives(&db, &node).await;
    node.drain().await.unwrap();
}
