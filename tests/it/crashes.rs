//! Nodes that are killed, servers that crash, producers that are slow: nothing is lost.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgcue::dev::PrivateServer;
use pgcue::{Config, NewJob};
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::pgcue;
use crate::support::{Db, database, eventually, value};

/// How many jobs; the documented long form is LONG_TESTS=1.
pub fn jobs(short: i64, long: i64) -> i64 {
    if std::env::var_os("LONG_TESTS").is_some() { long } else { short }
}

/// A node in a process of its own.
pub fn node(db: &Db) -> Child {
    let mut command = pgcue(&db.url);
    command.env("PGCUE_LEASE", "3s").env("PGCUE_LOG", "warn").args(["run", "--demo"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
}

pub async fn stop(mut child: Child) -> std::process::ExitStatus {
    signal(&child, Signal::TERM);
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
}

#[actix::test]
async fn the_jobs_of_a_killed_node_run_again_each_once_in_history() {
    let db = database().await;
    let sql = db.sql().await;
    let n = jobs(20_000, 100_000);
    sql.execute(
        "insert into jobs (kind, payload) select 'sleep', '{\"ms\":1}' from generate_series(1, $1::bigint)",
        &[&n],
    )
    .await
    .unwrap();
    let (mut victim, survivor) = (node(&db), node(&db));
    let held = "select coalesce(min(open), 0) from (select sum(open)::bigint as open from claims group by lease having count(*) > 0) l
        having count(*) = 2";
    eventually("both nodes hold leases", Duration::from_secs(20), || async {
        sql.query_opt(held, &[]).await.unwrap().is_some_and(|row| row.get::<_, i64>(0) > 0)
    })
    .await;
    victim.kill().unwrap();
    victim.wait().unwrap();
    let killed = Instant::now();
    let dead: i64 = value(&sql, "select lease from claims join leases on lease = id order by seen_at limit 1").await;
    let theirs: Vec<i64> =
        sql.query("select unnest(ids) from claims", &[]).await.unwrap().iter().map(|r| r.get(0)).collect();
    assert!(!theirs.is_empty() && dead != 0);
    // The killed node's lease ends, and what it held runs again, within the lease and five seconds.
    eventually("one lease left and its losses made good", Duration::from_secs(3 + 5), || async {
        value::<i64>(&sql, "select count(*) from leases").await == 1
    })
    .await;
    println!("the lease was ended {:?} after the kill", killed.elapsed());
    eventually("all done", Duration::from_secs(120), || async {
        value::<i64>(&sql, "select count(*) from jobs").await == 0
    })
    .await;
    let row = sql.query_one("select count(*), count(distinct id), count(*) filter (where state = 'completed'), count(*) filter (where losses > 0) from finished_jobs", &[]).await.unwrap();
    let counts: Vec<i64> = (0..4).map(|i| row.get(i)).collect();
    assert_eq!(counts[..3], [n, n, n]);
    println!("{} jobs were lost by the killed node and ran again", counts[3]);
    assert!(counts[3] > 0, "the fault must have hit something");
    let late: f64 = value(&sql, "select extract(epoch from max(started_at) filter (where losses > 0) - min(started_at) filter (where losses > 0))::float8 from finished_jobs").await;
    println!("they started within {late:.2} s of each other");
    assert!(stop(survivor).await.success());
}

#[actix::test]
async fn a_crash_of_the_server_under_load_loses_nothing() {
    let server = PrivateServer::start(None, &["log_min_messages=fatal"]).unwrap();
    let db = Db::open(server.url("postgres"));
    db.store.migrate().await.unwrap();
    let n = jobs(5_000, 100_000);
    let sql = db.sql().await;
    sql.execute(
        "insert into jobs (kind, payload) select 'sleep', '{\"ms\":2}' from generate_series(1, $1::bigint)",
        &[&n],
    )
    .await
    .unwrap();
    drop(sql);
    let config = Config { demo: true, lease: Duration::from_secs(10), ..db.config() };
    let node = pgcue::Node::new(config).await.unwrap().start().await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let server = tokio::task::spawn_blocking(move || {
        server.control(&["-m", "immediate", "restart"]).unwrap();
        server
    })
    .await
    .unwrap();
    let sql = db.sql().await;
    let left: i64 = value(&sql, "select count(*) from jobs").await;
    assert!(left > 0, "it must have crashed in the middle");
    eventually("all done after the restart", Duration::from_secs(60), || async {
        sql.query_one("select count(*) from jobs", &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    let row = sql
        .query_one("select count(*), count(distinct id) from finished_jobs where state = 'completed'", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (n, n));
    // Still listening: a new job is not left to a tick.
    let id = db.client.enqueue(NewJob::new("noop", "1")).await.unwrap().id;
    db.reaches(id, "completed").await;
    node.drain().await.unwrap();
    drop(server);
}

#[actix::test]
async fn sigterm_drains_and_the_exit_code_tells() {
    let db = database().await;
    let sleep = |ms: u64| db.client.enqueue(NewJob::new("sleep", format!("{{\"ms\":{ms}}}")));
    // Claimed is not yet started, and nobody shows that: so a moment more.
    let started = async |id| {
        db.reaches(id, "running").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let child = node(&db);
    let id = sleep(1500).await.unwrap().id;
    started(id).await;
    assert_eq!(stop(child).await.code(), Some(0));
    assert_eq!(db.job(id).await.state, "completed");

    let mut command = pgcue(&db.url);
    let child = command.env("PGCUE_GRACE", "100ms").args(["run", "--demo"]).stderr(Stdio::null()).spawn().unwrap();
    let id = sleep(60_000).await.unwrap().id;
    started(id).await;
    assert_eq!(stop(child).await.code(), Some(1));
    let job = db.job(id).await;
    assert_eq!((job.state.as_str(), job.attempt), ("ready", 0));
}

/// A job that commits long after it drew its place in the line, while others came and went: a full
/// pass finds it. Without full passes it stays, so this test can fail.
#[actix::test]
async fn a_late_commit_is_found_by_full_passes_and_only_by_them() {
    for (full_passes, left) in [(false, 1), (true, 0)] {
        let db = database().await;
        let config = Config { demo: true, full_passes, poll: Duration::from_millis(100), ..db.config() };
        let node = pgcue::Node::new(config).await.unwrap().start().await.unwrap();
        let (late, sql) = (db.sql().await, db.sql().await);
        late.batch_execute("begin; insert into jobs (kind) values ('noop')").await.unwrap();
        let mut committed = Instant::now();
        for n in 0..60 {
            // The node reads on and on, far past the late one's place.
            let id = value(&sql, "insert into jobs (kind) values ('noop') returning id").await;
            db.reaches(id, "completed").await;
            if n == 50 {
                late.batch_execute("commit").await.unwrap();
                committed = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        let count = async || value::<i64>(&sql, "select count(*) from jobs").await;
        while count().await > left || committed.elapsed() < Duration::from_secs(2) {
            assert!(committed.elapsed() < Duration::from_secs(30), "full passes {full_passes}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(count().await, left, "full passes {full_passes}");
        node.drain().await.unwrap();
    }
}

/// Six producers, some slow, some rolling back, some by COPY; two nodes whose sessions are cut again
/// and again. After healing no committed job is left behind.
#[actix::test]
async fn no_committed_job_is_left_behind_whatever_happens_to_claims() {
    let db = database().await;
    let time = Duration::from_secs(jobs(5, 60) as u64);
    let config =
        || Config { demo: true, lease: Duration::from_secs(3), poll: Duration::from_millis(200), ..db.config() };
    let mut nodes = Vec::new();
    for _ in 0..2 {
        nodes.push(pgcue::Node::new(config()).await.unwrap().start().await.unwrap());
    }
    let end = Instant::now() + time;
    let producer = |number: u64| {
        let db = &db;
        async move {
            let mut committed = 0i64;
            let mut round = 0;
            let mut sql = db.sql().await;
            while Instant::now() < end {
                round += 1;
                let tx = sql.transaction().await.unwrap();
                let jobs = || (0..10).map(|n| NewJob::new("noop", format!("[{number},{round},{n}]")));
                let within = db.client.within(&tx);
                match number {
                    0 | 1 => drop(within.copy(jobs().map(Ok)).await.unwrap()),
                    _ => drop(within.enqueue_many(jobs()).await.unwrap()),
                }
                // Odd producers commit long after they have drawn their places in the line.
                tokio::time::sleep(Duration::from_millis(if number % 2 == 1 { 300 } else { 5 })).await;
                if number == 5 && round % 2 == 0 {
                    tx.rollback().await.unwrap();
                } else {
                    tx.commit().await.unwrap();
                    committed += 10;
                }
            }
            committed
        }
    };
    let killer = async {
        let sql = db.sql().await;
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(rand_ms(50, 250))).await;
            // Only nodes' sessions: an enqueue whose answer is lost is another test.
            let cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgcue _%'
                and datname = current_database() order by random() limit 1";
            let _ = sql.execute(cut, &[]).await;
        }
    };
    let producers = futures_util::future::join_all((0..6).map(producer));
    let (committed, ()) = tokio::join!(producers, killer);
    let committed: i64 = committed.iter().sum();
    assert!(committed > 100, "{committed}");
    let sql = db.sql().await;
    let count = async || value::<i64>(&sql, "select count(*) from jobs").await;
    // Healed: leases of lost claims run out, then everything drains.
    let healing = Instant::now();
    while count().await > 0 && healing.elapsed() < Duration::from_secs(30) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let left = count().await;
    let finished: i64 = value(&sql, "select count(*) from finished_jobs where state = 'completed'").await;
    println!("{committed} committed, {finished} completed, {left} left, healed in {:?}", healing.elapsed());
    assert_eq!(left, 0);
    assert_eq!(finished, committed, "none invented, none finished twice");
    for node in nodes {
        let _ = node.drain().await;
    }
}

fn rand_ms(from: u64, to: u64) -> u64 {
    from + std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos() as u64
        % (to - from)
}
