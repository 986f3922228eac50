//! Networks that lose, delay and cut.

use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgcue::record::Event;
use rand::RngExt;

use crate::load::Habits;
use crate::node::{Args, Work};
use crate::proxy::Weather;
use crate::world::{CALM, World, connect};

/// Where Debian puts it.
pub const PGBOUNCER: &str = "/usr/sbin/pgbouncer";

/// For longer than the lease: nodes must find out on their own.
async fn blackholed(seed: u64, weather: Weather) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.load(Habits { ms: 50, ..Habits::default() });
    world.progress(50).await;
    // On a slow machine one may have lost its lease just now.
    world.eventually("both nodes have a lease", || async { world.believes(0) && world.believes(1) }).await;
    world.breaks("blackhole");
    let lost = |event: &Event| matches!(event, Event::LeaseLost { .. });
    let before = world.recorded(lost);
    world.proxy.set(weather);
    world
        .within(Duration::from_secs(10), "both nodes give up their lease", || async {
            world.recorded(lost) >= before + 2
        })
        .await;
    world.pass(2000).await;
    world.proxy.set(Weather::default());
    world.heals("blackhole");
    // Also jobs whose time came meanwhile are found soon after.
    let due =
        "select count(*) from pgcue.jobs where stage = 'scheduled' and run_at < clock_timestamp() - interval '1 s'";
    world.within(Duration::from_secs(10), "due jobs are promoted", || async { world.count(due).await == 0 }).await;
    world.progress(100).await;
    world.check().await;
}

/// Nothing arrives, in either direction.
pub async fn blackholed_both_ways(seed: u64) {
    blackholed(seed, Weather { up_lost: true, down_lost: true, ..Weather::default() }).await;
}

/// Nothing arrives at the server.
pub async fn blackholed_upwards(seed: u64) {
    blackholed(seed, Weather { up_lost: true, ..Weather::default() }).await;
}

/// The server does everything, and no reply arrives.
pub async fn blackholed_downwards(seed: u64) {
    blackholed(seed, Weather { down_lost: true, ..Weather::default() }).await;
}

/// Replies vanish, those to COMMIT among them, and their connections end: who asked does not know. Producers too.
pub async fn replies_are_swallowed(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.proxied_load(Habits::default());
    world.breaks("swallowed replies");
    let unknown = |event: &Event| matches!(event, Event::SettleUnknown { .. });
    while world.counts().unknown == 0 || world.recorded(unknown) == 0 {
        world.pass(300).await;
        world.proxy.set(Weather { replies_swallowed: true, ..Weather::default() });
        world.pass(50).await;
        world.proxy.set(Weather::default());
    }
    world.heals("swallowed replies");
    world.progress(100).await;
    world.check().await;
}

/// Nodes are killed when the database has committed what they settled, and before they hear of it.
pub async fn killed_before_a_reply(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.load(Habits::default());
    world.progress(50).await;
    world.breaks("SIGKILL before a reply");
    world.proxy.set(Weather { replies_swallowed: true, ..Weather::default() });
    world.eventually("a settle is committed unheard", || async { world.unheard().await > 0 }).await;
    world.holder().await;
    world.kill(0);
    world.kill(1);
    world.proxy.set(Weather::default());
    world.heals("SIGKILL before a reply");
    world.restart(0, &[]).await;
    world.restart(1, &[]).await;
    world.progress(100).await;
    let checked = world.check().await;
    assert!(checked.lost > 0, "they must have held jobs");
}

/// Everything arrives 100 ms late.
pub async fn slow(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, CALM).await;
    world.proxy.set(Weather { delay: Duration::from_millis(100), ..Weather::default() });
    let begin = Instant::now();
    drop(connect(&world.proxied()).await);
    assert!(begin.elapsed() > Duration::from_millis(400), "it is slow: {:?}", begin.elapsed());
    world.load(Habits { producers: 2, ..Habits::default() });
    world.progress(300).await;
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0), "slow is no fault");
}

