//! The command line as people use it: the real program, its output, its errors and its exit codes.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{database, empty_database, server, value};

/// The program with an environment of its own.
pub fn pgcue(url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgcue"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PGCUE_")) {
        command.env_remove(name);
    }
    command.env("DATABASE_URL", url).stdin(Stdio::null());
    command
}

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

pub async fn run(url: &str, arguments: &[&str]) -> (i32, String, String) {
    let mut command = pgcue(url);
    command.args(arguments);
    let output = output(command).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[actix::test]
async fn a_job_from_the_command_line_is_seen_by_it() {
    let db = database().await;
    let (code, id, _) =
        run(&db.url, &["enqueue", "echo", r#"{"hello": "world"}"#, "--priority", "-3", "--queue", &"q".repeat(200)])
            .await;
    assert_eq!((code, id.as_str()), (0, "1\n"));
    let (code, text, _) = run(&db.url, &["jobs", "show", "1", "--json"]).await;
    let job: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, job["state"].as_str(), job["priority"].as_i64()), (0, Some("ready"), Some(-3)));
    assert!(text.contains(r#""payload": {"hello": "world"}"#), "the text is kept: {text}");
    let mut command = pgcue(&db.url);
    command.args(["enqueue", "echo", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"[1]").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"2\n");
    let (_, list, _) = run(&db.url, &["jobs", "list", "--json", "--kind", "echo"]).await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&list).unwrap().as_array().unwrap().len(), 2);
    let (_, table, _) = run(&db.url, &["jobs", "list"]).await;
    assert!(table.starts_with("ID  STATE"), "{table}");
    let (code, status, _) = run(&db.url, &["status", "--json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!((code, status["live"][0]["state"].as_str()), (0, Some("ready")));
    let (code, _, error) = run(&db.url, &["jobs", "show", "99"]).await;
    assert_eq!((code, error.as_str()), (1, "pgcue: there is no job 99 in schema pgcue\n"));
}

#[actix::test]
async fn bad_input_names_the_field_and_enqueues_nothing() {
    let db = database().await;
    for (arguments, says) in [
        (vec!["enqueue", "k", "1", "--prioritty", "1"], "unexpected argument '--prioritty'"),
        (vec!["enqueue", "k", r#"{"a":}"#], r#"payload is {"a":}: malformed JSON: expected value at line 1 column 6"#),
        (vec!["enqueue", "k", "1", "--priority", "40000"], "40000 is not in -32768..=32767"),
        (vec!["enqueue", "k", "1", "--timeout", "-5s"], "timeout is \"-5s\": give a time such as 250ms, 30s"),
        (vec!["enqueue", "", "1"], "kind is empty: give 1 to 512 bytes"),
        (vec!["enqueue", "k", "1", "--queue", ""], "queue is empty: give 1 to 512 bytes"),
        (vec!["enqueue", "k", "1", "--cursor", ""], "cursor_key is empty: give 1 to 1024 bytes"),
        (vec!["enqueue", "k", "1", "--max-attempts", "0"], "max_attempts is 0: give 1 to 32767"),
        (vec!["enqueue", "k", "1", "--headers", "[1]"], "headers is [1]: give a JSON object"),
        (vec!["run", "--http", "here"], "http is \"here\": give an address"),
        (vec!["--database-url", "postgres://[", "status"], "database_url is malformed"),
    ] {
        let (code, _, error) = run(&db.url, &arguments).await;
        assert!(code == 64 && error.contains(says), "{arguments:?}: {code} {error}");
    }
    let mut limited = pgcue(&db.url);
    limited.env("PGCUE_MAX_PAYLOAD", "10").args(["enqueue", "k", r#""0123456789""#]);
    let error = String::from_utf8(output(limited).await.stderr).unwrap();
    assert!(error.contains("payload is 12 bytes long: the limit is 10 bytes (max_payload)"), "{error}");
    let sql = db.sql().await;
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
}

#[actix::test]
async fn a_file_is_enqueued_whole_or_not_at_all() {
    let db = database().await;
    let sql = db.sql().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let good = "{\"kind\":\"echo\",\"payload\":{\"a\": 1},\"queue\":\"q\",\"priority\":3,\"delay\":\"1h\",\"cursor\":\"c\"}\n\n{\"kind\":\"noop\"}\n";
    for (line, says) in [
        ("{\"kind\":\"k\",\"prioritty\":1}", "line 4: prioritty: unknown field `prioritty`"),
        ("{\"kind\":\"k\",\"priority\":40000}", "line 4: priority: invalid value: integer `40000`"),
        ("{\"kind\":", "line 4: kind: EOF while parsing a value at line 1 column 8"),
        ("{\"kind\":\"\"}", "line 4: kind is empty"),
        ("{\"payload\":1}", "line 4: missing field `kind`"),
    ] {
        std::fs::write(path, format!("{good}{line}\n")).unwrap();
        let (code, _, error) = run(&db.url, &["enqueue", "--file", path]).await;
        assert!(code == 64 && error.contains(says), "{line}: {code} {error}");
        assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
    }
    std::fs::write(path, good).unwrap();
    let (code, count, error) = run(&db.url, &["enqueue", "--file", path]).await;
    assert_eq!((code, count.as_str()), (0, "2\n"), "{error}");
    assert_eq!(
        value::<String>(&sql, "select string_agg(queue || kind || stage, ' ' order by kind) from jobs").await,
        "qechoscheduled defaultnoopready"
    );
}

#[actix::test]
async fn databases_that_cannot_be_used_are_named() {
    let url = empty_database().await;
    let (code, _, error) = run(&url, &["status"]).await;
    assert_eq!((code, error.as_str()), (1, "pgcue: schema \"pgcue\" is not there; run `pgcue migrate`\n"));
    let (code, text, _) = run(&url, &["migrate"]).await;
    assert_eq!((code, text.as_str()), (0, "schema pgcue is at version 1 (was 0)\n"));

    let down = "postgres://nobody@127.0.0.1:1/x";
    let (code, _, error) = run(down, &["enqueue", "noop"]).await;
    assert!(
        code == 1 && error.starts_with("pgcue: cannot connect to 127.0.0.1:1/x: ") && error.contains("refused"),
        "{error}"
    );
    let wrong = url.replacen("postgres://pgcue:", "postgres://pgcue:x", 1);
    let (_, _, error) = run(&wrong, &["enqueue", "noop"]).await;
    assert!(error.contains("password authentication failed for user \"pgcue\""), "{error}");
    assert!(!error.contains(&wrong), "the password is not repeated");

    let db = crate::support::Db::open(url.clone());
    let name = url.rsplit('/').next().unwrap();
    let sql = db.sql().await;
    sql.batch_execute(&format!("alter database {name} set default_transaction_read_only = on")).await.unwrap();
    for command in [vec!["enqueue", "noop"], vec!["migrate"], vec!["run", "--demo"]] {
        let (code, _, error) = run(&url, &command).await;
        assert!(code == 1 && error.contains("the server is read only"), "{command:?}: {error}");
    }
    sql.batch_execute("set transaction_read_only = off; set default_transaction_read_only = off").await.unwrap();
    sql.batch_execute(&format!(
        "alter database {name} reset default_transaction_read_only; update meta set version = 9"
    ))
    .await
    .unwrap();
    let (code, _, error) = run(&url, &["run", "--demo"]).await;
    assert!(code == 1 && error.contains("is at version 9, newer than this pgcue knows"), "{error}");
}

#[actix::test]
async fn the_configuration_is_checked_whole() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "lese = '3s'\n[queues.a]\nslots = 0\n").unwrap();
    let path = file.path().to_str().unwrap();
    let (code, _, error) = run("postgres://x@y/z", &["run", "--config", path, "--check-config"]).await;
    assert_eq!(code, 64);
    assert_eq!(
        error,
        "pgcue: lese is \"3s\": unknown key; did you mean lease?\n\
         pgcue: queues.a.slots is \"0\": give a whole number from 1 to 10000\n"
    );
    std::fs::write(file.path(), "lease = '3s'\n").unwrap();
    let (code, text, _) = run("postgres://x@y/z", &["run", "--config", path, "--check-config"]).await;
    assert_eq!((code, text.as_str()), (0, "the configuration is valid\n"));
}

/// The printed script makes the same schema as migrating, and may be run again.
#[actix::test]
async fn the_schema_is_printed_for_psql() {
    let url = empty_database().await;
    let (_, script, _) = run(&url, &["schema", "--schema", "jobs of mine"]).await;
    let sql = crate::support::connect(&url).await;
    sql.batch_execute(&script).await.unwrap();
    let (code, id, error) = run(&url, &["enqueue", "noop", "--schema", "jobs of mine"]).await;
    assert_eq!((code, id.as_str()), (0, "1\n"), "{error}");
    let (_, text, _) = run(&url, &["migrate", "--schema", "jobs of mine"]).await;
    assert_eq!(text, "schema jobs of mine is at version 1 (was 1)\n");
}

/// `pgcue dev`, as the README says it.
#[actix::test]
async fn dev_starts_everything_and_stops_it() {
    server(); // not while the shared server is being made
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready.json");
    let mut command = pgcue("");
    command.env_remove("DATABASE_URL").env("TMPDIR", dir.path());
    command.args(["dev", "--ephemeral", "--http", "127.0.0.1:0", "--ready-file"]).arg(&ready);
    let mut dev = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !ready.exists() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&ready).unwrap()).unwrap();
    let url = told["database_url"].as_str().unwrap();
    // Without any address, other commands of this user find it.
    let mut enqueue = pgcue("");
    enqueue.env_remove("DATABASE_URL").env("TMPDIR", dir.path()).args(["enqueue", "echo", r#"{"hello":"world"}"#]);
    let id = String::from_utf8(output(enqueue).await.stdout).unwrap();
    let db = crate::support::Db::open(url.to_owned());
    let job = db.reaches(id.trim().parse().unwrap(), "completed").await;
    assert_eq!(job.result.unwrap().get(), r#"{"hello":"world"}"#);
    let address = told["http"].as_str().unwrap().trim_start_matches("http://");
    for (path, says) in [
        ("/healthz", "ok"),
        ("/readyz", "ok"),
        ("/metrics", "pgcue_attempts_total{kind=\"echo\",outcome=\"completed\",queue=\"default\"} 1"),
    ] {
        let page = crate::deploy::get(address, path).await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains(says), "{path}: {page}");
    }
    drop(db);
    let pid = rustix::process::Pid::from_raw(dev.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = tokio::task::spawn_blocking(move || dev.wait().unwrap()).await.unwrap();
    assert!(status.success());
    assert!(crate::support::try_connect(url).await.is_err(), "the server is gone");
}
