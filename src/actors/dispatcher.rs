//! The dispatcher of one queue: claims what the pool has room for.
//!
//! A pass is one claim. It reads each lane from its watermark (see [`Marks`](crate::pacing::Marks)), or from its
//! start when a full pass is due (see [`FullPasses`](crate::pacing::FullPasses)). Passes follow each other until one
//! brings nothing; then the dispatcher asks to rest. As sentry, or guarded by another node's, it makes one more full
//! pass, because jobs may have arrived before the post was taken, and sleeps if and only if that leaves nothing
//! behind, until a [`Wake`] or the tick. A sentry that takes all there is, and could take more, stays: then a job for
//! an idle cluster costs one claim of one node. It stands down when it has as much as it can take, so that another
//! node may stand sentry, or when jobs keep coming: while all nodes are awake, producers are silent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, ResponseFuture, WrapFuture};
use tokio::sync::oneshot;

use super::bell::Bell;
use super::lease::{Lease, draw};
use super::listener::Listener;
use super::messages::{Cause, Demand, Drain, Leave, Observe, Observed, Rest, Run, Standing, Wake};
use super::resting::{BUSY_POLL, Doing, Resting, SECOND_LOOK};
use super::worker_pool::WorkerPool;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::pacing;
use crate::record;
use crate::store::{Claim, Claimed, ClaimedRun, Mark, Store};

/// A sentry that was notified in vain so often leaves its post for a while.
const VAIN_LIMIT: u32 = 5;
/// A slice of a full pass moves at most so many rows of busy cursors out of the line.
const MAX_PARKED: usize = 1000;
/// After a failed claim.
const FAILURE_PAUSE: Duration = Duration::from_millis(200);

pub(crate) struct Dispatcher {
    pub(crate) queue: Arc<str>,
    pub(crate) kinds: Arc<[Arc<str>]>,
    pub(crate) store: Store,
    pub(crate) lease: Lease,
    pub(crate) pool: Addr<WorkerPool>,
    pub(crate) listener: Option<Addr<Listener>>,
    pub(crate) bell: Bell,
    pub(crate) metrics: Metrics,
    pub(crate) poll: Duration,
    pub(crate) run_length: usize,
    pub(crate) full_passes: bool,
    pub(crate) rest: Resting,
}

/// True if reading came as far as `marks` in every lane.
fn covers(read: &[Mark], marks: &[Mark]) -> bool {
    marks.iter().all(|mark| read.iter().any(|r| r.priority == mark.priority && r.pos >= mark.pos))
}

/// What a pass came to.
enum Pass {
    Claimed {
        claimed: Claimed,
        wanted: usize,
        full: bool,
    },
    /// The pool has enough; it will wake us.
    Full,
    /// There is no lease; its keeper will wake us.
    NoLease,
    Failed(Error),
}

impl Dispatcher {
    fn pass(&mut self, ctx: &mut Context<Self>) {
        if self.rest.doing != Doing::Nothing {
            self.rest.woken = true;
            return;
        }
        if let Some(timer) = self.rest.timer.take() {
            ctx.cancel_future(timer);
        }
        if self.rest.draining {
            return;
        }
        self.rest.doing = Doing::Passing;
        self.rest.woken = false;
        let now = Instant::now();
        let full = self.full_passes && self.rest.passes.is_due(now);
        let marks = if full { self.rest.passes.begin() } else { self.rest.marks.next(now) };
        let (queue, kinds, pool) = (Arc::clone(&self.queue), Arc::clone(&self.kinds), self.pool.clone());
        let (store, lease, run_length) = (self.store.clone(), self.lease.clone(), self.run_length);
        // While others wait in the line, no cursor gets more than its share.
        let longest_run = if self.rest.marks.at_end() { pacing::MAX_CLAIM } else { run_length };
        let pass = async move {
            let Some(lease_id) = lease.id() else { return Pass::NoLease };
            let Ok(wanted) = pool.send(Demand).await else { return Pass::Full };
            if wanted.jobs == 0 {
                return Pass::Full;
            }
            let token = draw();
            let claim = Claim {
                lease: lease_id,
                token,
                queue: &queue,
                kinds: &kinds,
                max_jobs: wanted.jobs,
                run_length: pacing::run_length(wanted.mean_run, run_length),
                longest_run: pacing::run_length(wanted.mean_run, longest_run),
                to_park: if full { MAX_PARKED } else { 0 },
                marks: &marks,
            };
            lease.opens(token);
            match store.claim(&claim).await {
                Ok(claimed) if lease.id() != Some(lease_id) => {
                    // The lease was lost meanwhile: nobody would tell these jobs to stop.
                    tracing::warn!(jobs = claimed.jobs(), "a claim came back after its lease was lost");
                    actix_rt::spawn(async move { drop(store.give_back(token).await) });
                    Pass::NoLease
                }
                Ok(claimed) => {
                    lease.opened(token, claimed.jobs());
                    if claimed.jobs() > 0 {
                        tracing::trace!(target: record::TARGET, event = "claimed", token, jobs = ?claimed.ids());
                    }
                    Pass::Claimed { claimed, wanted: wanted.jobs, full }
                }
                Err(error) => {
                    // Unknown to the node from now on: if the claim was made, the heartbeat gives it back.
                    lease.opened(token, 0);
                    if error.is_transient() {
                        actix_rt::spawn(async move { drop(store.give_back(token).await) });
                    }
                    Pass::Failed(error)
                }
            }
        };
        ctx.spawn(pass.into_actor(self).map(|pass, dispatcher, ctx| dispatcher.passed(pass, ctx)));
    }

