//! A small world for one scenario: a server, a proxy in front of it, node processes, producers, and a record of
//! all that they do, which is checked at the end.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgcue::checker::Checker;
use pgcue::dev::PrivateServer;
use pgcue::record::{self, Entry, Event, Fate, Recorder};
use pgcue::store::{Store, Target};
use pgcue::{Client, NewJob};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::{Pid, Signal, kill_process};

use crate::load::{Counts, Habits, Load};
use crate::node::{ABORT, RECORD, fold};
use crate::proxy::Proxy;

/// The lease of the scenarios' nodes: the shortest there is.
pub const LEASE: Duration = Duration::from_secs(3);
/// For scenarios in which no lease may be lost, however slow the machine is.
pub const CALM: &[(&str, &str)] = &[("PGCUE_LEASE", "30s")];
/// How long a world may take to come to rest when everything is healed.
const PATIENCE: Duration = Duration::from_secs(90);

pub struct World {
    pub server: Arc<PrivateServer>,
    pub proxy: Proxy,
    /// Past the proxy.
    pub store: Store,
    pub client: Client,
    pub recorder: Recorder,
    pub random: StdRng,
    seed: u64,
    old_servers: Vec<Arc<PrivateServer>>,
    directory: tempfile::TempDir,
    nodes: Vec<NodeProcess>,
    load: Option<Load>,
}

/// A node process.
pub struct NodeProcess {
    pub name: String,
    child: Child,
}

impl World {
    pub async fn new(seed: u64) -> Self {
        Self::with_settings(seed, &[]).await
    }

    /// A world whose server has these settings.
    pub async fn with_settings(seed: u64, settings: &[&str]) -> Self {
        let settings: Vec<&str> = ["fsync = off", "log_min_messages = fatal"].iter().chain(settings).copied().collect();
        Self::on(seed, PrivateServer::start(None, &settings).unwrap()).await
    }

    /// A world on this server.
    pub async fn on(seed: u64, server: PrivateServer) -> Self {
        let directory = tempfile::Builder::new().prefix("chaos-").tempdir().unwrap();
        std::fs::create_dir(directory.path().join("record")).unwrap();
        let store = Store::new(Target::parse(&server.url("postgres")).unwrap().named("world"), "pgcue", 4);
        store.migrate().await.unwrap();
        World {
            proxy: Proxy::start(server.port()).await,
            client: Client::new(store.clone(), 1 << 20),
            recorder: Recorder::open(directory.path().join("record/world")).unwrap(),
            random: StdRng::seed_from_u64(seed),
            store,
            server: Arc::new(server),
            seed,
            old_servers: Vec::new(),
            directory,
            nodes: Vec::new(),
            load: None,
        }
    }

    /// The database, past the proxy.
    pub fn url(&self) -> String {
        self.server.url("postgres")
    }

    /// The database, through the proxy.
    pub fn proxied(&self) -> String {
        self.url().replace(&format!(":{}/", self.server.port()), &format!(":{}/", self.proxy.port()))
    }