/// Every connection is reset, again and again.
pub async fn reset(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.proxied_load(Habits::default());
    world.breaks("resets");
    for _ in 0..15 {
        world.pass(200).await;
        world.proxy.reset();
    }
    world.heals("resets");
    assert!(world.proxy.counts().1 > 5, "{:?}", world.proxy.counts());
    world.progress(100).await;
    world.check().await;
}

/// Every connection ends after some bytes, in the middle of a reply.
pub async fn cut_short(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(2, &[]).await;
    world.proxied_load(Habits::default());
    world.breaks("cuts");
    for _ in 0..8 {
        let bytes = world.random.random_range(800..20_000);
        world.proxy.set(Weather { cut_after: Some(bytes), ..Weather::default() });
        world.pass(400).await;
    }
    world.proxy.set(Weather::default());
    world.heals("cuts");
    assert!(world.proxy.counts().1 > 5, "{:?}", world.proxy.counts());
    world.progress(100).await;
    world.check().await;
}

/// The listener's connection is dead, and nobody says so: its node polls, finds out and connects again.
pub async fn the_listener_is_deaf(seed: u64) {
    let mut world = World::new(seed).await;
    world.nodes(1, CALM).await;
    // Other advisory locks are held for a moment when a node starts, before it listens.
    let sentry = "select count(*) from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and granted \
        and classid = 'pgcue.jobs'::regclass";
    world.eventually("the node sleeps", || async { world.count(sentry).await > 0 }).await;
    world.proxy.set(Weather { only_listeners: true, up_lost: true, down_lost: true, ..Weather::default() });
    for n in 0..5 {
        let key = format!("{n}");
        let job = world.enqueue(&key, Work(Args { key: key.clone(), ..Args::default() })).await;
        let done = format!("select count(*) from pgcue.finished_jobs where id = {job}");
        world.within(Duration::from_secs(5), "a tick finds it", || async { world.count(&done).await == 1 }).await;
    }
    let says = "the listener's connection broke";
    world.within(Duration::from_secs(30), "the node finds out", || async { world.log(0).contains(says) }).await;
    world.proxy.set(Weather::default());
    let checked = world.check().await;
    assert_eq!(checked.lost, 0);
}

/// PgBouncer in transaction mode: no call may rely on its session. There is no fault.
pub async fn pooled_by_pgbouncer(seed: u64) {
    let mut world = World::new(seed).await;
    let bouncer = PgBouncer::start(&world).await;
    world.proxy.redirect(bouncer.port);
    let poll = [CALM[0], ("PGCUE_LISTEN", "false"), ("PGCUE_POLL", "100ms")];
    world.nodes(2, &poll).await;
    world.proxied_load(Habits::default());
    world.progress(500).await;
    let pooled =
        "select count(*) from pg_stat_activity where application_name like 'pgcue%' or application_name = 'producer'";
    let sessions = world.count(pooled).await;
    assert!((1..=5).contains(&sessions), "PgBouncer must share its sessions: {sessions}");
    let checked = world.check().await;
    assert_eq!((checked.lost, checked.refused()), (0, 0));
    drop(bouncer);
}

struct PgBouncer {
    port: u16,
    process: Child,
}

impl PgBouncer {
    async fn start(world: &World) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let home = world.server.data().parent().unwrap();
        let file = home.join("pgbouncer.ini");
        let password = std::fs::read_to_string(home.join("password")).unwrap();
        let database = format!("host=127.0.0.1 port={} user=pgcue password={}", world.server.port(), password.trim());
        let settings = "auth_type = any\npool_mode = transaction\ndefault_pool_size = 5\nserver_idle_timeout = 1\nmax_client_conn = 200\nunix_socket_dir =\n";
        let text = format!(
            "[databases]\n* = {database}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n{settings}"
        );
        std::fs::write(&file, text).unwrap();
        let mut command = world.server.program(PGBOUNCER);
        let process = command.arg("-q").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        world
            .eventually("PgBouncer answers", || async { std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() })
            .await;
        PgBouncer { port, process }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
