//! What is promised of every job.

use std::collections::HashMap;

use super::{Attempt, Attempts, Findings, Rule, told};
use crate::record::{Entry, Event, Fate};
use crate::store::FinishedJob;

/// How long after it was healed a fault may still be the reason that a lease is lost: calls that hang are given
/// up, connections made anew.
const AFTERMATH: u64 = 30_000_000_000;

/// What producers enqueued is in the history, and nothing else.
pub(super) fn enqueued(record: &[Entry], history: &[FinishedJob], found: &mut Findings) {
    let mut by_key: HashMap<&str, Vec<i64>> = HashMap::new();
    for job in history {
        by_key.entry(&job.enqueued_as).or_default().push(job.id);
    }
    let mut enqueued = 0;
    for entry in record {
        let Event::Enqueued { key, fate } = &entry.event else { continue };
        enqueued += 1;
        match (fate, by_key.remove(&**key).unwrap_or_default().as_slice()) {
            (Fate::Committed, []) => {
                found.add(Rule::Lost, format!("{key} was acknowledged, and is not in the history"))
            }
            (Fate::RolledBack, [_, ..]) => found.add(Rule::Invented, format!("{key} was rolled back, and ran")),
            (_, jobs @ [_, _, ..]) => found.add(Rule::Once, format!("{key} is jobs {jobs:?}")),
            _ => {}
        }
    }
    if enqueued > 0 {
        for (key, jobs) in by_key {
            found.add(Rule::Invented, format!("nobody enqueued jobs {jobs:?} (key {key:?})"));
        }
    }
}

/// What nodes did to jobs is what the history says of them.
pub(super) fn attempted(record: &[Entry], attempts: &Attempts, history: &[FinishedJob], found: &mut Findings) {
    let (faults, leases) = (faults(record), leases(record));
    let cancels = cancels(record);
    let none = Vec::new();
    for job in history {
        let id = job.id;
        let made = attempts.get(&id).unwrap_or(&none);
        if job.attempt > job.max_attempts {
            found.add(Rule::Attempts, format!("job {id}: attempt {} of {}", job.attempt, job.max_attempts));
        }
        if job.started_at.is_some_and(|started| started < job.run_at) {
            found.add(Rule::Early, format!("job {id} started at {:?}, before {}", job.started_at, job.run_at));
        }
        if job.state == "completed" {
            let ended = told(attempts, job).and_then(|attempt| attempt.ended.as_ref());
            if ended.is_none_or(|(_, outcome)| outcome != "completed") {
                found
                    .add(Rule::Effect, format!("job {id} completed with attempt {}, on record: {made:?}", job.attempt));
            }
        }
        fenced(job, made, found);
        explained(id, made, &faults, &leases, found);
        if let Some((at, answer)) = cancels.get(&id) {
            let starts = made.iter().filter(|attempt| attempt.began > *at).count();
            if starts > usize::from(*answer == "requested") {
                found.add(Rule::Cancelled, format!("job {id} started {starts} times after its cancel was {answer}"));
            }
        }
    }
}

fn fenced(job: &FinishedJob, made: &[Attempt], found: &mut Findings) {
    let accepted: Vec<_> = made.iter().filter_map(|attempt| Some((attempt.number, attempt.final_settle()?))).collect();
    let id = job.id;
    match accepted[..] {
        [] => {}
        [(number, (at, outcome))] => {
            if (number, outcome) != (job.attempt, &*job.state) {
                let told = format!("the history says attempt {} {}", job.attempt, job.state);
                found.add(Rule::Fenced, format!("job {id}: attempt {number} was accepted as {outcome}, {told}"));
            }
            if made.iter().any(|attempt| attempt.began > at) {
                found.add(Rule::Fenced, format!("job {id} started again after it was settled: {made:?}"));
            }
        }
        _ => found.add(Rule::Fenced, format!("job {id}: {} final settles were accepted: {made:?}", accepted.len())),
    }
}

fn explained(id: i64, made: &[Attempt], faults: &[(u64, u64)], leases: &Leases, found: &mut Findings) {
    for (n, attempt) in made.iter().enumerate() {
        let until = made.get(n + 1).map_or(u64::MAX, |next| next.began);
        let acknowledged = attempt.settled.is_some_and(|(_, accepted)| accepted);
        let met_a_fault = || faults.iter().any(|(begin, end)| *begin < until && attempt.began < *end);
        let lost_its_lease = || {
            let events = leases.get(&attempt.process).map_or(&[][..], Vec::as_slice);
            events.iter().find(|(at, _)| *at > attempt.began).is_some_and(|(_, lost)| *lost)
        };
        if !acknowledged && !met_a_fault() && !lost_its_lease() {
            found.add(Rule::Explained, format!("job {id}: no fault explains {attempt:?}"));
        }
    }
}

/// When each process began a lease or lost one.
type Leases = HashMap<u32, Vec<(u64, bool)>>;

fn leases(record: &[Entry]) -> Leases {
    let mut leases = Leases::new();
    for entry in record {
        let lost = match entry.event {
            Event::LeaseBegun { .. } => false,
            Event::LeaseLost { .. } => true,
            _ => continue,
        };
        leases.entry(entry.process).or_default().push((entry.at, lost));
    }
    leases
}

/// When something was broken.
fn faults(record: &[Entry]) -> Vec<(u64, u64)> {
    let mut windows = Vec::new();
    let mut open: HashMap<&str, u64> = HashMap::new();
    for entry in record {
        match &entry.event {
            Event::Fault { name, begins: true } => drop(open.entry(name).or_insert(entry.at)),
            Event::Fault { name, begins: false } => {
                windows.extend(open.remove(&**name).map(|begin| (begin, entry.at + AFTERMATH)));
            }
            _ => {}
        }
    }
    windows.extend(open.into_values().map(|begin| (begin, u64::MAX)));
    windows
}

/// The first answered cancel of each job.
fn cancels(record: &[Entry]) -> HashMap<i64, (u64, &str)> {
    let mut cancels = HashMap::new();
    for entry in record {
        if let Event::Cancelled { job, answer } = &entry.event {
            cancels.entry(*job).or_insert((entry.at, &**answer));
        }
    }
    cancels
}
