//! `pgcue bench`: every subcommand, briefly. What is asserted is that it ran and what it left, never how fast it was.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::cli::{pgcue, run};
use crate::support::{connect, empty_database, eventually, server, value};

const SCHEMAS: &str = "select count(*) from pg_namespace where nspname like 'pgcue%'";
const SESSIONS: &str = "select count(*) from pg_stat_activity \
    where datname = current_database() and application_name like 'pgcue%' and pid <> pg_backend_pid()";

/// Run it in a database of its own: what it reports.
async fn bench(arguments: &[&str]) -> Value {
    let url = empty_database().await;
    let (code, text, error) = run(&url, &[&["bench", "--json"], arguments].concat()).await;
    assert_eq!(code, 0, "{arguments:?}: {error}");
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e} in {text}"));
    assert_eq!(report["bench"], arguments[0]);
    assert_eq!(report["settings"]["fsync"], "off");
    assert_eq!((report["private_server"].as_bool(), report["server_cpu_seconds"].is_null()), (Some(false), true));
    let sql = connect(&url).await;
    assert_eq!(value::<i64>(&sql, SCHEMAS).await, 0, "the schema is gone");
    assert_eq!(value::<i64>(&sql, "select count(*) from pg_class where relname like '%jobs%'").await, 0);
    report
}

/// These figures are there, and greater than zero.
fn positive(report: &Value, names: &[&str]) {
    for name in names {
        let found = name.split(' ').fold(report, |value, field| &value[field]);
        assert!(found.as_f64().is_some_and(|n| n > 0.0), "{name} is {found} in {report:#}");
    }
}

#[actix::test]
async fn burn_down_runs_beside_the_bare_limit() {
    let report = bench(&["burn-down", "--jobs", "300", "--rounds", "2", "--batch", "100"]).await;
    assert_eq!((report["jobs"].as_i64(), report["rounds"].as_array().map(Vec::len)), (Some(300), Some(2)));
    positive(&report, &["ratio", "bare_jobs_per_second", "jobs_per_second", "seconds", "wal_bytes_per_job"]);
    positive(&report, &["commits_per_job", "wait_ms p50", "wait_ms p99", "run_ms p50"]);
    positive(&report["rounds"][1], &["ratio", "hot_update_share"]);
    let forgetful = bench(&["burn-down", "--jobs", "300", "--history", "off"]).await;
    positive(&forgetful, &["ratio", "bare_jobs_per_second"]);
    if std::path::Path::new("/proc/self/stat").exists() {
        positive(&report, &["node_rest_memory_bytes", "node_peak_memory_bytes"]);
    }
}

#[actix::test]
async fn burn_down_has_cursors_with_state_and_a_backdrop() {
    let report = bench(
        &[
            ["burn-down", "--jobs", "300", "--cursors", "7", "--state", "3000", "--payload", "500"].as_slice(),
            &[
                "--nodes",
                "2",
                "--slots",
                "4",
                "--backlog",
                "200",
                "--blocked",
                "250",
                "--scheduled",
                "30",
                "--bare-jobs",
                "0",
            ],
        ]
        .concat(),
    )
    .await;
    assert_eq!((report["jobs"].as_i64(), report["ratio"].is_null()), (Some(300), true));
    assert_eq!((report["options"]["cursors"].as_i64(), report["options"]["blocked"].as_i64()), (Some(7), Some(250)));
    positive(&report, &["jobs_per_second", "wait_ms p50"]);
    // The state is rewritten by each job, and so is in the WAL.
    assert!(report["wal_bytes_per_job"].as_f64().unwrap() > 1000.0, "{report:#}");
}

#[actix::test]
async fn latency_is_what_the_jobs_themselves_say() {
    let report = bench(&["latency", "--rate", "50", "--seconds", "1"]).await;
    assert_eq!(report["jobs"].as_i64(), Some(100), "and as many before that do not count");
    positive(&report, &["stamp_ms p50", "stamp_ms max", "enqueue_ms p50", "commits_per_job"]);
}

