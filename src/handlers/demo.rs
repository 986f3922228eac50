//! The demo kinds, to try things out with: `noop`, `echo`, `sleep`, `fail`, `panic`, `count`, `append`.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::actors::supervisor::Handlers;
use crate::error::Result;
use crate::job::Job;
use crate::outcome::{JobError, JobResult, Outcome};
use crate::task::{CursorTask, Task};

macro_rules! task {
    ($(#[$doc:meta])* $name:ident as $kind:literal { $($field:ident: $type:ty),* }) => {
        $(#[$doc])*
        #[derive(Serialize, Deserialize)]
        struct $name { $($field: $type),* }
        impl Task for $name {
            const KIND: &'static str = $kind;
        }
    };
}

/// Does nothing, whatever the payload is.
#[derive(Deserialize)]
struct Noop(#[allow(dead_code)] serde::de::IgnoredAny);

impl Serialize for Noop {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_unit()
    }
}

impl Task for Noop {
    const KIND: &'static str = "noop";
}

/// The result is the payload, to the letter.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Echo(Box<serde_json::value::RawValue>);

impl Task for Echo {
    const KIND: &'static str = "echo";
}

/// Panics with the payload as its message.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Panic(Value);

impl Task for Panic {
    const KIND: &'static str = "panic";
}

task! {
    /// Takes so many milliseconds.
    Sleep as "sleep" { ms: u64 }
}
task! {
    /// Fails the first attempts.
    Fail as "fail" { times: u16 }
}
task! {
    /// Adds to the number that is its cursor's state.
    Count as "count" { n: i64 }
}
task! {
    /// Appends to the array that is its cursor's state; the result is the array's length.
    Append as "append" { n: Value }
}

impl CursorTask for Count {
    type State = i64;
}

/// Handle the demo kinds.
pub(crate) fn demo(handlers: &mut Handlers) -> Result<()> {
    handlers.add_fn(|_: Job<Noop>| async { Ok(Outcome::Complete) })?;
    handlers.add_fn(|job: Job<Echo>| async move { Outcome::result(&job.args) })?;
    handlers.add_fn(sleep)?;
    handlers.add_fn(fail)?;
    handlers.add_fn(panic)?;
    handlers.add_fn(count)?;
    handlers.add_fn(append)
}

async fn sleep(job: Job<Sleep>) -> JobResult {
    tokio::time::sleep(Duration::from_millis(job.args.ms)).await;
    Ok(Outcome::Complete)
}

async fn fail(job: Job<Fail>) -> JobResult {
    if job.meta.attempt <= job.args.times {
        return Err(JobError::new(format!("attempt {} of {} that fail", job.meta.attempt, job.args.times)));
    }
    Ok(Outcome::Complete)
}

async fn panic(job: Job<Panic>) -> JobResult {
    panic!("{}", job.args.0)
}

async fn count(job: Job<Count>) -> JobResult {
    let sum: i64 = job.cursor()?.unwrap_or(0);
    job.leave(&(sum + job.args.n))
}

async fn append(job: Job<Append>) -> JobResult {
    let mut all: Vec<Value> = job.state()?.unwrap_or_default();
    all.push(job.args.n);
    Outcome::result(&all.len())?.with_state(&all)
}
