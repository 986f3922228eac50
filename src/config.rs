//! Configuration in three stages: what was written (file, environment, flags), what it says merged,
//! and what was checked. Every fault is reported at once.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use config::{File, FileFormat, Map, Value, ValueKind};

use crate::error::{Error, Fault, Result};
use crate::job::check_name;

/// Everything a node can be told. The defaults suit one node and the queue `default`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where the database is.
    pub database_url: Option<String>,
    /// The schema that holds pgcue's tables, at most 48 bytes.
    pub schema: String,
    /// The node's name, for people; need not be unique.
    pub name: String,
    /// Create or upgrade the schema at start.
    pub migrate: bool,
    /// The queues to serve.
    pub queues: BTreeMap<String, QueueConfig>,
    /// How long a node may be silent before its jobs go to others.
    pub lease: Duration,
    /// How long running jobs may go on after SIGTERM.
    pub grace: Duration,
    /// How long an attempt may take if neither job nor task says.
    pub timeout: Duration,
    /// Wait for notifications. Without, the node polls, and everything works, later.
    pub listen: bool,
    /// How often an idle node looks without having been notified.
    pub poll: Duration,
    /// How many connections the node may hold besides the listener's and the heartbeat's.
    pub connections: usize,
    /// Keep a sticky actor at most this long after its cursor's last job.
    pub sticky_idle: Duration,
    /// At most so many jobs of one cursor run in a row, if many cursors have jobs.
    pub run_length: usize,
    /// Enqueue no larger payload, in bytes.
    pub max_payload: usize,
    /// Keep no larger result or error text, in bytes.
    pub max_result: usize,
    /// Keep no larger cursor state, in bytes; a job that leaves one fails.
    pub max_state: usize,
    /// Keep the cursor's state that a job began with up to this size, in bytes; above, only its version.
    pub max_snapshot: usize,
    /// Drop history after so many days; 0 keeps it.
    pub history_days: u32,
    /// Serve /metrics, /healthz and /readyz here.
    pub http: Option<String>,
    /// Off only in the tests that show what full passes are for.
    #[doc(hidden)]
    pub full_passes: bool,
    /// Handle the demo kinds.
    pub demo: bool,
    /// What to log, as `tracing-subscriber` filters it: `info`, `warn,pgcue=debug`.
    pub log: String,
    /// Log JSON, a line an event.
    pub log_json: bool,
}

/// What a node does for one queue.
#[derive(Debug, Clone, PartialEq)]
pub struct QueueConfig {
    /// How many jobs run at once.
    pub slots: usize,
    /// Over how many threads the slots are spread. A handler that blocks its thread stalls the slots
    /// that share it: by default each slot has its own, up to 64.
    pub threads: usize,
}

impl QueueConfig {
    /// A queue with this many slots and the default threads.
    pub fn with_slots(slots: usize) -> Self {
        QueueConfig { slots, threads: slots.clamp(1, 64) }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            database_url: None,
            schema: "pgcue".into(),
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            migrate: true,
            queues: BTreeMap::from([("default".into(), QueueConfig::with_slots(16))]),
            lease: Duration::from_secs(30),
            grace: Duration::from_secs(25),
            timeout: Duration::from_secs(600),
            listen: true,
            poll: Duration::from_secs(1),
            connections: 6,
            sticky_idle: Duration::from_secs(60),
            run_length: 50,
            max_payload: 1 << 20,
            max_result: 64 << 10,
            max_state: 1 << 20,
            max_snapshot: 1 << 10,
            history_days: 7,
            http: None,
            full_passes: true,
            demo: false,
            log: "info,actix_server=warn".into(),
            log_json: false,
        }
    }
}

/// Every key that may be written, `*` standing for a queue's name.
const KEYS: &[&str] = &[
    "database_url",
    "schema",
    "name",
    "migrate",
    "lease",
    "grace",
    "timeout",
    "listen",
    "poll",
    "connections",
    "sticky_idle",
    "run_length",
    "max_payload",
    "max_result",
    "max_state",
    "max_snapshot",
    "history_days",
    "http",
    "demo",
    "log",
    "log_json",
    "queues.*.slots",
    "queues.*.threads",
];

