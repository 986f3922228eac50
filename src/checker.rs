//! Checking what happened: from the history's rows, and from what handlers recorded of their effects,
//! whether cursors kept their promises. Tests end with it, after faults were injected and everything has
//! drained; it also checks a live database whose cursors are at rest.
//!
//! Handlers record with a [`Recorder`], which appends lines to a file that many processes may share.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::job::Meta;
use crate::store::{FinishedCursorJob, Store};

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which promise.
    pub rule: Rule,
    /// The cursor's key; empty if it is about none.
    pub cursor: String,
    /// What was found instead.
    pub found: String,
}

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// No job waits or runs, and no cursor is owned or held.
    Drained,
    /// A job finishes once.
    Once,
    /// The versions of a cursor's jobs are 1..n without gap or fork, and n is the cursor's.
    Versions,
    /// Jobs ran in the order of priority, expected time and arrival.
    Order,
    /// The state is the fold of the completed jobs, and each job began with the fold of those before it.
    State,
    /// The attempts that completed did not overlap, and ran in the order of their versions.
    Overlap,
    /// Each completed job has its effect on record.
    Effect,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: cursor {:?}: {}", self.rule, self.cursor, self.found)
    }
}

/// One line of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// The job.
    pub job: i64,
    /// Which attempt of it.
    pub attempt: u16,
    /// The process that made it.
    pub process: u32,
    /// Nanoseconds since the machine booted.
    pub at: u64,
    /// False when the attempt began, true when it ended well.
    pub ended: bool,
}

/// Appends effects to a file. A line is one write: processes may share the file.
pub struct Recorder(std::fs::File);

impl Recorder {
    /// Open or create the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = std::fs::File::options().create(true).append(true).open(path);
        file.map(Recorder).map_err(|e| Error::io(path.display().to_string(), e))
    }

    /// An attempt began.
    pub fn began(&self, job: &Meta) -> Result<()> {
        self.write(job, false)
    }

    /// It ended well.
    pub fn ended(&self, job: &Meta) -> Result<()> {
        self.write(job, true)
    }

    fn write(&self, job: &Meta, ended: bool) -> Result<()> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let at = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let effect = Effect { job: job.id, attempt: job.attempt, process: std::process::id(), at, ended };
        let mut line = serde_json::to_vec(&effect)?;
        line.push(b'\n');
        (&self.0).write_all(&line)?;
        Ok(())
    }
}

/// Read a record. A last line that a killed process left unfinished is skipped.
pub fn read_effects(path: impl AsRef<Path>) -> Result<Vec<Effect>> {
    let path = path.as_ref();
    let io = |e| Error::io(path.display().to_string(), e);
    let lines = BufReader::new(std::fs::File::open(path).map_err(io)?).lines();
    lines
        .map(|line| line.map_err(io))
        .filter_map(|line| line.map(|l| serde_json::from_str(&l).ok()).transpose())
        .collect()
}

/// The state that a job leaves, from the state before and its payload; none keeps the state.
pub type FoldFn<'a> = &'a dyn Fn(Option<&Value>, &Value) -> Option<Value>;

/// What to check besides versions.
#[derive(Default)]
pub struct Checker<'a> {
    /// What jobs do to the state.
    pub fold: Option<FoldFn<'a>>,
    /// What handlers recorded.
    pub effects: Option<Vec<Effect>>,
    /// Every cursor's jobs came from one producer at a time, and none was scheduled for later or let
    /// others pass: then the order is that of the ids.
    pub strict_order: bool,
}

