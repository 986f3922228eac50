//! Putting jobs in, from Rust: what arrives, what is refused, and what a transaction decides.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use pgcue::{Error, NewJob};

use crate::support::{connect, database, value};

#[actix::test]
async fn every_option_arrives_by_each_way() {
    let db = database().await;
    let payload = r#"{ "b":1, "a":"\u0000\ud800", "b":2 }"#;
    let job = || {
        NewJob::new("kind", payload)
            .queue("a \"queue\"\twith\nodd \\ characters")
            .priority(-7)
            .expected_at("2030-01-01T00:00:00Z".parse().unwrap())
            .run_at("2031-01-01T00:00:00.123456Z".parse().unwrap())
            .max_attempts(3)
            .timeout(Duration::from_millis(1500))
            .cursor("key\t1")
            .headers(&serde_json::json!({"trace": "x"}))
    };
    let one = db.client.enqueue(job()).await.unwrap().id;
    let many = db.client.enqueue_many([job(), job()]).await.unwrap();
    assert_eq!(db.client.copy([Ok(job())]).await.unwrap(), 1);
    assert_eq!(many.iter().map(|e| e.id).collect::<Vec<_>>(), [one + 1, one + 2]);
    for id in one..one + 4 {
        let job = db.job(id).await;
        assert_eq!(job.payload.unwrap().get(), payload, "the text is kept");
        assert_eq!(job.queue, "a \"queue\"\twith\nodd \\ characters");
        assert_eq!((job.kind.as_str(), job.priority, job.max_attempts, job.timeout_ms), ("kind", -7, 3, Some(1500)));
        assert_eq!(job.expected_at.unwrap().to_string(), "2030-01-01T00:00:00Z");
        assert_eq!(job.run_at.to_string(), "2031-01-01T00:00:00.123456Z");
        assert_eq!(job.cursor_key.as_deref(), Some("key\t1"));
        assert_eq!(job.headers.unwrap().get(), r#"{"trace":"x"}"#);
        assert_eq!(job.state, "scheduled");
    }
}

#[actix::test]
async fn a_delay_counts_on_the_databases_clock() {
    let db = database().await;
    let job = || NewJob::new("kind", "1").delay(Duration::from_secs(60));
    db.client.enqueue(job()).await.unwrap();
    db.client.copy([Ok(job())]).await.unwrap();
    let sql = db.sql().await;
    let off: f64 = value(&sql, "select max(abs(extract(epoch from run_at - created_at) - 60))::float8 from jobs").await;
    assert!(off < 1.0, "{off} s off");
}

#[actix::test]
async fn a_job_exists_if_and_only_if_its_transaction_commits() {
    let db = database().await;
    let job = || NewJob::new("noop", "1");
    let mut plain = connect(&db.url).await;
    let tx = plain.transaction().await.unwrap();
    let gone = db.client.within(&tx).enqueue(job()).await.unwrap().id;
    tx.rollback().await.unwrap();
    let tx = plain.transaction().await.unwrap();
    let kept = db.client.within(&tx).enqueue(job()).await.unwrap().id;
    tx.commit().await.unwrap();
    db.client.within(&plain).enqueue(job()).await.unwrap();
    let mut pooled = db.store.connection().await.unwrap();
    db.client.within(&pooled).enqueue(job()).await.unwrap();
    let tx = pooled.transaction().await.unwrap();
    db.client.within(&tx).enqueue_many([job(), job()]).await.unwrap();
    db.client.within(&tx).copy([Ok(job())]).await.unwrap();
    tx.commit().await.unwrap();
    assert!(db.store.job(gone).await.unwrap().is_none());
    assert_eq!(db.job(kept).await.state, "ready");
    let sql = db.sql().await;
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 6);
}

