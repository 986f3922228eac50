//! The record: what processes saw and did, a line of JSON an event, from which the [checker](crate::checker)
//! concludes what must have happened.
//!
//! Nodes say what they do in `tracing` events of the target [`TARGET`], which cost next to nothing as long as
//! nobody listens. A [`Recorder`] writes them to a file, which it shares with what producers and
//! handlers write themselves. A line is one write: it is there even if the process is killed just after.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer};

use crate::error::{Error, Result};
use crate::job::Meta;

/// The target of the events that make the record.
pub const TARGET: &str = "pgcue::record";

/// One line of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Nanoseconds since the machine booted.
    pub at: u64,
    /// The process that wrote it.
    pub process: u32,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happens to jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A producer tried to enqueue a job whose payload has this `key`, which no other job has.
    Enqueued {
        /// The payload's field `key`.
        key: String,
        /// What the producer knows of it.
        fate: Fate,
    },
    /// Somebody cancelled a job.
    Cancelled {
        /// The job.
        job: i64,
        /// What the database answered; `unknown` if the answer did not come.
        answer: String,
    },
    /// A fault was injected, or healed.
    Fault {
        /// Which one.
        name: String,
        /// False when it is healed.
        begins: bool,
    },
    /// A node has a lease.
    LeaseBegun {
        /// Its number.
        lease: i64,
    },
    /// The database confirmed the lease.
    Heartbeat {
        /// Its number.
        lease: i64,
    },
    /// The node gave its lease up for lost.
    LeaseLost {
        /// Its number.
        lease: i64,
    },
    /// A node claimed jobs.
    Claimed {
        /// The claim.
        token: i64,
        /// The jobs.
        jobs: Vec<i64>,
    },
    /// An attempt started.
    Started {
        /// The job.
        job: i64,
        /// Which attempt; one that was given back is not counted.
        attempt: u16,
        /// The claim that it is made under.
        token: i64,
    },
    /// Its handler did what it is for; handlers say so by [`effect`].
    Effect {
        /// The job.
        job: i64,
        /// Which attempt.
        attempt: u16,
    },
    /// It ended.
    Ended {
        /// The job.
        job: i64,
        /// Which attempt.
        attempt: u16,
        /// The claim that it was made under.
        token: i64,
        /// What is to become of the job.
        outcome: String,
    },
    /// The database has recorded how attempts ended.
    Settled {
        /// The jobs.
        jobs: Vec<i64>,
        /// The claims that they were made under.
        tokens: Vec<i64>,
        /// What is to become of the jobs.
        outcomes: Vec<String>,
        /// The places in these lists of what it refused, because the jobs are somebody else's now.
        refused: Vec<usize>,
    },
    /// Nobody knows whether it has: the answer did not come.
    SettleUnknown {
        /// The jobs.
        jobs: Vec<i64>,
    },
}

/// What a producer knows of a job that it tried to enqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It was acknowledged.
    Committed,
    /// The producer rolled back, or the database refused it.
    RolledBack,
    /// The answer did not come.
    Unknown,
}

/// For handlers: the effect of this job takes place now.
pub fn effect(job: &Meta) {
    tracing::trace!(target: TARGET, event = "effect", job = job.id, attempt = job.attempt);
}

/// Appends to a file. Cheap to clone; processes may share the file.
#[derive(Clone)]
pub struct Recorder(Arc<std::fs::File>);

impl Recorder {
    /// Open or create the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = std::fs::File::options().create(true).append(true).open(path);
        file.map(|file| Recorder(Arc::new(file))).map_err(|e| Error::io(path.display().to_string(), e))
    }

    /// Something happened now.
    pub fn write(&self, event: Event) -> Result<()> {
        let entry = Entry { at: since_boot(), process: std::process::id(), event };
        self.append(serde_json::to_string(&entry)?)
    }

    fn append(&self, mut line: String) -> Result<()> {
        line.push('\n');
        Ok((&*self.0).write_all(line.as_bytes())?)
    }
}

/// As a layer of a `tracing` subscriber, it writes down what the nodes of this process do.
impl<S: tracing::Subscriber> Layer<S> for Recorder {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == TARGET {
            let mut line = Line(format!(r#"{{"at":{},"process":{}"#, since_boot(), std::process::id()));
            event.record(&mut line);
            line.0.push('}');
            self.append(line.0).expect("the record can be written");
        }
    }
}

/// An event's fields as JSON: numbers, plain strings and lists of them.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, r#","{}":{value:?}"#, field.name());
    }
}

fn since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Read a record, or the records of a directory, in the order of time. A last line that a killed process left
/// unfinished is skipped.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Entry>> {
    let path = path.as_ref();
    let io = |e| Error::io(path.display().to_string(), e);
    let files = if path.is_dir() {
        let entries: Result<Vec<_>, _> = std::fs::read_dir(path).map_err(io)?.collect();
        entries.map_err(io)?.into_iter().map(|entry| entry.path()).collect()
    } else {
        vec![path.to_owned()]
    };
    let mut all: Vec<Entry> = Vec::new();
    for file in files {
        let mut lines = BufReader::new(std::fs::File::open(&file).map_err(io)?).lines().peekable();
        while let Some(line) = lines.next() {
            match serde_json::from_str(&line.map_err(io)?) {
                Ok(entry) => all.push(entry),
                Err(_) if lines.peek().is_none() => {} // its process was killed
                Err(error) => return Err(Error::Setup(format!("{}: {error}", file.display()))),
            }
        }
    }
    all.sort_by_key(|entry| entry.at);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn what_nodes_trace_is_read_back_as_events() {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Recorder::open(directory.path().join("record")).unwrap();
        let subscriber = tracing_subscriber::registry().with(recorder.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::trace!(target: TARGET, event = "claimed", token = -5, jobs = ?[1, 2]);
            tracing::trace!(target: TARGET, event = "ended", job = 1, attempt = 2, token = -5, outcome = "retry");
            tracing::info!("not of the record");
        });
        recorder.write(Event::Enqueued { key: "a \"quoted\" key".into(), fate: Fate::Unknown }).unwrap();
        let events: Vec<Event> = read(directory.path()).unwrap().into_iter().map(|entry| entry.event).collect();
        assert_eq!(
            events,
            [
                Event::Claimed { token: -5, jobs: vec![1, 2] },
                Event::Ended { job: 1, attempt: 2, token: -5, outcome: "retry".into() },
                Event::Enqueued { key: "a \"quoted\" key".into(), fate: Fate::Unknown },
            ]
        );
    }
}