    fn passed(&mut self, pass: Pass, ctx: &mut Context<Self>) {
        self.rest.doing = Doing::Nothing;
        let now = Instant::now();
        let again = match pass {
            Pass::Full | Pass::NoLease => {
                self.stand_down();
                self.rest.woken
            }
            Pass::Failed(error) => {
                tracing::warn!(%error, queue = &*self.queue, "claim failed");
                if error.is_lease_ended() {
                    self.lease.doubt();
                }
                self.rest.passes.hurry(now);
                self.sleep(FAILURE_PAUSE.mul_f64(0.5 + rand::random::<f64>()), ctx);
                false
            }
            Pass::Claimed { claimed, wanted, full } => {
                let found = claimed.jobs();
                // Without marks no lane was read: the claim took a suspect, or there is nothing to read.
                let ended = claimed.marks.is_empty() || covers(&claimed.marks, self.rest.marks.last());
                if full && (found == 0 || !claimed.marks.is_empty()) {
                    self.rest.passes.made(now, claimed.reading);
                    let clean = !claimed.contended && (found == 0 || claimed.at_end && found < wanted);
                    self.rest.seen_all = self.rest.passes.sliced(claimed.marks.clone(), ended, clean);
                    self.bell.wake_scheduler(Cause::Tick);
                }
                if !claimed.marks.is_empty() && (!full || ended) {
                    self.rest.marks.read(now, claimed.marks, claimed.at_end, claimed.reading);
                }
                if found > 0 {
                    self.start(claimed.runs, found);
                    let keep_coming = self.rest.found(now);
                    if found >= wanted || keep_coming {
                        self.stand_down();
                    }
                }
                if claimed.contended && found < wanted {
                    self.rest.passes.hurry(now);
                }
                let saw_all = full && self.rest.standing.is_some() && self.rest.seen_all;
                let more = found > 0 && !saw_all || self.rest.woken;
                if !more && claimed.contended {
                    self.poll_soon(ctx);
                } else if !more {
                    self.rest_if_allowed(ctx);
                }
                more
            }
        };
        if let Some(drained) = self.rest.drained.take() {
            let _ = drained.send(());
        } else if again {
            self.pass(ctx);
        }
    }

    /// Hand runs to the pool.
    fn start(&mut self, runs: Vec<ClaimedRun>, jobs: usize) {
        self.metrics.claimed.with_label_values(&[&*self.queue]).inc_by(jobs as u64);
        self.metrics.claim_size.with_label_values(&[&*self.queue]).observe(jobs as f64);
        let wait = self.metrics.wait.with_label_values(&[&*self.queue]);
        runs.iter().flat_map(|run| &run.jobs).for_each(|job| wait.observe(job.waited.as_secs_f64()));
        self.pool.do_send(Run(runs));
        self.rest.vain = 0;
        self.rest.notified = false;
        self.rest.busy_poll = BUSY_POLL.0;
        self.rest.second_look = SECOND_LOOK;
    }

    /// Stand for nothing any more. Returns whom to tell, if it was the sentry.
    fn retire(&mut self) -> Option<(&Addr<Listener>, Leave)> {
        let was_sentry = self.rest.standing.take() == Some(Standing::Sentry);
        self.listener.as_ref().filter(|_| was_sentry).map(|listener| (listener, Leave(Arc::clone(&self.queue))))
    }

    fn stand_down(&mut self) {
        if let Some((listener, leave)) = self.retire() {
            listener.do_send(leave);
        }
    }

    /// The line is empty, as far as this pass saw.
    fn rest_if_allowed(&mut self, ctx: &mut Context<Self>) {
        if std::mem::take(&mut self.rest.notified) {
            self.rest.vain += 1;
            if self.rest.vain >= VAIN_LIMIT {
                // Foreign kinds, or a paused queue: let producers be silent for a while.
                self.rest.vain = 0;
                self.stand_down();
                return self.sleep(BUSY_POLL.1, ctx);
            }
        }
        match (self.rest.standing, &self.listener) {
            (Some(_), _) if self.rest.seen_all || !self.full_passes => self.sleep(self.poll, ctx),
            (Some(_), _) => self.sleep(self.rest.passes.due_in(Instant::now()), ctx),
            (None, None) => self.sleep(self.poll, ctx),
            (None, Some(listener)) => {
                self.rest.doing = Doing::Asking;
                let asked = listener.send(Rest(Arc::clone(&self.queue)));
                ctx.spawn(asked.into_actor(self).map(|standing, dispatcher, ctx| {
                    dispatcher.asked(standing.unwrap_or(Standing::Deaf), ctx);
                }));
            }
        }
    }

