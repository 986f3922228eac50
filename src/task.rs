//! A type of work: the Rust type whose JSON is a job's payload.

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

use crate::cursor::{OnFailure, OnRetry};
use crate::job::NewJob;
use crate::retry::RetryPolicy;

/// A Rust type that travels as the payload of jobs of one kind.
///
/// ```
/// use pgcue::Task;
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct SendEmail { to: String }
///
/// impl Task for SendEmail {
///     const KIND: &'static str = "send_email";
/// }
///
/// let urgent = SendEmail { to: "a@b.c".into() }.job().priority(10);
/// ```
pub trait Task: Serialize + DeserializeOwned + Send + Unpin + 'static {
    /// The stable name of this type of work, 1 to 512 bytes.
    const KIND: &'static str;
    /// The queue that its jobs go to unless the enqueuer says otherwise.
    const QUEUE: &'static str = "default";
    /// How many attempts a job gets unless the enqueuer says otherwise.
    const MAX_ATTEMPTS: u16 = 25;
    /// How long an attempt may take unless the enqueuer says otherwise; none takes the node's default.
    const TIMEOUT: Option<Duration> = None;

    /// What the jobs behind it in its cursor do while it waits for its next attempt.
    const ON_RETRY: OnRetry = OnRetry::Hold;
    /// What its cursor does after it failed for good.
    const ON_FAILURE: OnFailure = OnFailure::Continue;

    /// When a failed attempt runs again; asked once, when the handler is registered.
    fn retry() -> RetryPolicy {
        RetryPolicy::default()
    }

    /// A job that carries this value, to set options on.
    fn job(self) -> NewJob {
        NewJob::from(self)
    }
}

/// A task whose jobs belong to cursors, and what these keep between jobs.
///
/// ```
/// use pgcue::{CursorTask, Job, JobResult, Task};
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Deposit { cents: i64 }
///
/// #[derive(Default, serde::Serialize, serde::Deserialize)]
/// struct Account { balance: i64 }
///
/// impl Task for Deposit {
///     const KIND: &'static str = "deposit";
/// }
/// impl CursorTask for Deposit {
///     type State = Account;
/// }
///
/// async fn deposit(job: Job<Deposit>) -> JobResult {
///     let mut account = job.cursor()?.unwrap_or_default();
///     account.balance += job.args.cents;
///     job.leave(&account)
/// }
/// ```
pub trait CursorTask: Task {
    /// The cursor's state. Tasks that share a cursor share the type.
    type State: Serialize + DeserializeOwned;
}
