//! The nodes of a bench: this program again, as a process of its own.
//!
//! A node says `ready`, and then how many of the measured jobs its handlers have begun, a number a line. It ends on
//! SIGTERM as every node does, and at once when its standard input closes: then the bench is gone.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tracing_subscriber::fmt::writer::MakeWriterExt;

use super::place::Place;
use super::process;
use crate::cli::{Common, log};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::node::{Node, stop_signal};
use crate::outcome::{JobError, JobResult, Outcome};
use crate::task::Task;

/// How often a node says how far it is.
const TELL: Duration = Duration::from_millis(20);
/// How many of the measured jobs have begun.
static BEGUN: AtomicU64 = AtomicU64::new(0);

#[derive(Args)]
pub(super) struct BenchNode {
    #[arg(long)]
    slots: usize,
    /// Bytes of a cursor's state
    #[arg(long)]
    state: usize,
}

/// The payload of jobs that tell how long ago they were enqueued.
#[derive(Serialize, Deserialize, Clone, Copy)]
pub(super) struct At {
    /// In microseconds since 1970.
    pub(super) at: i64,
}

impl At {
    pub(super) fn now() -> Self {
        At { at: Timestamp::now().as_microsecond() }
    }
}

/// Any payload.
#[derive(Deserialize)]
struct Any(#[allow(dead_code)] IgnoredAny);

impl Serialize for Any {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_unit()
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident($args:ty) as $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        struct $name($args);
        impl Task for $name {
            const KIND: &'static str = $kind;
        }
    )*};
}

kinds! {
    /// Does nothing.
    Noop(Any) as "noop";
    /// The same, and is not measured.
    Backlog(Any) as "backlog";
    /// The result is how many microseconds after its enqueueing it began.
    Stamp(At) as "stamp";
    /// Rewrites its cursor's state.
    StateJob(Any) as "state";
    /// Both.
    StateStamp(At) as "state_stamp";
}

#[derive(Serialize, Deserialize)]
struct State {
    n: u64,
    pad: String,
}

/// A text that no compression makes shorter by much.
fn noise(bytes: usize) -> Arc<str> {
    (0..bytes).map(|_| char::from(rand::random_range(b'a'..=b'z'))).collect::<String>().into()
}

/// The state that a job leaves: its predecessor's, counted one up.
fn next<T>(job: &Job<T>, pad: &str) -> Result<State, JobError> {
    let before = job.state::<State>()?.unwrap_or_else(|| State { n: 0, pad: pad.to_owned() });
    Ok(State { n: before.n + 1, ..before })
}

fn begun() {
    BEGUN.fetch_add(1, Ordering::Relaxed);
}

async fn noop(_: Job<Noop>) -> JobResult {
    begun();
    Ok(Outcome::Complete)
}

async fn stamp(job: Job<Stamp>) -> JobResult {
    begun();
    Outcome::result(&(At::now().at - job.args.0.at))
}