#[actix::test]
async fn enqueue_has_three_ways() {
    for mode in ["insert", "single", "many", "copy"] {
        let report = bench(&["enqueue", "--clients", "3", "--jobs", "310", "--rows", "100", "--mode", mode]).await;
        assert_eq!(report["jobs"].as_i64(), Some(310));
        positive(&report, &["ratio", "bare_jobs_per_second", "jobs_per_second", "call_ms p50", "bare_call_ms p50"]);
    }
    let report = bench(&["enqueue", "--clients", "2", "--jobs", "50", "--no-node", "--rounds", "2"]).await;
    assert_eq!((report["dead_tuples"].as_i64(), report["begun_meanwhile"].as_i64()), (Some(0), Some(0)), "{report:#}");
}

#[actix::test]
async fn soak_compares_what_is_pinned_with_what_was_before() {
    let report = bench(
        &[
            ["soak", "--rate", "300", "--minutes", "0.06", "--interval", "0.6", "--pin"].as_slice(),
            &["--cursors", "3", "--state", "100", "--backlog", "20", "--blocked", "20", "--scheduled", "20"],
        ]
        .concat(),
    )
    .await;
    let intervals = report["intervals"].as_array().unwrap();
    let pinned: Vec<bool> = intervals.iter().map(|row| row["pinned"].as_bool().unwrap()).collect();
    assert_eq!((pinned.len(), pinned[0], pinned[5]), (6, false, true), "{report:#}");
    assert_eq!((report["jobs"].as_i64(), report["peak_jobs_per_second"].is_null()), (Some(1080), true));
    positive(&report, &["throughput_ratio", "p99_ratio", "stamp_ms p99", "first_quarter p99_ms"]);
    assert!(report["trend_percent_per_million_jobs"].is_number(), "{report:#}");
}

#[actix::test]
async fn a_schema_that_bench_did_not_make_is_refused() {
    let url = empty_database().await;
    let sql = connect(&url).await;
    let short = ["bench", "burn-down", "--jobs", "10", "--json"];
    for (schema, flags) in [("pgcue_bench", vec![]), ("mine", vec!["--schema", "mine"])] {
        sql.batch_execute(&format!("create schema {schema}; create table {schema}.jobs as select 1 as id"))
            .await
            .unwrap();
        let (code, text, error) = run(&url, &[&short[..], &flags].concat()).await;
        assert_eq!((code, text.as_str()), (64, ""), "{error}");
        assert!(error.contains(&format!("schema is \"{schema}\": it is there already, and bench did not")), "{error}");
        assert_eq!(value::<i32>(&sql, &format!("select id from {schema}.jobs")).await, 1, "it is untouched");
    }
    // One that a bench left behind is used again, unless that bench still runs.
    sql.batch_execute("comment on schema mine is 'pgcue bench'").await.unwrap();
    sql.batch_execute("begin").await.unwrap();
    let lock = "select pg_try_advisory_xact_lock(hashtext('pgcue bench'), hashtext('mine'))";
    assert!(value::<bool>(&sql, lock).await);
    let (code, _, error) = run(&url, &[&short[..], &["--schema", "mine"]].concat()).await;
    assert!(code == 64 && error.contains("another pgcue bench is using it"), "{error}");
    sql.batch_execute("commit").await.unwrap();
    let (code, _, error) = run(&url, &[&short[..], &["--schema", "mine"]].concat()).await;
    assert_eq!(code, 0, "{error}");
    assert!(!value::<bool>(&sql, "select to_regnamespace('mine') is not null").await);
}

/// Ctrl-C cleans up. A bench that is killed leaves its schema, but no node.
#[actix::test]
async fn nodes_end_with_the_bench() {
    server();
    for signal in [Signal::INT, Signal::KILL] {
        let url = empty_database().await;
        let sql = connect(&url).await;
        let mut command = pgcue(&url);
        command.args(["bench", "soak", "--rate", "50", "--minutes", "30"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let leases = "select to_regclass('pgcue_bench.finished_jobs') is not null";
        let ran = "select exists (select from pgcue_bench.finished_jobs)";
        eventually("a node runs jobs", Duration::from_secs(60), || async {
            value::<bool>(&sql, leases).await && value::<bool>(&sql, ran).await
        })
        .await;
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        let interrupted = signal == Signal::INT;
        assert_eq!(status.code(), interrupted.then_some(1));
        assert_eq!(value::<i64>(&sql, SCHEMAS).await, i64::from(!interrupted));
        eventually("all sessions end", Duration::from_secs(60), || async { value::<i64>(&sql, SESSIONS).await == 0 })
            .await;
    }
}
