//! Servers that stop, crash, run out of something, or are not the primary any more.

use std::process::Command;
use std::time::{Duration, Instant};

use pgcue::dev::PrivateServer;
use rand::RngExt;
use tokio_postgres::error::SqlState;

use crate::load::Habits;
use crate::world::{CALM, World, connect, try_connect};

async fn restarts(seed: u64, fault: &str, how: &'static str, times: u32) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.load(Habits::default());
    for _ in 0..times {
        world.progress(50).await;
        world.breaks(fault);
        world.control(["stop", "-m", how]).await;
        world.pass(800).await;
        world.control(["start"]).await;
        world.heals(fault);
    }
    world.progress(100).await;
    world.check().await;
}

/// `pg_ctl stop -m fast`: sessions are ended, transactions rolled back.
pub async fn stopped(seed: u64) {
    restarts(seed, "stop -m fast", "fast", 1).await;
}

/// `pg_ctl stop -m immediate`, again and again: crashes, with recovery at the next start.
pub async fn crashed(seed: u64) {
    restarts(seed, "stop -m immediate", "immediate", 3).await;
}

/// SIGKILL to one backend: the server ends all sessions and recovers.
pub async fn a_backend_is_killed(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.load(Habits::default());
    world.progress(100).await;
    world.breaks("SIGKILL to a backend");
    world.kill_a_backend().await;
    world.heals("SIGKILL to a backend");
    world.progress(100).await;
    world.check().await;
}

/// `pg_terminate_backend`, of nodes' and producers' sessions, all the time.
pub async fn sessions_are_terminated(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.load(Habits::default());
    let sql = world.sql().await;
    let terminate = "select count(pg_terminate_backend(pid)) from (select pid from pg_stat_activity
        where application_name like 'pgcue%' or application_name = 'producer' order by random() limit 3) p";
    world.breaks("terminated sessions");
    let mut terminated = 0;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        terminated += sql.query_one(terminate, &[]).await.unwrap().get::<_, i64>(0);
        world.pass(50).await;
    }
    world.heals("terminated sessions");
    assert!(terminated > 20, "{terminated}");
    world.progress(100).await;
    world.check().await;
}

/// Somebody takes every connection that there is.
pub async fn connections_run_out(seed: u64) {
    let mut world = World::with_settings(seed, &["max_connections = 30"]).await;
    world.nodes(2, &[]).await;
    world.load(Habits { producers: 2, ..Habits::default() });
    world.progress(100).await;
    let sql = world.sql().await;
    world.breaks("no connections");
    let mut hogs = Vec::new();
    let mut refused = 0;
    while refused < 20 {
        match try_connect(&world.url()).await {
            Ok(hog) => hogs.push(hog),
            Err(error) => {
                assert!(error.to_string().contains("too many clients"), "{error}");
                refused += 1;
                // What nodes still have is taken from them.
                let terminate = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'pgcue%'";
                sql.query_one(terminate, &[]).await.unwrap();
                world.pass(100).await;
            }
        }
    }
    let noticed = (0..2).any(|number| world.log(number).contains("too many clients"));
    assert!(noticed, "a node must have met it");
    drop((hogs, sql));
    world.heals("no connections");
    world.progress(100).await;
    world.check().await;
}

/// The disk is full for a while: the server refuses to write, or crashes. Needs a file system of its own, so root.
pub async fn the_disk_is_full(seed: u64) {
    let disk = Disk::mount();
    let settings = ["fsync = off", "log_min_messages = fatal", "max_wal_size = 64MB", "wal_recycle = off"];
    let server = PrivateServer::start(Some(disk.0.path()), &settings).unwrap();
    let mut world = World::on(seed, server).await;
    world.nodes(2, &[]).await;
    world.load(Habits::default());
    world.progress(100).await;
    world.breaks("disk full");
    let ballast = disk.0.path().join("ballast");
    let filled = std::io::copy(&mut std::io::repeat(7), &mut std::fs::File::create(&ballast).unwrap());
    assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let refused = (0..2).map(|number| world.log(number).matches("No space left").count()).sum::<usize>();
    let crashed = try_connect(&world.url()).await.is_err();
    assert!(crashed || refused > 0, "somebody must have noticed");
    std::fs::remove_file(&ballast).unwrap();
    if crashed {
        let _ = world.server.control(&["stop", "-m", "immediate"]);
        world.control(["start"]).await;
    }
    world.heals("disk full");
    world.progress(100).await;
    drop(world.check().await);
}