impl Config {
    /// Merge a TOML file, the `PGCUE_*` environment and flags, in that order, and check the whole.
    /// `PGCUE_QUEUES__EMAILS__SLOTS` is the key `queues.emails.slots`.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: Vec<(String, String)>,
    ) -> Result<Self> {
        let mut written = config::Config::builder();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|e| Error::io(path.display().to_string(), e))?;
            written = written.add_source(File::from_str(&text, FileFormat::Toml));
        }
        let merged = written.build().map_err(|e| {
            Fault::new("config", file.unwrap_or(Path::new("")).display(), e.to_string().trim().replace('\n', " "))
        })?;
        let mut flat = BTreeMap::new();
        flatten("", &merged.cache, &mut flat);
        for (name, value) in environment {
            if let Some(key) = name.strip_prefix("PGCUE_").filter(|key| !is_service_link(key)) {
                flat.insert(key.to_lowercase().replace("__", "."), value);
            }
        }
        flat.extend(flags);
        Self::check(flat)
    }

    /// The configuration of the environment alone; `DATABASE_URL` stands in for `PGCUE_DATABASE_URL`.
    pub fn from_env() -> Result<Self> {
        let mut config = Self::load(None, std::env::vars(), Vec::new())?;
        if config.database_url.is_none() {
            config.database_url = std::env::var("DATABASE_URL").ok();
        }
        Ok(config)
    }

    fn check(written: BTreeMap<String, String>) -> Result<Self> {
        let mut config = Config::default();
        let mut read = Reader { faults: Vec::new() };
        if written.keys().any(|key| key.starts_with("queues.")) {
            config.queues.clear();
        }
        // Slots before threads: the default of threads follows slots ("slots" sorts before "threads").
        for (key, value) in &written {
            match key.as_str() {
                "database_url" => config.database_url = Some(value.clone()),
                "schema" => read.name(key, value, &mut config.schema, 48),
                "name" => read.name(key, value, &mut config.name, 200),
                "migrate" => read.flag(key, value, &mut config.migrate),
                "listen" => read.flag(key, value, &mut config.listen),
                "demo" => read.flag(key, value, &mut config.demo),
                "log_json" => read.flag(key, value, &mut config.log_json),
                "log" => read.set(key, value, &mut config.log, "a filter such as info or warn,pgcue=debug", |v| {
                    v.parse::<tracing_subscriber::EnvFilter>().is_ok().then(|| v.to_owned())
                }),
                "lease" => read.time(key, value, &mut config.lease, "3s", "1h"),
                "grace" => read.time(key, value, &mut config.grace, "0s", "24h"),
                "timeout" => read.time(key, value, &mut config.timeout, "1ms", "8760h"),
                "poll" => read.time(key, value, &mut config.poll, "10ms", "1m"),
                "connections" => read.number(key, value, &mut config.connections, 3, 100),
                "run_length" => read.number(key, value, &mut config.run_length, 1, 1000),
                "max_payload" => read.number(key, value, &mut config.max_payload, 2, 256 << 20),
                "max_result" => read.number(key, value, &mut config.max_result, 64, 16 << 20),
                "max_state" => read.number(key, value, &mut config.max_state, 2, 256 << 20),
                "max_snapshot" => read.number(key, value, &mut config.max_snapshot, 0, 16 << 20),
                "sticky_idle" => read.time(key, value, &mut config.sticky_idle, "0s", "24h"),
                "history_days" => read.number(key, value, &mut config.history_days, 0, 36500),
                "http" => read.set(key, value, &mut config.http, "an address such as 127.0.0.1:9187", |v| {
                    v.parse::<std::net::SocketAddr>().is_ok().then(|| Some(v.to_owned()))
                }),
                _ => match queue_key(key) {
                    Some((name, field)) if check_name(key, name, 512).is_ok() => {
                        let queue = config.queues.entry(name.into()).or_insert_with(|| QueueConfig::with_slots(16));
                        if field == "slots" {
                            read.number(key, value, &mut queue.slots, 1, 10_000);
                            queue.threads = QueueConfig::with_slots(queue.slots).threads;
                        } else {
                            read.number(key, value, &mut queue.threads, 1, 1000);
                        }
                    }
                    _ => read.unknown(key, value),
                },
            }
        }
        match read.faults {
            faults if faults.is_empty() => Ok(config),
            faults => Err(Error::Config(faults)),
        }
    }

    /// The database's URL, or what to do about its absence.
    pub fn database_url(&self) -> Result<&str> {
        self.database_url.as_deref().ok_or_else(|| {
            Fault::new("database_url", "not set", "give --database-url, PGCUE_DATABASE_URL or DATABASE_URL").into()
        })
    }
}

