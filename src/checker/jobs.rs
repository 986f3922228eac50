//! What is promised of every job.

use std::collections::HashMap;

use super::{Attempt, Attempts, Findings, Rule, told};
use crate::record::{Entry, Event, Fate};
use crate::store::FinishedJob;

/// A call that a process did not live to hear of, or to give up, had begun less than this before its end.
const UNHEARD: u64 = 20_000_000_000;

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
    let (processes, cancels) = (processes(record), cancels(record));
    for job in history {
        let id = job.id;
        let made = attempts.get(&id).map_or(&[][..], Vec::as_slice);
        if job.attempt > job.max_attempts {
            found.add(Rule::Attempts, format!("job {id}: attempt {} of {}", job.attempt, job.max_attempts));
        }
        if job.started_at.is_some_and(|started| started < job.run_at) {
            found.add(Rule::Early, format!("job {id} started at {:?}, before {}", job.started_at, job.run_at));
        }
        let cancel = cancels.get(&id);
        if !has_cause(job, told(attempts, job), cancel.is_some()) {
            found.add(Rule::Cause, format!("job {id} is {}, attempt {}, on record: {made:?}", job.state, job.attempt));
        }
        fenced(job, made, found);
        explained(id, made, &processes, found);
        if let Some((at, answer)) = cancel.filter(|(_, answer)| *answer != "unknown") {
            let starts = made.iter().filter(|attempt| attempt.began > *at).count();
            if starts > usize::from(*answer == "requested") {
                found.add(Rule::Cancelled, format!("job {id} started {starts} times after its cancel was {answer}"));
            }
        }
    }
}

fn has_cause(job: &FinishedJob, told: Option<&Attempt>, cancelled: bool) -> bool {
    let ended = |as_what: &str| {
        told.is_some_and(|attempt| attempt.ended.as_ref().is_some_and(|(_, outcome)| outcome == as_what))
    };
    match job.state.as_str() {
        "completed" => ended("completed") && told.is_some_and(|attempt| attempt.effect),
        // A node that does not count leaves it to the database to end the last retry.
        "failed" => ended("failed") || ended("retry") && job.attempt == job.max_attempts,
        "cancelled" => cancelled || ended("cancelled"),
        _ => job.losses >= 3 || job.attempt == job.max_attempts,
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

fn explained(id: i64, made: &[Attempt], processes: &HashMap<u32, Process>, found: &mut Findings) {
    for (n, attempt) in made.iter().enumerate().filter(|(_, attempt)| !attempt.counts()) {
        let process = &processes[&attempt.process];
        let until = match made.get(n + 1) {
            Some(next) => next.began,
            None => attempt.ended.as_ref().map_or(u64::MAX, |(at, _)| at + UNHEARD),
        };
        let went_silent = attempt.settled.is_none() && process.last_seen < until;
        let next_lease_event = process.leases.iter().find(|(at, _)| *at > attempt.began);
        let lost_its_lease = next_lease_event.is_some_and(|(_, lost)| *lost);
        if !attempt.unheard && !went_silent && !lost_its_lease {
            found.add(Rule::Explained, format!("job {id}: nothing explains {attempt:?}"));
        }
    }
}

/// What is known of a process.
#[derive(Default)]
struct Process {
    last_seen: u64,
    /// When it began a lease or lost one.
    leases: Vec<(u64, bool)>,
}

fn processes(record: &[Entry]) -> HashMap<u32, Process> {
    let mut processes: HashMap<u32, Process> = HashMap::new();
    for entry in record {
        let process = processes.entry(entry.process).or_default();
        process.last_seen = entry.at;
        match entry.event {
            Event::LeaseBegun { .. } => process.leases.push((entry.at, false)),
            Event::LeaseLost { .. } => process.leases.push((entry.at, true)),
            _ => {}
        }
    }
    processes
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