/// A small file system in memory.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount() -> Self {
        let directory = tempfile::Builder::new().prefix("chaos-disk-").tempdir().unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=400m", "tmpfs"];
        assert!(Command::new("mount").args(mount).arg(directory.path()).status().unwrap().success());
        Disk(directory)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// A synchronous standby is promoted while the old primary is alive; first connections still lead to the old one,
/// which is set to read only, then to the new one.
pub async fn failed_over(seed: u64) {
    let mut world =
        World::with_settings(seed, &["synchronous_commit = on", "wal_level = replica", "hot_standby = on"]).await;
    let directory = tempfile::Builder::new().prefix("chaos-standby-").tempdir().unwrap();
    let standby = standby_of(&world.server, directory.path());
    let sql = world.sql().await;
    sql.batch_execute("alter system set synchronous_standby_names = '*'").await.unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    world
        .eventually("the standby is synchronous", || async {
            world.count("select count(*) from pg_stat_replication where sync_state = 'sync'").await == 1
        })
        .await;
    world.nodes(2, &[]).await;
    world.proxied_load(Habits::default());
    world.progress(200).await;

    // A standby is refused while it is one.
    world.breaks("failover");
    world.proxy.redirect(standby.port());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // The old primary is fenced, as those do who fail over by hand, and lives on.
    world.proxy.redirect(world.server.port());
    sql.batch_execute("alter system set default_transaction_read_only = on").await.unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    world.proxy.reset();
    tokio::time::sleep(Duration::from_millis(500)).await;
    standby.control(&["promote"]).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let old = sql.query_one("select count(*) from pgcue.finished_jobs", &[]).await.unwrap().get::<_, i64>(0);
    world.proxy.redirect(standby.port());
    world.heals("failover");

    // From here on the world's database is the new one.
    world.moves_to(standby).await;
    world.progress(200).await;
    let after = sql.query_one("select count(*) from pgcue.finished_jobs", &[]).await.unwrap().get::<_, i64>(0);
    assert_eq!(old, after, "nobody writes to the old primary");
    let refused = (0..2)
        .filter(|number| world.log(*number).contains("read only") || world.log(*number).contains("read-only"))
        .count();
    assert!(refused > 0, "nodes must have met the standby or the fenced primary");
    world.check().await;
}

fn standby_of(primary: &PrivateServer, home: &std::path::Path) -> PrivateServer {
    let url = primary.url("postgres");
    std::fs::create_dir_all(home).unwrap();
    let owner = std::fs::metadata(primary.data()).unwrap();
    use std::os::unix::fs::MetadataExt;
    std::os::unix::fs::chown(home, Some(owner.uid()), Some(owner.gid())).unwrap();
    let data = home.join("data");
    let backup = primary
        .program("pg_basebackup")
        .arg("-d")
        .arg(&url)
        .arg("-D")
        .arg(&data)
        .args(["-R", "-X", "stream", "-c", "fast"])
        .status();
    assert!(backup.unwrap().success());
    std::fs::copy(primary.data().with_file_name("password"), home.join("password")).unwrap();
    PrivateServer::start(Some(home), &["fsync = off", "log_min_messages = fatal", "hot_standby = on"]).unwrap()
}