impl BenchNode {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.config(None, vec![("queues.default.slots".into(), self.slots.to_string())])?;
        // Spans cost what they cost a node that logs as usual; its lines would only disturb the progress bar.
        let quiet = std::io::stderr.with_max_level(tracing::Level::WARN);
        log::start(&config, quiet);
        let pad = noise(self.state.saturating_sub(r#"{"n":100000,"pad":""}"#.len()));
        let pad_too = Arc::clone(&pad);
        let node = Node::new(config)
            .await?
            .handle_fn(noop)
            .handle_fn(|_: Job<Backlog>| async { Ok(Outcome::Complete) })
            .handle_fn(stamp)
            .handle_fn(move |job: Job<StateJob>| {
                let pad = Arc::clone(&pad);
                async move {
                    begun();
                    Outcome::state(&next(&job, &pad)?)
                }
            })
            .handle_fn(move |job: Job<StateStamp>| {
                let pad = Arc::clone(&pad_too);
                async move {
                    begun();
                    Outcome::result(&(At::now().at - job.args.0.at))?.with_state(&next(&job, &pad)?)
                }
            });
        std::thread::spawn(end_with_the_bench);
        let running = node.start().await?;
        println!("ready");
        actix_rt::spawn(tell());
        stop_signal().await;
        match running.drain().await {
            Err(Error::Unfinished(_)) => Ok(()), // a bench may end before all is done
            other => other,
        }
    }
}

fn end_with_the_bench() {
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    std::process::exit(1);
}

async fn tell() {
    let mut told = 0;
    loop {
        tokio::time::sleep(TELL).await;
        let begun = BEGUN.load(Ordering::Relaxed);
        if begun != told {
            told = begun;
            println!("{begun}");
        }
    }
}

/// The nodes, as the bench sees them. Dropped, they are killed.
pub(super) struct Nodes(Vec<ChildNode>);

struct ChildNode {
    child: Child,
    pid: u32,
    begun: Arc<AtomicU64>,
    /// Open as long as the bench lives.
    _stdin: Option<ChildStdin>,
}

impl Nodes {
    /// Start so many nodes, and wait until all are ready.
    pub(super) async fn start(place: &Place, nodes: usize, slots: usize, state: usize) -> Result<Self> {
        let mut started = Vec::new();
        for n in 1..=nodes {
            started.push(ChildNode::spawn(place, n, slots, state)?);
        }
        let mut ready = Vec::new();
        for (node, mut lines) in started {
            match lines.next_line().await {
                Ok(Some(line)) if line == "ready" => {}
                _ => return Err(Error::Setup("a node of the bench did not start; see above".into())),
            }
            let begun = Arc::clone(&node.begun);
            tokio::spawn(async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    begun.store(line.parse().unwrap_or_default(), Ordering::Relaxed);
                }
            });
            ready.push(node);
        }
        Ok(Nodes(ready))
    }

    /// How many of the measured jobs the nodes have begun, as far as they have told.
    pub(super) fn begun(&self) -> u64 {
        self.0.iter().map(|node| node.begun.load(Ordering::Relaxed)).sum()
    }

    /// Fails if a node has died.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.0.iter_mut().find_map(|node| node.child.try_wait().ok().flatten()) {
            Some(status) => Err(Error::Setup(format!("a node of the bench died: {status}"))),
            None => Ok(()),
        }
    }

    /// The processor time of all, in seconds.
    pub(super) fn cpu(&self) -> Option<f64> {
        self.0.iter().map(|node| process::stat(node.pid).map(|stat| stat.own)).sum()
    }

    /// The largest of their sizes: `VmRSS` now, `VmHWM` at its peak.
    pub(super) fn memory(&self, name: &str) -> Option<u64> {
        self.0.iter().map(|node| process::memory(node.pid, name)).collect::<Option<Vec<u64>>>()?.into_iter().max()
    }

    /// SIGTERM, and wait for the end.
    pub(super) async fn stop(mut self) -> Result<()> {
        self.check()?;
        for node in &self.0 {
            let _ = Pid::from_raw(node.pid as i32).map(|pid| kill_process(pid, Signal::TERM));
        }
        for node in &mut self.0 {
            let ended = tokio::time::timeout(Duration::from_secs(60), node.child.wait()).await;
            match ended.map_err(|_| Error::Setup("a node of the bench does not end".into()))? {
                Ok(status) if status.success() => {}
                Ok(status) => return Err(Error::Setup(format!("a node of the bench failed: {status}"))),
                Err(error) => return Err(Error::io("a node of the bench", error)),
            }
        }
        Ok(())
    }
}

type Lines = tokio::io::Lines<BufReader<tokio::process::ChildStdout>>;

impl ChildNode {
    fn spawn(place: &Place, n: usize, slots: usize, state: usize) -> Result<(Self, Lines)> {
        let program = std::env::current_exe().map_err(|e| Error::io("this program", e))?;
        let mut command = Command::new(program);
        command.args(["bench", "node", "--slots", &slots.to_string(), "--state", &state.to_string()]);
        // The address by the environment: it may hold a password.
        command.env("PGCUE_DATABASE_URL", &place.url).env("PGCUE_SCHEMA", &place.schema);
        command.env("PGCUE_NAME", format!("{} {n}", place.name)).env("PGCUE_MIGRATE", "false");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command.process_group(0); // Ctrl-C is for the bench, which stops its nodes
        let mut child = command.spawn().map_err(|e| Error::io("a node of the bench", e))?;
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let pid = child.id().expect("it was not waited for");
        let _stdin = child.stdin.take(); // waiting for the child would close it
        Ok((ChildNode { child, pid, begun: Arc::default(), _stdin }, lines))
    }
}
