//! What a handler says about an attempt. The return value is the whole protocol.

use std::time::Duration;

use serde::Serialize;

/// What a handler returns: an [`Outcome`], or an error, which retries the job.
pub type JobResult = Result<Outcome, JobError>;

/// How an attempt ended, in the handler's words.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// Done.
    Complete,
    /// Done, with a result or a new cursor state. See [`Outcome::result`] and [`Outcome::state`].
    CompleteWith(Completion),
    /// Not now: run again after this time. Does not cost an attempt.
    Snooze(Duration),
    /// Nobody wants this any more; the text says why. Final.
    Cancel(String),
    /// Failed for good; retrying would not help. Final.
    Fail(String),
}

/// What a completed job leaves behind, as JSON texts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Completion {
    pub(crate) result: Option<String>,
    pub(crate) state: Option<String>,
}

impl Outcome {
    /// Complete with a result, kept with the finished job. Fails if the value is no JSON.
    pub fn result(value: &impl Serialize) -> Result<Self, JobError> {
        Outcome::Complete.with_result(value)
    }

    /// Complete and leave this as the cursor's state, committed together with the completion.
    pub fn state(value: &impl Serialize) -> Result<Self, JobError> {
        Outcome::Complete.with_state(value)
    }

    /// Add a result to a completion; other outcomes stay as they are.
    pub fn with_result(self, value: &impl Serialize) -> Result<Self, JobError> {
        let json = serde_json::to_string(value)?;
        Ok(self.completing(|c| c.result = Some(json)))
    }

    /// Add a new cursor state to a completion; other outcomes stay as they are.
    pub fn with_state(self, value: &impl Serialize) -> Result<Self, JobError> {
        let json = serde_json::to_string(value)?;
        Ok(self.completing(|c| c.state = Some(json)))
    }

    fn completing(self, change: impl FnOnce(&mut Completion)) -> Self {
        let mut completion = match self {
            Outcome::Complete => Completion::default(),
            Outcome::CompleteWith(completion) => completion,
            other => return other,
        };
        change(&mut completion);
        Outcome::CompleteWith(completion)
    }
}

/// Why an attempt failed. Any error converts into it with `?`, its causes included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError(pub(crate) String);

impl JobError {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> Self {
        JobError(text.into())
    }
}

impl std::fmt::Display for JobError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for JobError {
    fn from(error: E) -> Self {
        JobError(crate::error::with_causes(&error))
    }
}
