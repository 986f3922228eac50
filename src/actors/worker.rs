//! A worker is one slot: an actor on a thread that takes runs from its pool's backlog, one at a time,
//! makes their attempts and hands the endings to the Completer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix::{Actor, AsyncContext, Context, WrapFuture};
use tracing::Instrument;

use super::backlog::{Backlog, Endings};
use super::bell::Bell;
use super::lease::Lease;
use super::messages::Cause;
use super::sticky::Sticky;
use super::supervisor::{Handlers, Runners};
use crate::lifecycle::{End, Settled, judge};
use crate::metrics::Metrics;
use crate::outcome::JobError;
use crate::record;
use crate::retry::RetryPolicy;
use crate::store::{ClaimedJob, ClaimedRun, EndedRun, Store};

/// After a failure to read a payload.
const FETCH_PAUSE: Duration = Duration::from_millis(500);

/// What a node gives the slots of all its pools to work with.
#[derive(Clone)]
pub(crate) struct Tools {
    pub(crate) store: Store,
    pub(crate) handlers: Arc<Handlers>,
    pub(crate) lease: Lease,
    pub(crate) endings: Endings,
    pub(crate) bell: Bell,
    pub(crate) metrics: Metrics,
}

/// What the slots of one pool share.
pub(crate) struct Shared {
    pub(crate) queue: Arc<str>,
    pub(crate) tools: Tools,
    pub(crate) sticky: Arc<Sticky>,
    pub(crate) backlog: Backlog,
    pub(crate) busy: AtomicUsize,
    /// Mean run in nanoseconds, moving.
    pub(crate) mean_run: AtomicU64,
    /// The backlog that the dispatcher should hear of when it is undercut; `usize::MAX` when it waits
    /// for nothing.
    pub(crate) hungry_below: AtomicUsize,
}

