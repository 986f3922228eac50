//! The two lists that a pool's threads share: claimed runs that wait for a slot, and runs that
//! ended and wait to be settled. Both pass many entries for one wake-up: handing over a job must cost
//! no more than a job that does nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::Recipient;
use tokio::sync::Notify;

use super::messages::Collect;
use crate::pacing::MAX_UNSETTLED;
use crate::store::{ClaimedJob, ClaimedRun, EndedRun};

/// Claimed runs, in order.
#[derive(Default)]
pub(crate) struct Backlog {
    runs: Mutex<VecDeque<ClaimedRun>>,
    /// Jobs in it (a run may be many).
    jobs: AtomicUsize,
    idle: Notify,
    closed: AtomicBool,
}

impl Backlog {
    /// Add runs and wake a slot. Hands them back if the backlog is closed.
    pub(crate) fn add(&self, runs: Vec<ClaimedRun>) -> Result<(), Vec<ClaimedRun>> {
        let mut queue = lock(&self.runs);
        if self.is_closed() {
            return Err(runs);
        }
        self.jobs.fetch_add(runs.iter().map(|run| run.jobs.len()).sum(), Ordering::AcqRel);
        queue.extend(runs);
        drop(queue);
        self.idle.notify_one();
        Ok(())
    }

    /// Take the next run; wait if there is none. None when the backlog is closed.
    pub(crate) async fn take(&self) -> Option<ClaimedRun> {
        loop {
            if let Some(run) = self.pop() {
                if self.jobs() > 0 {
                    self.idle.notify_one(); // each slot that starts wakes the next
                }
                return Some(run);
            }
            if self.is_closed() {
                self.idle.notify_one();
                return None;
            }
            self.idle.notified().await;
        }
    }

    fn pop(&self) -> Option<ClaimedRun> {
        let run = lock(&self.runs).pop_front()?;
        self.jobs.fetch_sub(run.jobs.len(), Ordering::AcqRel);
        Some(run)
    }

    /// Take all that is left; it has not started.
    pub(crate) fn empty(&self) -> VecDeque<ClaimedRun> {
        let runs = std::mem::take(&mut *lock(&self.runs));
        self.jobs.fetch_sub(runs.iter().map(|run| run.jobs.len()).sum(), Ordering::AcqRel);
        runs
    }

    /// Jobs that are cancelled before they start do not.
    pub(crate) fn cancel_if(&self, which: impl Fn(&ClaimedJob) -> bool) {
        let runs = lock(&self.runs);
        runs.iter().flat_map(|run| &run.jobs).filter(|job| which(job)).for_each(|job| job.meta.cancelled.cancel());
    }

    /// Slots end when they next look for a run.
    pub(crate) fn close(&self) {
        let guard = lock(&self.runs);
        self.closed.store(true, Ordering::Release);
        drop(guard);
        self.idle.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// How many jobs wait.
    pub(crate) fn jobs(&self) -> usize {
        self.jobs.load(Ordering::Acquire)
    }

    /// Wake one more slot: the one that was woken may be on a blocked thread.
    pub(crate) fn nudge(&self) {
        if self.jobs() > 0 {
            self.idle.notify_one();
        }
    }
}

/// Runs that ended and wait to be settled.
#[derive(Default)]
pub(crate) struct Outbox {
    ended: Mutex<Vec<EndedRun>>,
    /// Jobs that ended and are not settled: here, or with the Completer.
    unsettled: AtomicUsize,
}

impl Outbox {
    /// All of them.
    pub(crate) fn collect(&self) -> Vec<EndedRun> {
        std::mem::take(&mut *lock(&self.ended))
    }

    /// How many jobs ended and are not settled.
    pub(crate) fn unsettled(&self) -> usize {
        self.unsettled.load(Ordering::Acquire)
    }

    /// So many jobs are settled. Answers whether claims waited for that.
    pub(crate) fn settled(&self, jobs: usize) -> bool {
        let before = self.unsettled.fetch_sub(jobs, Ordering::AcqRel);
        before >= MAX_UNSETTLED && before - jobs < MAX_UNSETTLED
    }
}

/// The way of ended runs to the Completer.
#[derive(Clone)]
pub(crate) struct Endings {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) completer: Recipient<Collect>,
}

impl Endings {
    /// Add runs, and tell the Completer unless it has been told already.
    pub(crate) fn add(&self, ended: impl IntoIterator<Item = EndedRun>) {
        let mut all = lock(&self.outbox.ended);
        let known = all.len();
        all.extend(ended);
        self.outbox.unsettled.fetch_add(all[known..].iter().map(|run| run.jobs.len()).sum(), Ordering::AcqRel);
        drop(all);
        if known == 0 {
            self.completer.do_send(Collect);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
