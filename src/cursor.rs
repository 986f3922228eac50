//! What cursors do: the options of their jobs, and what a run of jobs makes of its cursor.

use std::sync::Arc;

use crate::lifecycle::{Settled, Verdict};

/// What a job that waits for its next attempt does to the jobs behind it in its cursor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnRetry {
    /// They wait too: the order is strict.
    #[default]
    Hold,
    /// They pass; it runs when its time comes.
    Pass,
}

/// What a job that failed for good does to its cursor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The cursor goes on with the state it had.
    #[default]
    Continue,
    /// No job of the cursor starts until an operator resumes it.
    Halt,
}

/// Whose payload counts when a job collapses into one that waits. See [`NewJob::collapse`](crate::NewJob::collapse).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Collapse {
    /// The waiting job's.
    Keep,
    /// The new one.
    Replace,
    /// The fields of both objects, the new ones winning. What is no object is replaced.
    Merge,
}

macro_rules! names {
    ($($type:ident { $($variant:ident = $name:literal),* })*) => {$(
        impl $type {
            /// Its name in SQL.
            pub fn as_str(self) -> &'static str {
                match self { $($type::$variant => $name),* }
            }
        }
    )*};
}

names! {
    OnRetry { Hold = "hold", Pass = "pass" }
    OnFailure { Continue = "continue", Halt = "halt" }
    Collapse { Keep = "keep", Replace = "replace", Merge = "merge" }
}

/// A cursor as a claim owns it.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedCursor {
    /// Its key.
    pub key: Arc<str>,
    /// Its state as JSON text; none if it never had one.
    pub state: Option<Arc<str>>,
    /// How many jobs made it what it is.
    pub version: i64,
    /// Which ownership this is. If it follows the last one of this node, nobody else was here.
    pub turn: i64,
}

/// What a run makes of its cursor: the fold of its jobs' verdicts, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Fold {
    /// The cursor as the run found it.
    pub cursor: OwnedCursor,
    /// Its version now.
    pub version: i64,
    /// The state that the run's jobs left, if one did.
    pub state: Option<Arc<str>>,
    /// The job that holds the cursor until its next attempt.
    pub hold: Option<i64>,
    /// False if a job of the run goes back.
    pub whole: bool,
}

/// What one verdict did to the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The version that the job produced.
    pub version: Option<i64>,
    /// Whether the next job of the run may start.
    pub goes_on: bool,
}

impl Fold {
    /// A run begins.
    pub fn new(cursor: OwnedCursor) -> Self {
        Fold { version: cursor.version, cursor, state: None, hold: None, whole: true }
    }

    /// The state that the next job begins with.
    pub fn current(&self) -> Option<&Arc<str>> {
        self.state.as_ref().or(self.cursor.state.as_ref())
    }

    /// The next job of the run ended like this. Each job that completes, or that says a state when it
    /// fails or is cancelled, makes a version. A job that goes back ends the run, unless others may pass;
    /// so does a failure that halts.
    pub fn ended(&mut self, id: i64, verdict: &Verdict, on_retry: OnRetry, on_failure: OnFailure) -> Step {
        let outcome = verdict.outcome;
        if outcome.is_final() {
            if let Some(state) = &verdict.state {
                self.state = Some(Arc::from(state.as_str()));
            }
            let makes = outcome == Settled::Completed || verdict.state.is_some();
            self.version += i64::from(makes);
            let goes_on = outcome != Settled::Failed || on_failure == OnFailure::Continue;
            return Step { version: makes.then_some(self.version), goes_on };
        }
        self.whole = false;
        let holds = outcome != Settled::Release && on_retry == OnRetry::Hold;
        if holds {
            self.hold = Some(id);
        }
        Step { version: None, goes_on: outcome != Settled::Release && !holds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fold() -> Fold {
        Fold::new(OwnedCursor { key: "k".into(), state: Some("1".into()), version: 7, turn: 3 })
    }

    fn verdict(outcome: Settled, state: Option<&str>) -> Verdict {
        Verdict { outcome, state: state.map(str::to_owned), ..Verdict::default() }
    }

    #[test]
    fn versions_count_completions_and_states() {
        let mut fold = fold();
        let mut step = |v: Verdict| fold.ended(1, &v, OnRetry::Hold, OnFailure::Continue);
        assert_eq!(step(verdict(Settled::Completed, None)), Step { version: Some(8), goes_on: true });
        assert_eq!(step(verdict(Settled::Failed, None)), Step { version: None, goes_on: true });
        assert_eq!(step(verdict(Settled::Failed, Some("null"))), Step { version: Some(9), goes_on: true });
        assert_eq!(step(verdict(Settled::Cancelled, None)), Step { version: None, goes_on: true });
        assert_eq!((fold.version, fold.current().map(|s| &**s), fold.whole), (9, Some("null"), true));
    }

    #[test]
    fn a_retry_holds_or_lets_pass_and_a_failure_may_halt() {
        let retry = verdict(Settled::Retry, None);
        let mut holds = fold();
        assert!(!holds.ended(5, &retry, OnRetry::Hold, OnFailure::Continue).goes_on);
        assert_eq!((holds.hold, holds.whole), (Some(5), false));
        let mut passes = fold();
        assert!(passes.ended(5, &retry, OnRetry::Pass, OnFailure::Continue).goes_on);
        assert_eq!((passes.hold, passes.whole), (None, false));
        assert!(!fold().ended(5, &verdict(Settled::Release, None), OnRetry::Pass, OnFailure::Continue).goes_on);
        assert!(!fold().ended(5, &verdict(Settled::Failed, None), OnRetry::Hold, OnFailure::Halt).goes_on);
    }
}
