//! What the tests share: one private server a run, a database of its own for each test (cloned from a
//! migrated template), and waiting for a state instead of sleeping.

use std::process::{Child, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgcue::dev::PrivateServer;
use pgcue::store::{JobRow, Store, Target};
use pgcue::{Client, Config, Node};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::OnceCell;

use crate::cli::pgcue;

/// The server of this test run. It stops when the process ends.
pub fn server() -> &'static PrivateServer {
    static SERVER: OnceLock<PrivateServer> = OnceLock::new();
    SERVER.get_or_init(|| {
        PrivateServer::start(None, &["fsync=off", "log_min_messages=fatal"]).expect("a private PostgreSQL starts")
    })
}

/// A database for one test.
pub struct Db {
    pub url: String,
    pub store: Store,
    pub client: Client,
}

pub async fn connect(url: &str) -> tokio_postgres::Client {
    try_connect(url).await.unwrap()
}

pub async fn try_connect(url: &str) -> pgcue::Result<tokio_postgres::Client> {
    let (client, connection) = Target::parse(url)?.connect().await?;
    actix_rt::spawn(connection);
    Ok(client)
}

/// A database with nothing in it.
pub async fn empty_database() -> String {
    clone_of("template1").await
}

/// A migrated database.
pub async fn database() -> Db {
    static TEMPLATE: OnceCell<String> = OnceCell::const_new();
    let template = TEMPLATE
        .get_or_init(|| async {
            let name = new_name();
            admin(&format!("create database {name}")).await;
            let store = Store::new(Target::parse(&server().url(&name)).unwrap(), "pgcue", 1);
            store.migrate().await.unwrap();
            name
        })
        .await;
    Db::open(clone_of(template).await)
}

impl Db {
    pub fn open(url: String) -> Self {
        let store = Store::new(Target::parse(&url).unwrap(), "pgcue", 4);
        Db { url, client: Client::new(store.clone(), 1 << 20), store }
    }

    /// A connection for plain SQL, in pgcue's schema.
    pub async fn sql(&self) -> tokio_postgres::Client {
        let client = connect(&self.url).await;
        client.batch_execute("set search_path = pgcue, public").await.unwrap();
        client
    }

    pub fn config(&self) -> Config {
        Config { database_url: Some(self.url.clone()), migrate: false, ..Config::default() }
    }

    /// A node with the demo kinds.
    pub async fn demo_node(&self) -> Node {
        Node::new(Config { demo: true, ..self.config() }).await.unwrap()
    }

    pub async fn job(&self, id: i64) -> JobRow {
        self.store.job(id).await.unwrap().unwrap()
    }

    /// Wait until a job is in a state; panics with the job after half a minute.
    pub async fn reaches(&self, id: i64, state: &str) -> JobRow {
        let begin = Instant::now();
        loop {
            let job = self.job(id).await;
            if job.state == state {
                return job;
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "waiting for {state}: {job:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A node in a process of its own, which does not outlive its test.
pub struct NodeProcess(Child);

impl NodeProcess {
    /// `pgcue run --demo` with these variables.
    pub fn start(db: &Db, settings: &[(&str, &str)]) -> Self {
        let mut command = pgcue(&db.url);
        command.envs(settings.iter().copied()).args(["run", "--demo"]).stdout(Stdio::null()).stderr(Stdio::null());
        NodeProcess(command.spawn().unwrap())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// SIGTERM, and wait for the end.
    pub async fn stop(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        tokio::task::spawn_blocking(move || self.0.wait().unwrap()).await.unwrap()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many; the documented long form is LONG_TESTS=1.
pub fn jobs(short: i64, long: i64) -> i64 {
    if std::env::var_os("LONG_TESTS").is_some() { long } else { short }
}

/// Wait until a condition holds; panics after a time.
pub async fn eventually<F: Future<Output = bool>>(what: &str, within: Duration, mut condition: impl FnMut() -> F) {
    let begin = Instant::now();
    while !condition().await {
        assert!(begin.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Wait until a session waits for a lock.
pub async fn somebody_waits(sql: &tokio_postgres::Client) {
    let waits = "select exists (select from pg_locks where not granted and pid <> pg_backend_pid())";
    eventually("a lock is waited for", Duration::from_secs(20), || async { value(sql, waits).await }).await;
}

/// One value of one row.
pub async fn value<T: for<'a> tokio_postgres::types::FromSql<'a>>(sql: &tokio_postgres::Client, query: &str) -> T {
    sql.query_one(query, &[]).await.unwrap_or_else(|e| panic!("{query}: {e:?}")).get(0)
}

fn new_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("t{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn clone_of(template: &str) -> String {
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = ONE_AT_A_TIME.lock().await; // a template must not be in use
    let name = new_name();
    admin(&format!("create database {name} template {template}")).await;
    server().url(&name)
}

async fn admin(statement: &str) {
    let sql = connect(&server().url("postgres")).await;
    // The last connection to a template may still be on its way out.
    for _ in 0..100 {
        match sql.batch_execute(statement).await {
            Ok(()) => return,
            Err(e) if e.code() == Some(&tokio_postgres::error::SqlState::OBJECT_IN_USE) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) => panic!("{statement}: {e:?}"),
        }
    }
    panic!("{statement}: still in use");
}
