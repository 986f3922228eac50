//! A worker is one slot: an actor on a thread that takes runs from its pool's backlog, one at a time,
//! makes their attempts and hands the endings to the Completer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix::{Actor, AsyncContext, Context, WrapFuture};
use tracing::Instrument;

use super::backlog::{Backlog, Endings, JobRun};
use super::bell::Bell;
use super::messages::{Cause, EndedAttempt};
use super::supervisor::{Handlers, Runners};
use crate::lifecycle::{End, Settled, judge};
use crate::metrics::Metrics;
use crate::retry::RetryPolicy;
use crate::store::ClaimedJob;
use crate::store::Settlement;

/// What the slots of one pool share.
pub(crate) struct Shared {
    pub(crate) handlers: Arc<Handlers>,
    pub(crate) backlog: Backlog,
    pub(crate) endings: Endings,
    pub(crate) busy: AtomicUsize,
    /// Mean run in nanoseconds, moving.
    pub(crate) mean_run: AtomicU64,
    /// The backlog that the dispatcher should hear of when it is undercut; `usize::MAX` when it waits
    /// for nothing.
    pub(crate) hungry_below: AtomicUsize,
    pub(crate) queue: Arc<str>,
    pub(crate) bell: Bell,
    pub(crate) metrics: Metrics,
}

impl Shared {
    /// Wake the dispatcher if it waits for the backlog to shrink this far.
    pub(crate) fn ask_if_hungry(&self) {
        let below = self.hungry_below.load(Ordering::Acquire);
        if below != usize::MAX
            && self.backlog.jobs() <= below
            && self.hungry_below.swap(usize::MAX, Ordering::AcqRel) != usize::MAX
        {
            self.bell.wake(&self.queue, Cause::Slots);
        }
    }

    fn ran(&self, time: Duration) {
        let old = self.mean_run.load(Ordering::Relaxed);
        let new = time.as_nanos().min(u64::MAX as u128) as u64;
        self.mean_run.store(old - old / 8 + new / 8, Ordering::Relaxed);
    }
}

/// What a slot runs now. Whoever takes it out settles it: the slot when the attempt ends, or the pool
/// when it gives the slot up.
#[derive(Default)]
pub(crate) struct Current(Mutex<Option<Attempt>>);

pub(crate) struct Attempt {
    pub(crate) job: ClaimedJob,
    /// The jobs of the same run that come after it.
    pub(crate) rest: VecDeque<ClaimedJob>,
    /// Those that ended before it, not settled yet.
    pub(crate) ended: Vec<EndedAttempt>,
    pub(crate) started: Instant,
    pub(crate) limit: Duration,
}

impl Current {
    fn set(&self, attempt: Attempt) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(attempt);
    }

    /// Take the attempt, if `which` says so.
    pub(crate) fn take_if(&self, which: impl FnOnce(&Attempt) -> bool) -> Option<Attempt> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(which) { current.take() } else { None }
    }

    /// The lease is lost: tell the running handler to stop, and forget the rest of its run.
    pub(crate) fn forsake(&self) {
        if let Some(attempt) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            attempt.rest.clear();
            attempt.job.meta.cancelled.cancel();
        }
    }

    /// Tell the running handler to stop, if `which` says so.
    pub(crate) fn cancel_if(&self, which: impl FnOnce(&ClaimedJob) -> bool) {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(attempt) = current.as_ref().filter(|a| which(&a.job)) {
            attempt.job.meta.cancelled.cancel();
        }
    }
}

impl Attempt {
    /// Everything of the run, the attempt at hand having ended like this and the rest given back.
    pub(crate) fn end(self, end: End, handlers: &Handlers) -> Vec<EndedAttempt> {
        let mut ended = self.ended;
        ended.push(settlement(self.job, end, Some(self.started), handlers));
        ended.extend(self.rest.into_iter().map(|job| settlement(job, End::Released, None, handlers)));
        ended
    }
}

/// An attempt's end as what is settled.
pub(crate) fn settlement(job: ClaimedJob, end: End, started: Option<Instant>, handlers: &Handlers) -> EndedAttempt {
    let policy = handlers.get(&job.meta.kind).map_or_else(RetryPolicy::default, |entry| (entry.retry)());
    let verdict = judge(end, job.meta.attempt, job.meta.max_attempts, &policy, rand::random());
    EndedAttempt {
        queue: job.meta.queue,
        kind: job.meta.kind,
        ran: started.map(|s| s.elapsed()),
        settlement: Settlement {
            id: job.meta.id,
            token: job.token,
            tid: job.tid,
            verdict,
            started: started.unwrap_or_else(Instant::now),
            in_cursor: job.meta.cursor_key.is_some(),
            snapshot: job.meta.cursor_state,
        },
    }
}

/// One slot.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) current: Arc<Current>,
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.spawn(work(Arc::clone(&self.shared), Arc::clone(&self.current)).into_actor(self));
    }
}

/// Take runs until the backlog closes or the pool has given this slot up.
async fn work(shared: Arc<Shared>, current: Arc<Current>) {
    let mut runners = Runners::new(Arc::clone(&shared.handlers));
    while let Some(run) = shared.backlog.take().await {
        shared.busy.fetch_add(1, Ordering::AcqRel);
        shared.ask_if_hungry();
        let Some(ended) = execute(run, &shared, &current, &mut runners).await else {
            return; // given up; the pool has settled the run and rebuilt the slot
        };
        shared.endings.add(ended);
        shared.busy.fetch_sub(1, Ordering::AcqRel);
        shared.ask_if_hungry();
        // Handlers that never wait must not keep other slots of the thread from their turn.
        tokio::task::coop::consume_budget().await;
    }
}

/// Make the attempts of one run. None if the pool took the attempt away.
async fn execute(run: JobRun, shared: &Shared, current: &Current, runners: &mut Runners) -> Option<Vec<EndedAttempt>> {
    let mut ended = Vec::with_capacity(run.len());
    let mut rest: VecDeque<ClaimedJob> = run.into();
    let mut state = None;
    while let Some(mut job) = rest.pop_front() {
        if let Some(state) = &state {
            job.meta.cursor_state = Some(Arc::clone(state));
        }
        let meta = job.meta.clone();
        let payload = std::mem::take(&mut job.payload);
        let limit = shared.handlers.limit(&job);
        let span =
            tracing::info_span!("job", id = meta.id, kind = &*meta.kind, queue = &*meta.queue, attempt = meta.attempt);
        let started = Instant::now();
        current.set(Attempt { job, rest, ended, started, limit });
        let (end, rebuilt) = runners.attempt(&payload, meta, limit).instrument(span).await;
        let attempt = current.take_if(|_| true)?;
        if let Some(cause) = rebuilt {
            shared.metrics.rebuilt.with_label_values(&[&*attempt.job.meta.queue, cause]).inc();
        }
        (ended, rest) = (attempt.ended, attempt.rest);
        shared.ran(started.elapsed());
        let last = settlement(attempt.job, end, Some(started), &shared.handlers);
        let outcome = last.settlement.verdict.outcome;
        if let (Settled::Completed, Some(new)) = (outcome, &last.settlement.verdict.state) {
            state = Some(Arc::from(new.as_str()));
        }
        ended.push(last);
        if !outcome.is_final() {
            break; // the cursor waits for this job
        }
    }
    ended.extend(rest.into_iter().map(|job| settlement(job, End::Released, None, &shared.handlers)));
    Some(ended)
}