impl Checker<'_> {
    /// Check every cursor of the schema. An empty history is an error: it proves nothing.
    pub async fn check(&self, store: &Store) -> Result<Vec<Violation>> {
        let jobs = store.finished_cursor_jobs().await?;
        if jobs.is_empty() {
            return Err(Error::Setup("there is no finished job of a cursor to check".into()));
        }
        let mut found = Findings(Vec::new());
        for unrest in store.unrest().await? {
            found.add(Rule::Drained, "", unrest);
        }
        let mut seen = HashMap::new();
        for job in &jobs {
            *seen.entry(job.id).or_insert(0) += 1;
        }
        seen.iter()
            .filter(|(_, n)| **n > 1)
            .for_each(|(id, n)| found.add(Rule::Once, "", format!("job {id}, {n} times")));
        let mut cursors: BTreeMap<(String, String), Vec<FinishedCursorJob>> = BTreeMap::new();
        for job in jobs {
            cursors.entry((job.queue.clone(), job.key.clone())).or_default().push(job);
        }
        let ends: HashMap<_, _> = store
            .cursor_ends()
            .await?
            .into_iter()
            .map(|end| ((end.queue, end.key), (end.version, end.state)))
            .collect();
        let effects = self.effects.as_deref().map(by_attempt);
        for ((queue, key), mut jobs) in cursors {
            for job in jobs.iter().filter(|job| job.completed && job.version.is_none()) {
                found.add(Rule::Versions, &key, format!("job {} completed without a version", job.id));
            }
            jobs.retain(|job| job.version.is_some());
            jobs.sort_by_key(|job| job.version);
            let (version, state) = ends.get(&(queue, key.clone())).cloned().unwrap_or((0, None));
            self.versions(&key, &jobs, version, &mut found);
            self.order(&key, &jobs, &mut found);
            self.state(&key, &jobs, state, &mut found);
            if let Some(effects) = &effects {
                overlap(&key, &jobs, effects, &mut found);
            }
        }
        Ok(found.0)
    }

    fn versions(&self, key: &str, jobs: &[FinishedCursorJob], last: i64, found: &mut Findings) {
        let versions: Vec<i64> = jobs.iter().filter_map(|job| job.version).collect();
        if let Some((i, version)) = versions.iter().enumerate().find(|(i, version)| **version != *i as i64 + 1) {
            found.add(Rule::Versions, key, format!("{version} where {} should be", i + 1));
        }
        if versions.len() as i64 != last {
            found.add(Rule::Versions, key, format!("{} jobs, but the cursor is at {last}", versions.len()));
        }
    }

    fn order(&self, key: &str, jobs: &[FinishedCursorJob], found: &mut Findings) {
        if !self.strict_order {
            return;
        }
        let place =
            |job: &FinishedCursorJob| (-i32::from(job.priority), job.expected_at.is_none(), job.expected_at, job.id);
        if let Some(pair) = jobs.windows(2).find(|pair| place(&pair[0]) > place(&pair[1])) {
            found.add(Rule::Order, key, format!("job {} before job {}", pair[0].id, pair[1].id));
        }
    }

    fn state(&self, key: &str, jobs: &[FinishedCursorJob], last: Option<Value>, found: &mut Findings) {
        let Some(fold) = self.fold else { return };
        let mut state: Option<Value> = None;
        for job in jobs {
            if job.snapshot.is_some() && job.snapshot != state {
                found.add(
                    Rule::State,
                    key,
                    format!("job {} began with {:?} instead of {state:?}", job.id, job.snapshot),
                );
                return;
            }
            state = fold(state.as_ref(), &job.payload).or(state);
        }
        if state != last {
            found.add(Rule::State, key, format!("{last:?} instead of {state:?}"));
        }
    }
}

struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, rule: Rule, cursor: &str, found: impl Into<String>) {
        self.0.push(Violation { rule, cursor: cursor.to_owned(), found: crate::error::shorten(&found.into(), 500) });
    }
}

/// When an attempt began, and when it ended.
type Interval = (u64, Option<u64>);

fn by_attempt(effects: &[Effect]) -> HashMap<(i64, u16), Vec<Interval>> {
    let mut intervals: HashMap<(i64, u16), Vec<Interval>> = HashMap::new();
    for effect in effects {
        let all = intervals.entry((effect.job, effect.attempt)).or_default();
        match all.last_mut() {
            Some((_, end @ None)) if effect.ended => *end = Some(effect.at),
            _ => all.push((effect.at, None)),
        }
    }
    intervals
}

/// The attempt that a row of the history tells of is the one whose settle was accepted. It may be on
/// record twice: attempts are counted when they are claimed, and one that was given back is not.
fn overlap(key: &str, jobs: &[FinishedCursorJob], effects: &HashMap<(i64, u16), Vec<Interval>>, found: &mut Findings) {
    let mut before: Option<(i64, u64)> = None;
    for job in jobs.iter().filter(|job| job.completed) {
        let recorded = effects.get(&(job.id, job.attempt)).and_then(|all| all.last());
        let Some((began, Some(ended))) = recorded else {
            found.add(Rule::Effect, key, format!("job {} completed without effect: {recorded:?}", job.id));
            continue;
        };
        if let Some((other, until)) = before.filter(|(_, until)| until > began) {
            found.add(
                Rule::Overlap,
                key,
                format!("job {} began {} ns before job {other} ended", job.id, until - began),
            );
        }
        before = Some((job.id, *ended));
    }
}