#[actix::test]
async fn a_bad_job_leaves_nothing_behind() {
    let db = database().await;
    let sql = db.sql().await;
    let good = || NewJob::new("noop", "1");
    let bad = || NewJob::new("noop", "{\"a\":}");
    let error = db.client.enqueue_many([good(), bad()]).await.unwrap_err();
    assert!(
        matches!(&error, Error::Invalid(fault) if fault.field == "payload" && fault.fix.contains("line 1 column 6")),
        "{error}"
    );
    let jobs = (0..100_000).map(|n| if n == 99_999 { Ok(bad()) } else { Ok(good()) });
    assert!(db.client.copy(jobs).await.is_err());
    let too_large = NewJob::new("noop", format!("\"{}\"", "x".repeat(1 << 20)));
    assert!(db.client.enqueue(too_large).await.unwrap_err().to_string().contains("the limit is 1048576 bytes"));
    assert_eq!(value::<i64>(&sql, "select count(*) from jobs").await, 0);
    // The pool's connection is whole again after the broken COPY.
    db.client.enqueue(good()).await.unwrap();
}

#[actix::test]
async fn the_database_refuses_in_words_that_name_the_field() {
    let db = database().await;
    let sql = db.sql().await;
    for (statement, says) in [
        ("insert into jobs (kind) values ('')", "kind is empty: give 1 to 512 bytes"),
        ("insert into jobs (kind, queue) values ('k', '')", "queue is empty: give 1 to 512 bytes"),
        (
            "insert into jobs (kind, cursor_key) values ('k', repeat('x', 10000))",
            "xxx.. (10000 bytes): give 1 to 1024 bytes",
        ),
        (
            "insert into jobs (kind, timeout) values ('k', '-1 s')",
            "timeout is -00:00:01: give more than zero, up to 1000 years",
        ),
        ("insert into jobs (kind, collapse_key) values ('k', '')", "collapse_key is empty: give 1 to 1024 bytes"),
        (
            "insert into jobs (kind, created_at) values ('k', '-infinity')",
            "created_at is -infinity: give a finite time",
        ),
        ("select enqueue('k', run_at => 'infinity')", "run_at is infinity: give a finite time"),
        ("select enqueue('k', max_attempts => 0)", "max_attempts is 0: give 1 or more"),
        ("select enqueue('k', priority => 40000)", "priority is 40000: give -32768 to 32767"),
        ("select enqueue('k', '{\"a\":}')", "invalid input syntax for type json"),
        ("select settle(1, 1, 'done')", "outcome is done: give completed, failed, cancelled, retry, snooze or release"),
    ] {
        let error = sql.batch_execute(statement).await.unwrap_err();
        let message = error.as_db_error().unwrap().message();
        assert!(message.contains(says), "{statement}: {message}");
    }
    sql.batch_execute("insert into jobs (kind, queue) values ('k', repeat('q', 200))").await.unwrap();
}

/// A server with a self-signed certificate, as distributions set it up, works as it is; who asks for
/// verification gets it.
#[actix::test]
async fn tls_is_used_where_the_server_has_it_and_verified_on_request() {
    let server = pgcue::dev::PrivateServer::start(None, &["log_min_messages=fatal"]).unwrap();
    let url = server.url("postgres");
    let sql = connect(&url).await;
    if sql.batch_execute("alter system set ssl = on").await.is_err() {
        println!("this build of PostgreSQL has no TLS");
        return;
    }
    let data: String = value(&sql, "show data_directory").await;
    for (file, pem) in [("server.key", include_str!("tls/server.key")), ("server.crt", include_str!("tls/server.crt"))]
    {
        // The server wants its key to be its own, and closed to others.
        let path = std::path::Path::new(&data).join(file);
        std::fs::write(&path, pem).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let owner = std::fs::metadata(&data).unwrap();
        std::os::unix::fs::chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    let used = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    crate::support::eventually("encrypted by default", Duration::from_secs(10), || async {
        value::<bool>(&connect(&url).await, used).await
    })
    .await;
    let error = crate::support::try_connect(&format!("{url}?sslmode=require")).await.err().unwrap().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
    assert!(!value::<bool>(&connect(&format!("{url}?sslmode=disable")).await, used).await);
}