/// Kubernetes sets such variables in pods beside a Service that is called pgcue.
fn is_service_link(key: &str) -> bool {
    key == "PORT" || key.starts_with("PORT_") || key.starts_with("SERVICE_")
}

fn queue_key(key: &str) -> Option<(&str, &str)> {
    let (name, field) = key.strip_prefix("queues.")?.rsplit_once('.')?;
    ["slots", "threads"].contains(&field).then_some((name, field))
}

fn flatten(prefix: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    match &value.kind {
        ValueKind::Table(table) => {
            let table: &Map<String, Value> = table;
            for (key, value) in table {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, out);
            }
        }
        _ => {
            out.insert(prefix.to_owned(), value.to_string());
        }
    }
}

struct Reader {
    faults: Vec<Fault>,
}

impl Reader {
    fn set<T>(&mut self, key: &str, value: &str, field: &mut T, allowed: &str, parse: impl Fn(&str) -> Option<T>) {
        match parse(value) {
            Some(parsed) => *field = parsed,
            None => self.faults.push(Fault::new(key, format!("{value:?}"), format!("give {allowed}"))),
        }
    }

    fn name(&mut self, key: &str, value: &str, field: &mut String, max: usize) {
        self.set(key, value, field, &format!("1 to {max} bytes, without NUL"), |v| {
            check_name(key, v, max).is_ok().then(|| v.to_owned())
        });
    }

    fn flag(&mut self, key: &str, value: &str, field: &mut bool) {
        self.set(key, value, field, "true or false", |v| v.parse().ok());
    }

    fn number<T: TryFrom<i64> + Copy>(&mut self, key: &str, value: &str, field: &mut T, min: i64, max: i64) {
        self.set(key, value, field, &format!("a whole number from {min} to {max}"), |v| {
            v.parse::<i64>().ok().filter(|n| (min..=max).contains(n)).and_then(|n| T::try_from(n).ok())
        });
    }

    fn time(&mut self, key: &str, value: &str, field: &mut Duration, min: &str, max: &str) {
        let (least, most) = (duration(min), duration(max));
        self.set(key, value, field, &format!("a time such as 30s or 5m, from {min} to {max}"), |v| {
            duration(v).filter(|d| Some(*d) >= least && Some(*d) <= most)
        });
    }

    fn unknown(&mut self, key: &str, value: &str) {
        let alike = |known: &&&str| strsim::damerau_levenshtein(known, key);
        let fix = match KEYS.iter().min_by_key(alike).filter(|known| alike(known) <= 3) {
            Some(known) => format!("unknown key; did you mean {known}?"),
            None => format!("unknown key; known are {}", KEYS.join(", ")),
        };
        self.faults.push(Fault::new(key, format!("{value:?}"), fix));
    }
}

/// A time as people write it: `30s`, `5m`, `1h 30m`, `250ms`.
pub fn duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok().and_then(|d| Duration::try_from(d).ok())
}

#[cfg(test)]
mod tests;
