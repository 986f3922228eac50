//! Checking what happened: from the history's rows, and from what producers and nodes recorded, whether every
//! promise was kept. Tests end with it, after faults were injected and healed and everything has drained; it
//! also checks a live database whose jobs are at rest.
//!
//! What processes saw is a [record](crate::record); `jobs` is what is promised of every job, `cursors` what is
//! promised of cursors. The rules read like the promises; each is checked by nothing but what is on record.

mod cursors;
mod jobs;

use std::collections::HashMap;
use std::fmt;

use serde_json::Value;

use crate::error::{Error, Result, shorten};
use crate::lifecycle::Settled;
use crate::record::{Entry, Event};
use crate::store::{FinishedJob, Store};

/// No more than so many violations of a rule are told.
const MAX_TOLD: usize = 20;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which promise.
    pub rule: Rule,
    /// What was found instead.
    pub found: String,
}

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// No job waits or runs, and no cursor is owned or held.
    Drained,
    /// A job finishes once, and a key makes one job.
    Once,
    /// An acknowledged job is in the history.
    Lost,
    /// What is in the history was enqueued, and its enqueue was not rolled back.
    Invented,
    /// What became of a job has its cause on record: completed, its handler's effect and end, in the attempt that
    /// the history tells of; failed, such an end; cancelled, a call; lost, three nodes.
    Cause,
    /// One final settle of a job is accepted; what it says is in the history, and nothing starts afterwards.
    Fenced,
    /// An attempt whose end the database did not acknowledge has a reason: its process went silent or lost its
    /// lease, or the answer did not come.
    Explained,
    /// No attempt is made beyond the job's limit.
    Attempts,
    /// No attempt starts before the job's time.
    Early,
    /// Nothing starts after a cancel was acknowledged, but what a node had claimed before.
    Cancelled,
    /// The versions of a cursor's jobs are 1..n without gap or fork, and n is the cursor's.
    Versions,
    /// A cursor's jobs ran in the order of priority, expected time and arrival.
    Order,
    /// The state is the fold of the completed jobs, and each job began with the fold of those before it.
    State,
    /// The attempts that counted did not overlap, and those that completed ran in the order of their versions.
    Overlap,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.found)
    }
}

/// The state that a job leaves, from the state before and its payload; none keeps the state.
pub type FoldFn<'a> = &'a dyn Fn(Option<&Value>, &Value) -> Option<Value>;

/// What to check besides what the history says of itself.
#[derive(Default)]
pub struct Checker<'a> {
    /// What jobs do to their cursor's state.
    pub fold: Option<FoldFn<'a>>,
    /// What producers and nodes recorded, in the order of time.
    pub record: Option<Vec<Entry>>,
    /// Every cursor's jobs came from one producer at a time, and none was scheduled for later or let
    /// others pass: then the order is that of the ids.
    pub strict_order: bool,
}

impl Checker<'_> {
    /// Check the whole schema. An empty history is an error: it proves nothing.
    pub async fn check(&self, store: &Store) -> Result<Vec<Violation>> {
        let history = store.finished_jobs().await?;
        if history.is_empty() {
            return Err(Error::Setup("there is no finished job to check".into()));
        }
        let mut found = Findings::default();
        for unrest in store.unrest().await? {
            found.add(Rule::Drained, unrest);
        }
        let mut times: HashMap<i64, usize> = HashMap::new();
        history.iter().for_each(|job| *times.entry(job.id).or_default() += 1);
        for (id, n) in times.into_iter().filter(|(_, n)| *n > 1) {
            found.add(Rule::Once, format!("job {id} finished {n} times"));
        }
        let attempts = self.record.as_deref().map(attempts);
        if let (Some(record), Some(attempts)) = (&self.record, &attempts) {
            jobs::enqueued(record, &history, &mut found);
            jobs::attempted(record, attempts, &history, &mut found);
        }
        let ends = store.cursor_ends().await?;
        cursors::check(self, attempts.as_ref(), &history, ends, &mut found);
        Ok(found.0)
    }
}

#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, rule: Rule, found: impl AsRef<str>) {
        if self.0.iter().filter(|violation| violation.rule == rule).count() < MAX_TOLD {
            self.0.push(Violation { rule, found: shorten(found.as_ref(), 500) });
        }
    }
}

/// One attempt at a job, as its node recorded it.
#[derive(Debug, Clone)]
struct Attempt {
    process: u32,
    number: u16,
    token: i64,
    began: u64,
    /// Its handler said that it did what it is for.
    effect: bool,
    /// When, and what was to become of the job.
    ended: Option<(u64, String)>,
    /// When the database answered, and whether it accepted.
    settled: Option<(u64, bool)>,
    /// The database was asked, and the answer did not come.
    unheard: bool,
}

impl Attempt {
    /// The database accepted how it ended.
    fn counts(&self) -> bool {
        self.settled.is_some_and(|(_, accepted)| accepted)
    }

    /// When the database accepted that the job is finished, and how.
    fn final_settle(&self) -> Option<(u64, &str)> {
        let (at, _) = self.settled.filter(|(_, accepted)| *accepted)?;
        let (_, outcome) = self.ended.as_ref()?;
        Settled::ALL.iter().find(|s| s.is_final() && s.as_str() == outcome).map(|s| (at, s.as_str()))
    }
}

/// The attempts at each job, in the order of their starts.
type Attempts = HashMap<i64, Vec<Attempt>>;

fn attempts(record: &[Entry]) -> Attempts {
    let mut all = Attempts::new();
    let find = |all: &mut Attempts, job: i64, token: i64, then: &dyn Fn(&mut Attempt)| {
        if let Some(attempt) = all.get_mut(&job).and_then(|a| a.iter_mut().rev().find(|a| a.token == token)) {
            then(attempt);
        }
    };
    for Entry { at, process, event } in record {
        match event {
            Event::Started { job, attempt, token } => all.entry(*job).or_default().push(Attempt {
                process: *process,
                number: *attempt,
                token: *token,
                began: *at,
                effect: false,
                ended: None,
                settled: None,
                unheard: false,
            }),
            Event::Ended { job, token, outcome, .. } => {
                find(&mut all, *job, *token, &|attempt| attempt.ended = Some((*at, outcome.clone())));
            }
            Event::Effect { job, attempt } => {
                let mut made = all.get_mut(job).into_iter().flatten().rev();
                let this = made.find(|a| a.number == *attempt && a.process == *process);
                this.into_iter().for_each(|attempt| attempt.effect = true);
            }
            Event::SettleUnknown { jobs } => {
                for job in jobs {
                    for attempt in all.get_mut(job).into_iter().flatten() {
                        attempt.unheard |= attempt.process == *process && attempt.settled.is_none();
                    }
                }
            }
            Event::Settled { jobs, tokens, refused, .. } => {
                for (place, (job, token)) in jobs.iter().zip(tokens).enumerate() {
                    let accepted = !refused.contains(&place);
                    find(&mut all, *job, *token, &|attempt| {
                        if !attempt.settled.is_some_and(|(_, accepted)| accepted) {
                            attempt.settled = Some((*at, accepted));
                        }
                    });
                }
            }
            _ => {}
        }
    }
    all
}

/// The attempt that a row of the history tells of.
fn told<'a>(attempts: &'a Attempts, job: &FinishedJob) -> Option<&'a Attempt> {
    // It may be on record twice: attempts are counted when they are claimed, and one that was given back is not.
    let of_that_number = |attempt: &&Attempt| attempt.number == job.attempt;
    attempts.get(&job.id)?.iter().rev().find(of_that_number)
}
