//! What is promised of cursors.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use super::{Attempt, Attempts, Checker, Findings, Rule, told};
use crate::record::{Event, Fate};
use crate::store::{CursorEnd, FinishedJob};

pub(super) fn check(
    checker: &Checker<'_>,
    attempts: Option<&Attempts>,
    history: &[FinishedJob],
    ends: Vec<CursorEnd>,
    found: &mut Findings,
) {
    let mut cursors: BTreeMap<(&str, &str), Vec<&FinishedJob>> = BTreeMap::new();
    for job in history {
        if let Some(key) = &job.cursor_key {
            cursors.entry((&job.queue, key)).or_default().push(job);
        }
    }
    let ends: HashMap<_, _> = ends.into_iter().map(|end| ((end.queue, end.key), (end.version, end.state))).collect();
    let unordered = unordered(checker);
    for ((queue, key), mut jobs) in cursors {
        for job in jobs.iter().filter(|job| job.state == "completed" && job.version.is_none()) {
            found.add(Rule::Versions, format!("cursor {key}: job {} completed without a version", job.id));
        }
        jobs.retain(|job| job.version.is_some());
        jobs.sort_by_key(|job| job.version);
        let (version, state) = ends.get(&(queue.to_owned(), key.to_owned())).cloned().unwrap_or((0, None));
        versions(key, &jobs, version, found);
        if checker.strict_order {
            let ordered = jobs.iter().copied().filter(|job| !unordered.contains(&*job.enqueued_as));
            order(key, &ordered.collect::<Vec<_>>(), found);
        }
        if let Some(fold) = checker.fold {
            self::state(key, &jobs, fold, state, found);
        }
        if let Some(attempts) = attempts {
            overlap(key, &jobs, attempts, found);
        }
    }
}

/// The keys of jobs that may have been committed after jobs that their producer enqueued later.
fn unordered<'a>(checker: &'a Checker<'_>) -> HashSet<&'a str> {
    let unknown = |event: &'a Event| match event {
        Event::Enqueued { key, fate: Fate::Unknown } => Some(&**key),
        _ => None,
    };
    checker.record.iter().flatten().filter_map(|entry| unknown(&entry.event)).collect()
}

fn versions(key: &str, jobs: &[&FinishedJob], last: i64, found: &mut Findings) {
    let versions = jobs.iter().filter_map(|job| job.version);
    if let Some((version, due)) = versions.zip(1..).find(|(version, due)| version != due) {
        found.add(Rule::Versions, format!("cursor {key}: {version} where {due} should be"));
    }
    if jobs.len() as i64 != last {
        found.add(Rule::Versions, format!("cursor {key}: {} jobs, but the cursor is at {last}", jobs.len()));
    }
}

fn order(key: &str, jobs: &[&FinishedJob], found: &mut Findings) {
    let place = |job: &FinishedJob| (-i32::from(job.priority), job.expected_at.is_none(), job.expected_at, job.id);
    if let Some(pair) = jobs.windows(2).find(|pair| place(pair[0]) > place(pair[1])) {
        found.add(Rule::Order, format!("cursor {key}: job {} before job {}", pair[0].id, pair[1].id));
    }
}

fn state(key: &str, jobs: &[&FinishedJob], fold: super::FoldFn<'_>, last: Option<Value>, found: &mut Findings) {
    let parsed = |json: &str| serde_json::from_str(json).unwrap_or_default();
    let mut state: Option<Value> = None;
    for job in jobs {
        let snapshot = job.snapshot.as_deref().map(parsed);
        if snapshot.is_some() && snapshot != state {
            let id = job.id;
            found.add(Rule::State, format!("cursor {key}: job {id} began with {snapshot:?} instead of {state:?}"));
            return;
        }
        state = fold(state.as_ref(), &parsed(&job.payload)).or(state);
    }
    if state != last {
        found.add(Rule::State, format!("cursor {key}: {last:?} instead of {state:?}"));
    }
}

fn overlap(key: &str, jobs: &[&FinishedJob], attempts: &Attempts, found: &mut Findings) {
    let completed = jobs.iter().filter(|job| job.state == "completed");
    let in_order = completed.filter_map(|job| Some((job.id, told(attempts, job)?)));
    let counted = jobs.iter().flat_map(|job| {
        let made = attempts.get(&job.id).into_iter().flatten();
        made.filter(|attempt| attempt.counts()).map(|attempt| (job.id, attempt))
    });
    let mut in_time: Vec<_> = counted.collect();
    in_time.sort_by_key(|(_, attempt)| attempt.began);
    one_after_the_other(key, in_order, found);
    one_after_the_other(key, in_time.into_iter(), found);
}

fn one_after_the_other<'a>(key: &str, attempts: impl Iterator<Item = (i64, &'a Attempt)>, found: &mut Findings) {
    let mut before: Option<(i64, u64)> = None;
    for (id, attempt) in attempts {
        if let Some((other, until)) = before.filter(|(_, until)| *until > attempt.began) {
            let time = until - attempt.began;
            found.add(Rule::Overlap, format!("cursor {key}: job {id} began {time} ns before job {other} ended"));
        }
        before = attempt.ended.as_ref().map(|(at, _)| (id, *at)).or(before);
    }
}
