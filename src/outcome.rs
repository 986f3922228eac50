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
    /// Not now: run again after this time. Does not cost an attempt.
    Snooze(Duration),
    /// Nobody wants this any more; the text says why. Final.
    Cancel(String),
    /// Failed for good; retrying would not help. Final.
    Fail(String),
    /// One of the final ones, leaving a result or a new cursor state. See [`Outcome::with_result`] and
    /// [`Outcome::with_state`].
    Leaving(Box<Outcome>, Left),
}

/// What a finished job leaves behind, as JSON texts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Left {
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

    /// Add a result to a final outcome.
    pub fn with_result(self, value: &impl Serialize) -> Result<Self, JobError> {
        let json = serde_json::to_string(value)?;
        self.leaving(|left| left.result = Some(json))
    }

    /// Add a new cursor state to a final outcome: a job that fails or is cancelled may leave one too.
    /// Outcomes that say nothing keep the old state.
    pub fn with_state(self, value: &impl Serialize) -> Result<Self, JobError> {
        let json = serde_json::to_string(value)?;
        self.leaving(|left| left.state = Some(json))
    }

    fn leaving(self, change: impl FnOnce(&mut Left)) -> Result<Self, JobError> {
        let (outcome, mut left) = match self {
            Outcome::Leaving(outcome, left) => (outcome, left),
            Outcome::Snooze(_) => return Err(JobError::new("a job that is snoozed leaves neither result nor state")),
            outcome => (Box::new(outcome), Left::default()),
        };
        change(&mut left);
        Ok(Outcome::Leaving(outcome, left))
    }
}

/// Why an attempt failed. Any error converts into it with `?`, its causes included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    pub(crate) text: String,
    /// Retrying would not help.
    pub(crate) fatal: bool,
}

impl JobError {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> Self {
        JobError { text: text.into(), fatal: false }
    }

    /// An error that fails the job for good, as [`Outcome::Fail`] does.
    pub fn fatal(text: impl Into<String>) -> Self {
        JobError { text: text.into(), fatal: true }
    }
}

impl std::fmt::Display for JobError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl<E: std::error::Error> From<E> for JobError {
    fn from(error: E) -> Self {
        JobError::new(crate::error::with_causes(&error))
    }
}