/// What a database administrator may set for the role: everything is short, and transactions are serializable.
pub async fn settings_are_hostile(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    let sql = world.sql().await;
    for setting in [
        "default_transaction_isolation = 'serializable'",
        "statement_timeout = '1s'",
        "lock_timeout = '10ms'",
        "idle_in_transaction_session_timeout = '100ms'",
        "idle_session_timeout = '3s'",
    ] {
        sql.batch_execute(&format!("alter database postgres set {setting}")).await.unwrap();
    }
    world.breaks("hostile settings");
    // Sessions have the settings that were there when they began.
    let nodes = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'pgcue%'";
    sql.query_one(nodes, &[]).await.unwrap();
    world.load(Habits::default());
    // A transaction that holds what nodes want: their statements time out.
    let holder = world.sql().await;
    holder
        .batch_execute(
            "set lock_timeout = 0; set statement_timeout = 0; set idle_session_timeout = 0;
             set idle_in_transaction_session_timeout = 0",
        )
        .await
        .unwrap();
    for _ in 0..5 {
        world.progress(20).await;
        let _ = holder
            .batch_execute("begin isolation level read committed; lock table pgcue.claims in access exclusive mode")
            .await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        holder.batch_execute("rollback").await.unwrap();
    }
    sql.batch_execute("alter database postgres reset all").await.unwrap();
    world.heals("hostile settings");
    world.progress(100).await;
    let timeouts = (0..2).map(|number| world.log(number).matches("timeout").count()).sum::<usize>();
    assert!(timeouts > 0, "something must have timed out");
    world.check().await;
}

/// Sessions that lock jobs and cursors in any order, so that deadlocks happen.
pub async fn deadlocks_happen(seed: u64) {
    let mut world = World::with_settings(seed, &["deadlock_timeout = '20ms'"]).await;
    world.nodes(2, &[]).await;
    world.load(Habits { producers: 2, cursors: 2, ms: 1, ..Habits::default() });
    world.progress(50).await;
    world.breaks("deadlocks");
    let end = Instant::now() + Duration::from_secs(4);
    let rounds: Vec<(u64, String)> = (0..3).map(|n| (seed ^ n, world.url())).collect();
    let sessions = rounds.into_iter().map(|(seed, url)| async move {
        use rand::SeedableRng;
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let sql = connect(&url).await;
        while Instant::now() < end {
            let mut keys = ["0.0", "0.1", "1.0", "1.1"];
            keys.rotate_left(random.random_range(0..4));
            if random.random() {
                keys.reverse();
            }
            let touch: String = keys
                .iter()
                .map(|key| format!("update pgcue.cursors set state = state where key = '{key}'; update pgcue.jobs set headers = '{{}}' where id in (select id from pgcue.jobs where cursor_key = '{key}' limit 2);"))
                .collect();
            let _ = sql.batch_execute(&format!("begin; {touch} commit")).await;
            let _ = sql.batch_execute("rollback").await;
        }
    });
    futures_util::future::join_all(sessions).await;
    world.heals("deadlocks");
    assert!(world.count("select deadlocks from pg_stat_database where datname = 'postgres'").await > 0);
    world.progress(50).await;
    world.check().await;
}

/// VACUUM FULL and REINDEX move every row and every index while jobs run.
pub async fn tables_are_rewritten(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, CALM).await;
    world.load(Habits::default());
    world.progress(50).await;
    let sql = world.sql().await;
    let end = Instant::now() + Duration::from_secs(4);
    let mut rewrites = 0;
    while Instant::now() < end {
        for statement in [
            "vacuum full pgcue.jobs",
            "vacuum full pgcue.claims",
            "vacuum full pgcue.cursors",
            "vacuum full pgcue.leases",
            "reindex table pgcue.jobs",
            "reindex table concurrently pgcue.cursors",
        ] {
            rewrites += i32::from(insist(&sql, statement).await);
        }
        world.pass(100).await;
    }
    assert!(rewrites > 10, "{rewrites}");
    world.progress(50).await;
    let checked = world.check().await;
    // Locks are no faults: nothing was lost by them.
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}

/// Make a change that takes strong locks. False if it fell to a deadlock.
pub async fn insist(sql: &tokio_postgres::Client, statement: &str) -> bool {
    match sql.batch_execute(statement).await {
        Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => false,
        done => done.map(|()| true).unwrap(),
    }
}

/// A snapshot is held open, as by a dump, while dead rows pile up.
pub async fn a_snapshot_is_pinned(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, CALM).await;
    let pin = world.sql().await;
    pin.batch_execute("begin isolation level repeatable read; select count(*) from pgcue.jobs").await.unwrap();
    world.load(Habits { ms: 0, ..Habits::default() });
    world.progress(3000).await;
    let dead = "select n_dead_tup from pg_stat_user_tables where schemaname = 'pgcue' and relname = 'jobs'";
    world.eventually("dead rows pile up", || async { world.count(dead).await > 3000 }).await;
    pin.batch_execute("commit").await.unwrap();
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
}