    /// `pg_ctl` on the server.
    pub async fn control<const N: usize>(&self, arguments: [&'static str; N]) {
        let server = Arc::clone(&self.server);
        tokio::task::spawn_blocking(move || server.control(&arguments)).await.unwrap().unwrap();
    }

    /// From here on the database is on this server.
    pub async fn moves_to(&mut self, server: PrivateServer) {
        self.store = Store::new(Target::parse(&server.url("postgres")).unwrap().named("world"), "pgcue", 4);
        self.client = Client::new(self.store.clone(), 1 << 20);
        self.old_servers.push(std::mem::replace(&mut self.server, Arc::new(server)));
    }

    /// A file of this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A connection for plain SQL, past the proxy.
    pub async fn sql(&self) -> tokio_postgres::Client {
        connect(&self.url()).await
    }

    /// One number. While the server is away, it is waited for.
    pub async fn count(&self, query: &str) -> i64 {
        let begin = Instant::now();
        loop {
            match self.try_count(query).await {
                Ok(count) => return count,
                Err(error) => assert!(error.is_transient() && begin.elapsed() < PATIENCE, "{query}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_count(&self, query: &str) -> pgcue::Result<i64> {
        Ok(try_connect(&self.url()).await?.query_one(query, &[]).await?.get(0))
    }

    /// SIGKILL to the backend of one of the nodes' sessions, and wait until the server has recovered.
    pub async fn kill_a_backend(&self) {
        let pid = "select coalesce(min(pid), 0)::bigint from pg_stat_activity where application_name like 'pgcue%'";
        let pid = self.count(pid).await;
        let killed = kill_process(Pid::from_raw(pid as i32).expect("a node has a session"), Signal::KILL);
        let gone = format!("select count(*) from pg_stat_activity where pid = {pid}");
        let recovered = || async { self.try_count(&gone).await.is_ok_and(|sessions| sessions == 0) };
        assert!(killed.is_ok() || recovered().await, "{killed:?}");
        self.eventually("the server recovers", recovered).await;
    }

    /// Start a node that connects through the proxy, and wait until it has its lease.
    pub async fn node(&mut self, settings: &[(&str, &str)]) {
        self.starts(settings);
        self.ready(self.nodes.len() - 1).await;
    }

    /// Start a node, and do not wait.
    pub fn starts(&mut self, settings: &[(&str, &str)]) {
        self.nodes.push(self.spawn(self.nodes.len(), settings));
    }

    /// How many nodes were started.
    pub fn size(&self) -> usize {
        self.nodes.len()
    }

    /// Start some of them.
    pub async fn nodes(&mut self, count: usize, settings: &[(&str, &str)]) {
        for _ in 0..count {
            self.node(settings).await;
        }
    }

    fn spawn(&self, number: usize, settings: &[(&str, &str)]) -> NodeProcess {
        static STARTS: AtomicU32 = AtomicU32::new(0);
        let start = STARTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("node {number}.{start}");
        let log = std::fs::File::options().create(true).append(true).open(self.path(&format!("log {number}"))).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("node").env("PGCUE_DATABASE_URL", self.proxied()).env("PGCUE_NAME", &name);
        command.env("PGCUE_LEASE", "3s").env("PGCUE_GRACE", "5s").env("PGCUE_MIGRATE", "false");
        command.env(RECORD, self.path(&format!("record/{number}.{start}"))).env_remove(ABORT);
        command.envs(settings.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        NodeProcess { name, child: command.spawn().unwrap() }
    }

    /// True if a node has a lease that has not been ended.
    pub async fn has_lease(&self, number: usize) -> bool {
        let name = &self.nodes[number].name;
        self.count(&format!("select count(*) from pgcue.leases where node = '{name}' and dead_at is null")).await > 0
    }

    /// Whether a node has a lease, as it sees that itself.
    pub fn believes(&self, number: usize) -> bool {
        let log = self.log(number);
        log.matches("began a new lease").count() == log.matches("lost the lease").count()
    }

    /// A node that holds jobs now; waits until there is one.
    pub async fn holder(&self) -> usize {
        let sql = self.sql().await;
        let holders = "select l.node from pgcue.claims c join pgcue.leases l on l.id = c.lease
            where l.dead_at is null order by random()";
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            let rows = sql.query(holders, &[]).await.unwrap();
            let number =
                |row: &tokio_postgres::Row| self.nodes.iter().position(|node| node.name == row.get::<_, &str>(0));
            if let Some(number) = rows.iter().find_map(number) {
                return number;
            }
        }
        panic!("no node holds jobs within 30s");
    }

    /// Wait until a node has begun a lease.
    pub async fn ready(&self, number: usize) {
        self.eventually(&format!("node {number} has a lease"), || self.has_lease(number)).await;
    }

    /// Send a signal to a node's process.
    pub fn signal(&self, number: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.nodes[number].child), signal).unwrap();
    }

    /// What a node has logged.
    pub fn log(&self, number: usize) -> String {
        std::fs::read_to_string(self.path(&format!("log {number}"))).unwrap()
    }

    /// True if a node's process has not ended.
    pub fn is_alive(&mut self, number: usize) -> bool {
        self.nodes[number].child.try_wait().unwrap().is_none()
    }

    /// SIGKILL.
    pub fn kill(&mut self, number: usize) {
        self.signal(number, Signal::KILL);
        self.nodes[number].child.wait().unwrap();
    }

    /// Wait until a node's process has ended.
    pub async fn ended(&mut self, number: usize) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.nodes[number].child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "{} does not end", self.nodes[number].name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGTERM, and wait for the end.
    pub async fn stop(&mut self, number: usize) -> ExitStatus {
        self.signal(number, Signal::TERM);
        self.ended(number).await
    }

    /// Put a new process in the place of one that has ended.
    pub async fn restart(&mut self, number: usize, settings: &[(&str, &str)]) {
        self.nodes[number] = self.spawn(number, settings);
        self.ready(number).await;
    }

    /// Let producers begin; they connect past the proxy.
    pub fn load(&mut self, habits: Habits) {
        self.load = Some(Load::start(&self.url(), &self.recorder, self.seed, habits));
    }

    /// Let producers begin; they connect through the proxy.
    pub fn proxied_load(&mut self, habits: Habits) {
        self.load = Some(Load::start(&self.proxied(), &self.recorder, self.seed, habits));
    }

    /// What the producers have done so far.
    pub fn counts(&self) -> Counts {
        self.load.as_ref().map(Load::counts).unwrap_or_default()
    }

    /// Note that a fault begins.
    pub fn breaks(&self, fault: &str) {
        self.recorder.write(Event::Fault { name: fault.into(), begins: true }).unwrap();
    }

    /// Note that it is healed.
    pub fn heals(&self, fault: &str) {
        self.recorder.write(Event::Fault { name: fault.into(), begins: false }).unwrap();
    }

    /// Let some time pass, at random around so many milliseconds.
    pub async fn pass(&mut self, ms: u64) {
        let ms = self.random.random_range(ms / 2..=ms * 3 / 2);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    /// Wait until so many more jobs have finished.
    pub async fn progress(&self, jobs: i64) {
        let finished = "select count(*) from pgcue.finished_jobs";
        let wanted = self.count(finished).await + jobs;
        self.eventually(&format!("{jobs} more jobs finish"), || async { self.count(finished).await >= wanted }).await;
    }

    /// Wait until a condition holds.
    pub async fn eventually<F: Future<Output = bool>>(&self, what: &str, condition: impl FnMut() -> F) {
        self.within(PATIENCE, what, condition).await;
    }

    /// Wait until a condition holds, no longer than this.
    pub async fn within<F: Future<Output = bool>>(&self, time: Duration, what: &str, mut condition: impl FnMut() -> F) {
        let begin = Instant::now();
        while !condition().await {
            assert!(begin.elapsed() < time, "not within {time:?}: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything that was recorded so far.
    pub fn record(&self) -> Vec<Entry> {
        record::read(self.path("record")).unwrap()
    }

    /// How many events of a sort were recorded.
    pub fn recorded(&self, which: impl Fn(&Event) -> bool) -> usize {
        self.record().iter().filter(|entry| which(&entry.event)).count()
    }

    /// The leases that nodes say they began.
    fn begun_leases(&self) -> Vec<i64> {
        let lease = |entry: Entry| if let Event::LeaseBegun { lease } = entry.event { Some(lease) } else { None };
        self.record().into_iter().filter_map(lease).collect()
    }

    /// How many jobs have completed, and no node has heard of it.
    pub async fn unheard(&self) -> usize {
        let heard: HashSet<i64> = self
            .record()
            .into_iter()
            .flat_map(|entry| if let Event::Settled { jobs, .. } = entry.event { jobs } else { Vec::new() })
            .collect();
        let completed = "select id from pgcue.finished_jobs where state = 'completed'";
        let rows = self.sql().await.query(completed, &[]).await.unwrap();
        rows.iter().filter(|row| !heard.contains(&row.get(0))).count()
    }

    /// Enqueue a job by hand; its payload has this key.
    pub async fn enqueue(&self, key: &str, job: impl Into<NewJob>) -> i64 {
        let id = self.client.enqueue(job).await.unwrap().id;
        self.recorder.write(Event::Enqueued { key: key.into(), fate: Fate::Committed }).unwrap();
        id
    }

    /// Everything is healed: the producers stop, everything drains, the nodes stop, and every promise must have
    /// been kept.
    pub async fn check(mut self) -> Checked {
        let counts = match self.load.take() {
            Some(load) => load.stop().await,
            None => Counts::default(),
        };
        self.eventually("everything drains", || async { self.count("select count(*) from pgcue.jobs").await == 0 })
            .await;
        let living = (0..self.nodes.len()).filter(|number| self.is_alive(*number)).count() as i64;
        let leases = "select count(*) from pgcue.leases";
        self.eventually("the leases of the dead end", || async { self.count(leases).await == living }).await;
        let idle = "select count(*) from pg_stat_activity where state like 'idle in transaction%'";
        self.eventually("no transaction is left open", || async { self.count(idle).await == 0 }).await;
        for number in 0..self.nodes.len() {
            if self.is_alive(number) {
                let status = self.stop(number).await;
                assert!(status.success(), "{} ended with {status}", self.nodes[number].name);
            }
        }
        assert_eq!(self.count("select count(*) from pgcue.claims").await, 0, "a claim is left");
        let begun = self.begun_leases();
        let left = self.sql().await.query("select id from pgcue.leases where id = any($1)", &[&begun]).await.unwrap();
        assert!(left.is_empty(), "a lease is left: {left:?}");
        // One whose beginning was answered too late is nobody's, and ends with its time.
        self.eventually("no lease of nobody is left", || async {
            self.store.reap().await.unwrap();
            self.count(leases).await == 0
        })
        .await;
        let connections = "select count(*) from pg_stat_activity where application_name like 'pgcue%'";
        self.eventually("connections close", || async { self.count(connections).await == 0 }).await;
        assert_eq!(self.store.verify().await.unwrap(), [], "the tables are whole");
        let checker = Checker { fold: Some(&fold), record: Some(self.record()), strict_order: true };
        let violations = checker.check(&self.store).await.unwrap();
        assert!(violations.is_empty(), "{} promises broken:\n{}", violations.len(), lines(&violations));
        Checked {
            counts,
            finished: self.count("select count(*) from pgcue.finished_jobs").await,
            lost: self.count("select count(*) from pgcue.finished_jobs where losses > 0").await,
            quarantined: self.count("select count(*) from pgcue.finished_jobs where state = 'lost'").await,
            record: checker.record.unwrap_or_default(),
            _world: self,
        }
    }
}

fn lines(violations: &[pgcue::checker::Violation]) -> String {
    violations.iter().map(|violation| format!("  {violation}\n")).collect()
}

/// What is left of a world that has kept its promises.
pub struct Checked {
    pub counts: Counts,
    pub finished: i64,
    /// Jobs that lost a node, and ran again.
    pub lost: i64,
    /// Jobs that were set aside because they lost too many.
    pub quarantined: i64,
    pub record: Vec<Entry>,
    _world: World,
}

impl Checked {
    /// How many settles the database refused.
    pub fn refused(&self) -> usize {
        let refused = |entry: &Entry| match &entry.event {
            Event::Settled { refused, .. } => refused.len(),
            _ => 0,
        };
        self.record.iter().map(refused).sum()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.child.kill();
            let _ = node.child.wait();
        }
        if std::thread::panicking() {
            // For whoever wants to know why.
            self.directory.disable_cleanup(true);
            eprintln!("seed {}; logs and record: {}", self.seed, self.directory.path().display());
        }
    }
}

/// A connection for plain SQL.
pub async fn connect(url: &str) -> tokio_postgres::Client {
    try_connect(url).await.unwrap()
}

pub async fn try_connect(url: &str) -> pgcue::Result<tokio_postgres::Client> {
    let (client, connection) = Target::parse(url)?.named("world").connect().await?;
    actix_rt::spawn(connection);
    Ok(client)
}
