//! The node of the scenarios, a process of its own: `chaos node`. It records what it does, its handlers do what
//! their payload asks for, and it can be told to abort at a named point.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pgcue::record::{Recorder, TARGET, effect};
use pgcue::{CursorTask, Job, JobError, JobResult, Node, Outcome, RetryPolicy, Task};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The variables that such a process reads besides `PGCUE_*`.
pub const RECORD: &str = "CHAOS_RECORD";
pub const ABORT: &str = "CHAOS_ABORT";

/// What every job of the scenarios carries.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Args {
    /// Which job this is; no other has it.
    pub key: String,
    /// How long it takes.
    #[serde(default)]
    pub ms: u64,
    #[serde(default)]
    pub act: Act,
}

/// What a handler does besides taking its time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Act {
    #[default]
    Complete,
    /// Fails at its first attempt.
    Fail,
    /// Takes its process down.
    Abort,
    /// Takes its process down by endless recursion.
    Overflow,
    /// Blocks its thread for this time instead of waiting.
    Block,
}

/// A plain job.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Work(pub Args);

/// A job of a cursor.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct Step(pub Args);

impl Task for Work {
    const KIND: &'static str = "work";

    fn retry() -> RetryPolicy {
        RetryPolicy::fixed(Duration::from_millis(10))
    }
}

impl Task for Step {
    const KIND: &'static str = "step";

    fn retry() -> RetryPolicy {
        RetryPolicy::fixed(Duration::from_millis(10))
    }
}

impl CursorTask for Step {
    type State = Value;
}

/// The state that a step leaves: how many there were, and a digest of their keys in their order.
pub fn fold(state: Option<&Value>, payload: &Value) -> Option<Value> {
    let number = |field: &str| state.and_then(|state| state[field].as_u64()).unwrap_or(0);
    let key = payload["key"].as_str().unwrap_or_default();
    let digest = key.bytes().fold(number("digest"), |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3));
    Some(json!({ "steps": number("steps") + 1, "digest": digest }))
}

async fn perform(args: &Args, attempt: u16) -> Result<(), JobError> {
    let time = Duration::from_millis(args.ms);
    match args.act {
        Act::Block => std::thread::sleep(time),
        _ if args.ms > 0 => tokio::time::sleep(time).await,
        _ => {}
    }
    match args.act {
        Act::Fail if attempt == 1 => Err(JobError::new("it was asked to fail")),
        Act::Abort => std::process::abort(),
        Act::Overflow => Err(JobError::new(format!("survived {}", overflow(1)))),
        _ => Ok(()),
    }
}

#[allow(unconditional_recursion)]
fn overflow(depth: u64) -> u64 {
    std::hint::black_box(depth) + overflow(std::hint::black_box(depth + 1))
}

async fn work(job: Job<Work>) -> JobResult {
    perform(&job.args.0, job.meta.attempt).await?;
    effect(&job.meta);
    Ok(Outcome::Complete)
}

async fn step(job: Job<Step>) -> JobResult {
    let state = job.cursor()?;
    perform(&job.args.0, job.meta.attempt).await?;
    effect(&job.meta);
    job.leave(&fold(state.as_ref(), &serde_json::to_value(&job.args)?).unwrap_or_default())
}

/// Aborts the process when it records the n-th event of a name: `claimed:3`.
struct AbortAt {
    event: String,
    left: AtomicUsize,
}

impl AbortAt {
    fn from_environment() -> Option<Self> {
        let point = std::env::var(ABORT).ok()?;
        let (event, nth) = point.split_once(':').expect("CHAOS_ABORT is event:n");
        Some(AbortAt { event: format!("{event:?}"), left: AtomicUsize::new(nth.parse().expect("a number")) })
    }
}

impl<S: tracing::Subscriber> Layer<S> for AbortAt {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        struct Named<'a>(&'a str, bool);
        impl tracing::field::Visit for Named<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.1 |= field.name() == "event" && format!("{value:?}") == self.0;
            }
        }
        if event.metadata().target() != TARGET {
            return;
        }
        let mut named = Named(&self.event, false);
        event.record(&mut named);
        if named.1 && self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            std::process::abort();
        }
    }
}

pub fn main() -> ExitCode {
    // Whoever started this holds the other end of the pipe: it must not be outlived.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::abort();
    });
    let recorder = Recorder::open(std::env::var(RECORD).expect("CHAOS_RECORD")).expect("the record can be opened");
    let log = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(std::io::stderr);
    let log = log.with_filter(tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::registry().with(recorder).with(AbortAt::from_environment()).with(log).init();
    let run = async { Node::from_env().await?.handle_fn(work).handle_fn(step).run().await };
    match actix_rt::System::new().block_on(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
