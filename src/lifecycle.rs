//! What an ended attempt becomes: one total function from how it ended to what is settled.

use std::time::Duration;

use crate::error::shorten;
use crate::outcome::{JobResult, Left, Outcome};
use crate::retry::RetryPolicy;

/// No delay or timeout is longer: a thousand years of 360 days, as the database compares them.
pub(crate) const MAX_DELAY: Duration = Duration::from_secs(360_000 * 24 * 3600);

/// How an attempt ended, as its slot saw it.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// The handler answered.
    Returned(JobResult),
    /// The handler panicked, with this message.
    Panicked(String),
    /// The handler did not answer within the timeout and was dropped.
    TimedOut(Duration),
    /// The handler blocked its thread beyond the timeout; the thread was given up.
    Froze(Duration),
    /// The payload does not fit the task's type; the handler never saw it.
    Rejected(String),
    /// The attempt was not made, or is given back by a node that stops.
    Released,
}

/// What a settle records.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// One of the outcomes of the SQL function `settle`.
    pub outcome: Settled,
    /// The result, as JSON text.
    pub result: Option<String>,
    /// The cursor's new state, as JSON text.
    pub state: Option<String>,
    /// Why it did not complete.
    pub error: Option<String>,
    /// How long until it runs again.
    pub delay: Option<Duration>,
}

/// The outcomes that the SQL function `settle` knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Settled {
    #[default]
    Completed,
    Failed,
    Cancelled,
    Retry,
    Snooze,
    Release,
}

impl Settled {
    /// Every outcome.
    pub const ALL: [Settled; 6] =
        [Settled::Completed, Settled::Failed, Settled::Cancelled, Settled::Retry, Settled::Snooze, Settled::Release];

    /// Its name in SQL and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Settled::Completed => "completed",
            Settled::Failed => "failed",
            Settled::Cancelled => "cancelled",
            Settled::Retry => "retry",
            Settled::Snooze => "snooze",
            Settled::Release => "release",
        }
    }

    /// True if the job is finished by it.
    pub fn is_final(self) -> bool {
        matches!(self, Settled::Completed | Settled::Failed | Settled::Cancelled)
    }
}

/// How much of what a job leaves is kept, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of a result or an error.
    pub result: usize,
    /// Of a cursor's state.
    pub state: usize,
    /// Of the cursor's state that a job began with, as the history keeps it.
    pub snapshot: usize,
}

impl Verdict {
    /// Keep what is written within bounds, and free of what the database cannot hold. A state that is too
    /// large fails the job, a result is dropped with a note.
    pub fn within(mut self, limits: &Limits) -> Self {
        if let Some(size) = self.state.as_ref().map(String::len).filter(|size| *size > limits.state) {
            let error = format!(
                "the cursor state of {size} bytes was refused: the limit is {} bytes (max_state)",
                limits.state
            );
            return Verdict { outcome: Settled::Failed, error: Some(error), ..Default::default() };
        }
        if let Some(size) = self.result.as_ref().map(String::len).filter(|size| *size > limits.result) {
            self.result = None;
            self.error = Some(format!(
                "the result of {size} bytes was dropped: the limit is {} bytes (max_result)",
                limits.result
            ));
        }
        self.delay = self.delay.map(|delay| delay.min(MAX_DELAY));
        self.error = self.error.map(|error| shorten(&error.replace('\0', "\u{fffd}"), limits.result));
        self
    }
}

/// Decide what an attempt that ended becomes. `u` in [0, 1) is the jitter's random number.
pub fn judge(end: End, attempt: u16, max_attempts: u16, policy: &RetryPolicy, u: f64) -> Verdict {
    let failed = |error: String| Verdict { outcome: Settled::Failed, error: Some(error), ..Default::default() };
    let retry = |error: String| {
        if attempt >= max_attempts {
            failed(error)
        } else {
            let delay = Some(policy.delay(attempt, u));
            Verdict { outcome: Settled::Retry, error: Some(error), delay, ..Default::default() }
        }
    };
    match end {
        End::Returned(Ok(Outcome::Leaving(outcome, Left { result, state }))) => {
            Verdict { result, state, ..judge(End::Returned(Ok(*outcome)), attempt, max_attempts, policy, u) }
        }
        End::Returned(Ok(Outcome::Complete)) => Verdict::default(),
        End::Returned(Ok(Outcome::Snooze(delay))) => {
            Verdict { outcome: Settled::Snooze, delay: Some(delay), ..Default::default() }
        }
        End::Returned(Ok(Outcome::Cancel(why))) => {
            Verdict { outcome: Settled::Cancelled, error: Some(why), ..Default::default() }
        }
        End::Returned(Ok(Outcome::Fail(why))) => failed(why),
        End::Returned(Err(error)) if error.fatal => failed(error.text),
        End::Returned(Err(error)) => retry(error.text),
        End::Panicked(message) => retry(format!("panicked: {message}")),
        End::TimedOut(limit) => retry(format!("timed out after {limit:?}")),
        End::Froze(limit) => retry(format!("blocked its thread beyond its timeout of {limit:?}; the slot was rebuilt")),
        End::Rejected(why) => failed(format!("payload does not fit the task: {why}")),
        End::Released => Verdict { outcome: Settled::Release, ..Default::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::JobError;
    use proptest::prelude::*;

    fn ends() -> impl Strategy<Value = End> {
        prop_oneof![
            Just(End::Returned(Ok(Outcome::Complete))),
            Just(End::Returned(Ok(Outcome::Snooze(Duration::from_secs(3))))),
            Just(End::Returned(Ok(Outcome::Cancel("no".into())))),
            Just(End::Returned(Ok(Outcome::Fail("no".into())))),
            Just(End::Returned(Err(JobError::new("e")))),
            Just(End::Panicked("p".into())),
            Just(End::TimedOut(Duration::from_secs(1))),
            Just(End::Froze(Duration::from_secs(1))),
            Just(End::Rejected("r".into())),
            Just(End::Released),
        ]
    }

    proptest! {
        #[test]
        fn every_end_has_a_consistent_verdict(end in ends(), attempt in 1u16..30, max in 1u16..30, u in 0.0..1.0f64) {
            let verdict = judge(end.clone(), attempt, max, &RetryPolicy::default(), u);
            // Only what runs again has a delay; only a retry needs attempts left.
            prop_assert_eq!(verdict.delay.is_some(), matches!(verdict.outcome, Settled::Retry | Settled::Snooze));
            prop_assert!(verdict.outcome != Settled::Retry || attempt < max);
            // Whatever did not go well says why.
            let fine = matches!(verdict.outcome, Settled::Completed | Settled::Snooze | Settled::Release);
            prop_assert_eq!(verdict.error.is_none(), fine);
            prop_assert_eq!(verdict.outcome == Settled::Completed, matches!(end, End::Returned(Ok(Outcome::Complete))));
        }
    }
}