    fn asked(&mut self, standing: Standing, ctx: &mut Context<Self>) {
        self.rest.doing = Doing::Nothing;
        if let Some(drained) = self.rest.drained.take() {
            self.rest.standing = Some(standing);
            self.stand_down();
            let _ = drained.send(());
            return;
        }
        match standing {
            // The answer may be older than what woke us: perhaps that sentry has left.
            Standing::Guarded if self.rest.woken => {}
            Standing::Sentry | Standing::Guarded => {
                self.rest.standing = Some(standing);
                self.rest.seen_all = false;
                self.rest.passes.disturb();
                self.rest.passes.hurry(Instant::now());
                self.pass(ctx);
            }
            Standing::Deaf => self.sleep(self.poll, ctx),
            Standing::Busy => self.poll_soon(ctx),
        }
        if self.rest.woken {
            self.pass(ctx);
        }
    }

    /// Somebody holds what is wanted, for a moment.
    fn poll_soon(&mut self, ctx: &mut Context<Self>) {
        let pause = self.rest.busy_poll;
        self.rest.busy_poll = (pause * 2).min(BUSY_POLL.1);
        self.sleep(pause, ctx);
    }

    fn sleep(&mut self, time: Duration, ctx: &mut Context<Self>) {
        if let Some(timer) = self.rest.timer.take() {
            ctx.cancel_future(timer);
        }
        self.rest.looking = false;
        self.rest.timer = Some(ctx.run_later(time, |dispatcher, ctx| {
            dispatcher.rest.timer = None;
            if dispatcher.rest.standing == Some(Standing::Guarded) {
                dispatcher.rest.standing = None; // the sentry may have died: ask again
            }
            dispatcher.metrics.wakeups.with_label_values(&[&*dispatcher.queue, Cause::Tick.as_str()]).inc();
            dispatcher.rest.passes.hurry(Instant::now());
            dispatcher.pass(ctx);
        }));
    }
}

impl Actor for Dispatcher {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.pass(ctx);
    }
}

impl Handler<Wake> for Dispatcher {
    type Result = ();

    fn handle(&mut self, Wake(cause): Wake, ctx: &mut Self::Context) {
        self.metrics.wakeups.with_label_values(&[&*self.queue, cause.as_str()]).inc();
        if cause == Cause::Notified && self.rest.standing != Some(Standing::Sentry) {
            // It is the sentry's: there was one, and if it leaves it says so later.
            match self.rest.standing {
                Some(_) if self.rest.doing == Doing::Nothing && !self.rest.looking => {
                    let pause = self.rest.second_look;
                    self.rest.second_look = (pause * 2).min(self.poll);
                    self.sleep(pause.mul_f64(0.5 + rand::random::<f64>()), ctx);
                    self.rest.looking = true;
                }
                None if self.rest.doing == Doing::Nothing => self.pass(ctx),
                _ => {}
            }
            return;
        }
        self.rest.seen_all = false;
        self.rest.passes.disturb();
        match cause {
            Cause::Notified => {
                self.rest.notified = true;
                self.rest.passes.hurry(Instant::now());
            }
            // The post is vacant: look, and then ask for it.
            Cause::Sentry | Cause::Recovered => {
                self.stand_down();
                self.rest.passes.hurry(Instant::now());
            }
            Cause::Settled | Cause::Due => self.rest.passes.hurry(Instant::now()),
            Cause::Tick | Cause::Slots => {}
        }
        self.pass(ctx);
    }
}

impl Handler<Drain> for Dispatcher {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.rest.draining = true;
        let left = self.retire().map(|(listener, leave)| listener.send(leave));
        let drained = (self.rest.doing != Doing::Nothing).then(|| {
            let (drained, wait) = oneshot::channel();
            self.rest.drained = Some(drained);
            wait
        });
        // The session is closed afterwards: whoever sleeps must have been told that nobody stands sentry.
        Box::pin(async move {
            if let Some(left) = left {
                let _ = left.await;
            }
            if let Some(drained) = drained {
                let _ = drained.await;
            }
        })
    }
}

impl Handler<Observe> for Dispatcher {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        let state = match (self.rest.doing, self.rest.standing) {
            (Doing::Passing | Doing::Asking, _) => "passing",
            (Doing::Nothing, Some(Standing::Sentry)) => "sentry",
            (Doing::Nothing, Some(Standing::Guarded)) => "guarded",
            (Doing::Nothing, _) => "polling",
        };
        Observed { state: state.into(), load: 0 }
    }
}

super::messages::stops!(Dispatcher);