impl Shared {
    /// Wake the dispatcher if it waits for the backlog to shrink this far.
    pub(crate) fn ask_if_hungry(&self) {
        let below = self.hungry_below.load(Ordering::Acquire);
        if below != usize::MAX
            && self.backlog.jobs() <= below
            && self.hungry_below.swap(usize::MAX, Ordering::AcqRel) != usize::MAX
        {
            self.tools.bell.wake(&self.queue, Cause::Slots);
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
    pub(crate) started: Instant,
    pub(crate) limit: Duration,
    run: Progress,
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

    /// Tell running handlers to stop, and jobs of the run that have not started not to, if `which` says so.
    pub(crate) fn cancel_if(&self, which: impl Fn(&ClaimedJob) -> bool) {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = current.iter().flat_map(|attempt| std::iter::once(&attempt.job).chain(&attempt.run.rest));
        jobs.filter(|job| which(job)).for_each(|job| job.meta.cancelled.cancel());
    }
}

impl Attempt {
    /// The run, the attempt at hand having ended like this and the rest given back.
    pub(crate) fn end(mut self, end: End, handlers: &Handlers) -> EndedRun {
        self.run.ended(self.job, end, Some(self.started), handlers);
        self.run.finish(handlers)
    }
}

/// How far a run has come.
pub(crate) struct Progress {
    rest: VecDeque<ClaimedJob>,
    done: EndedRun,
}

impl Progress {
    pub(crate) fn begin(run: ClaimedRun, queue: &Arc<str>) -> Self {
        let done = EndedRun::new(Arc::clone(queue), run.cursor, run.jobs.len());
        Progress { rest: run.jobs, done }
    }

    /// The next job, with the cursor as the jobs before it have left it.
    fn next(&mut self) -> Option<ClaimedJob> {
        let mut job = self.rest.pop_front()?;
        if let Some(fold) = &self.done.cursor {
            job.meta.cursor_state = fold.current().cloned();
            job.meta.cursor_version = Some(fold.version);
        }
        Some(job)
    }

    /// An attempt ended. Answers whether the next job may start.
    fn ended(&mut self, job: ClaimedJob, end: End, started: Option<Instant>, handlers: &Handlers) -> bool {
        let policy = handlers.get(&job.meta.kind).map_or_else(RetryPolicy::default, |entry| entry.retry);
        let limits = handlers.limits();
        let verdict = judge(end, job.meta.attempt, job.meta.max_attempts, &policy, rand::random()).within(limits);
        if started.is_some() {
            let (outcome, token) = (verdict.outcome.as_str(), job.token);
            tracing::trace!(target: record::TARGET, event = "ended", job = job.meta.id, attempt = job.meta.attempt, token, outcome);
        }
        self.done.end(job, verdict, started, limits.snapshot)
    }

    /// Whether the last attempt completed.
    fn completed(&self) -> bool {
        self.done.jobs.last().is_some_and(|job| job.verdict.outcome == Settled::Completed)
    }

    /// Nothing more of it starts here: the rest is given back.
    pub(crate) fn finish(mut self, handlers: &Handlers) -> EndedRun {
        while let Some(job) = self.rest.pop_front() {
            self.ended(job, End::Released, None, handlers);
        }
        self.done
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
    let mut runners = Runners::new(Arc::clone(&shared.tools.handlers), Arc::clone(&shared.sticky));
    while let Some(run) = shared.backlog.take().await {
        shared.busy.fetch_add(1, Ordering::AcqRel);
        shared.ask_if_hungry();
        let Some(ended) = execute(run, &shared, &current, &mut runners).await else {
            return; // given up; the pool has settled the run and rebuilt the slot
        };
        shared.tools.endings.add([ended]);
        shared.busy.fetch_sub(1, Ordering::AcqRel);
        shared.ask_if_hungry();
        // Handlers that never wait must not keep other slots of the thread from their turn.
        tokio::task::coop::consume_budget().await;
    }
}

/// The job's payload, which a claim leaves behind if it is large. Outages are waited for, as long as the job is
/// ours and its timeout allows.
async fn payload(job: &mut ClaimedJob, tools: &Tools, limit: Duration) -> Result<Box<str>, End> {
    if let Some(payload) = job.payload.take() {
        return Ok(payload);
    }
    let begin = Instant::now();
    while tools.lease.covers(job.token) {
        match tools.store.running_payload(job.meta.id, job.token).await {
            Ok(payload) => return payload.ok_or(End::Released),
            Err(error) if begin.elapsed() > limit => {
                return Err(End::Returned(Err(JobError::new(format!("its payload cannot be read: {error}")))));
            }
            Err(error) => {
                tracing::warn!(%error, job = job.meta.id, "a payload cannot be read; it is tried again");
                tokio::time::sleep(FETCH_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
            }
        }
    }
    Err(End::Released)
}

/// Make the attempts of one run. None if the pool took the attempt away.
async fn execute(run: ClaimedRun, shared: &Shared, current: &Current, runners: &mut Runners) -> Option<EndedRun> {
    let tools = &shared.tools;
    runners.enter(run.cursor.as_ref());
    let mut run = Progress::begin(run, &shared.queue);
    while let Some(mut job) = run.next() {
        let limit = tools.handlers.limit(&job);
        let payload = payload(&mut job, tools, limit).await;
        let (meta, token, started) = (job.meta.clone(), job.token, Instant::now());
        // From here on, whoever takes jobs back finds this one in its slot; so look only now if somebody has: it is
        // cancelled, or its claim is not ours any more.
        current.set(Attempt { job, started, limit, run });
        let ours = !meta.cancelled.is_cancelled() && tools.lease.covers(token);
        let (end, rebuilt, made) = match payload {
            Ok(payload) if ours => {
                let (id, attempt) = (meta.id, meta.attempt);
                tracing::trace!(target: record::TARGET, event = "started", job = id, attempt, token);
                let span = tracing::info_span!("job", id, kind = &*meta.kind, queue = &*meta.queue, attempt);
                let (end, rebuilt) = runners.attempt(&payload, meta, limit).instrument(span).await;
                (end, rebuilt, true)
            }
            Ok(_) => (End::Released, None, false),
            Err(end) => (end, None, false),
        };
        let attempt = current.take_if(|_| true)?;
        if let Some(cause) = rebuilt {
            tools.metrics.rebuilt.with_label_values(&[&*shared.queue, cause]).inc();
        }
        run = attempt.run;
        if made {
            shared.ran(started.elapsed());
        }
        let goes_on = run.ended(attempt.job, end, made.then_some(started), &tools.handlers);
        if !run.completed() {
            runners.doubt();
        }
        if !goes_on {
            break;
        }
    }
    runners.leave();
    Some(run.finish(&tools.handlers))
}
