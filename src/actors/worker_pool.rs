//! The pool of one queue: threads, slots and the backlog of claimed jobs. It answers how many jobs
//! could start soon, and gives up slots whose thread a handler has blocked.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorFutureExt, Arbiter, AsyncContext, Context, Handler, ResponseActFuture, ResponseFuture, WrapFuture,
};

use super::backlog::Backlog;
use super::messages::{Cancel, Demand, DrainPool, LeaseLost, Observe, Observed, Run, Wanted};
use super::sticky::{Parting, Sticky};
use super::worker::{Attempt, Current, Progress, Shared, Tools, Worker};
use crate::config::QueueConfig;
use crate::lifecycle::End;
use crate::pacing;
use crate::store::{ClaimedJob, ClaimedRun};

/// How often the pool looks for slots that are stuck.
const PATROL: Duration = Duration::from_millis(250);
/// A slot that is this long past its attempt's timeout has a blocked thread.
const FREEZE_GRACE: Duration = Duration::from_secs(1);
/// What a run is supposed to take before any was seen.
const FIRST_MEAN: Duration = Duration::from_millis(100);

/// See the module.
pub(crate) struct WorkerPool {
    queue: Arc<str>,
    config: QueueConfig,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
}

/// A slot and the thread it is on.
struct Slot {
    current: Arc<Current>,
    _thread: Rc<Thread>,
}

/// Ends when the last slot leaves it; a blocked one as soon as its handler lets go of it.
struct Thread(Arbiter);

impl Drop for Thread {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl WorkerPool {
    pub(crate) fn new(queue: Arc<str>, config: QueueConfig, tools: Tools, sticky_idle: Duration) -> Self {
        let shared = Arc::new(Shared {
            queue: Arc::clone(&queue),
            tools,
            sticky: Arc::new(Sticky::new(sticky_idle)),
            backlog: Backlog::default(),
            busy: AtomicUsize::new(0),
            mean_run: AtomicU64::new(FIRST_MEAN.as_nanos() as u64),
            hungry_below: AtomicUsize::new(usize::MAX),
        });
        WorkerPool { queue, config, shared, slots: Vec::new() }
    }

    fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Build a slot on a thread.
    fn open(&self, thread: Rc<Thread>) -> Slot {
        let current = Arc::new(Current::default());
        let worker = Worker { shared: self.shared(), current: Arc::clone(&current) };
        Worker::start_in_arbiter(&thread.0.handle(), |_| worker);
        Slot { current, _thread: thread }
    }

    /// Give up the slots that are blocked: settle their attempt, and build them anew on new threads.
    fn patrol(&mut self) {
        let frozen = |a: &Attempt| a.started.elapsed() > a.limit + FREEZE_GRACE;
        for slot in 0..self.slots.len() {
            let Some(attempt) = self.slots[slot].current.take_if(frozen) else { continue };
            tracing::error!(
                queue = &*self.queue,
                job = attempt.job.meta.id,
                "a handler blocks its thread; the slot is rebuilt"
            );
            attempt.job.meta.cancelled.cancel();
            let limit = attempt.limit;
            self.shared.tools.endings.add([attempt.end(End::Froze(limit), &self.shared.tools.handlers)]);
            self.shared.busy.fetch_sub(1, Ordering::AcqRel);
            self.shared.tools.metrics.rebuilt.with_label_values(&[&*self.queue, "freeze"]).inc();
            self.slots[slot] = self.open(Rc::new(Thread(Arbiter::new())));
            self.shared.ask_if_hungry();
        }
        self.shared.sticky.sweep();
        self.shared.backlog.nudge();
        self.shared.ask_if_hungry();
        let busy = self.shared.busy.load(Ordering::Acquire);
        self.shared.tools.metrics.slots.with_label_values(&[&*self.queue, "busy"]).set(busy as i64);
        self.shared
            .tools
            .metrics
            .slots
            .with_label_values(&[&*self.queue, "free"])
            .set(self.config.slots.saturating_sub(busy) as i64);
    }

    fn give_back(&self, runs: impl IntoIterator<Item = ClaimedRun>) {
        let handlers = &self.shared.tools.handlers;
        self.shared.tools.endings.add(runs.into_iter().map(|run| Progress::begin(run, &self.queue).finish(handlers)));
    }
}

impl Actor for WorkerPool {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let threads: Vec<_> =
            (0..self.config.threads.min(self.config.slots)).map(|_| Rc::new(Thread(Arbiter::new()))).collect();
        self.slots = (0..self.config.slots).map(|slot| self.open(Rc::clone(&threads[slot % threads.len()]))).collect();
        ctx.run_interval(PATROL, |pool, _| pool.patrol());
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.shared.backlog.close();
    }
}

impl Handler<Demand> for WorkerPool {
    type Result = Wanted;

    fn handle(&mut self, _: Demand, _: &mut Self::Context) -> Wanted {
        let shared = &self.shared;
        let mean_run = Duration::from_nanos(shared.mean_run.load(Ordering::Relaxed));
        let waiting = shared.backlog.jobs();
        let demand = |waiting| {
            let (busy, unsettled) = (shared.busy.load(Ordering::Acquire), shared.tools.endings.outbox.unsettled());
            pacing::demand(self.config.slots, busy, waiting, unsettled, mean_run)
        };
        let jobs = demand(waiting);
        if jobs == 0 {
            // Promise a wake-up first, then look again: a slot may have come free in between.
            shared.hungry_below.store(waiting / 2, Ordering::Release);
            return Wanted { jobs: demand(shared.backlog.jobs()), mean_run };
        }
        shared.hungry_below.store(usize::MAX, Ordering::Release);
        Wanted { jobs, mean_run }
    }
}

impl Handler<Run> for WorkerPool {
    type Result = ();

    fn handle(&mut self, Run(runs): Run, _: &mut Self::Context) {
        if let Err(runs) = self.shared.backlog.add(runs) {
            self.give_back(runs);
        }
    }
}

impl Handler<Cancel> for WorkerPool {
    type Result = ();

    fn handle(&mut self, Cancel(ids): Cancel, _: &mut Self::Context) {
        let concerned = |job: &ClaimedJob| ids.contains(&job.meta.id);
        self.shared.backlog.cancel_if(concerned);
        self.slots.iter().for_each(|slot| slot.current.cancel_if(concerned));
    }
}

impl Handler<LeaseLost> for WorkerPool {
    type Result = ();

    fn handle(&mut self, _: LeaseLost, _: &mut Self::Context) {
        // Whatever has not started goes back, if it is still ours; of a run that has, with the run.
        self.give_back(self.shared.backlog.empty());
        self.slots.iter().for_each(|slot| slot.current.cancel_if(|_| true));
        self.shared.sticky.part_with_all(Parting::LeaseLost);
    }
}

impl Handler<DrainPool> for WorkerPool {
    type Result = ResponseActFuture<Self, usize>;

    fn handle(&mut self, DrainPool { grace }: DrainPool, _: &mut Self::Context) -> Self::Result {
        self.shared.backlog.close();
        self.give_back(self.shared.backlog.empty());
        let shared = self.shared();
        let deadline = Instant::now() + grace;
        let wait: ResponseFuture<()> = Box::pin(async move {
            while shared.busy.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
                actix_rt::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Box::pin(wait.into_actor(self).map(|(), pool, _| {
            let mut given_back = 0;
            for slot in &pool.slots {
                if let Some(attempt) = slot.current.take_if(|_| true) {
                    attempt.job.meta.cancelled.cancel();
                    tracing::warn!(job = attempt.job.meta.id, "the grace period is over; the job is given back");
                    pool.shared.tools.endings.add([attempt.end(End::Released, &pool.shared.tools.handlers)]);
                    given_back += 1;
                }
            }
            pool.shared.sticky.part_with_all(Parting::Drained);
            given_back
        }))
    }
}

impl Handler<Observe> for WorkerPool {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        let load = self.shared.busy.load(Ordering::Acquire);
        let state = if self.shared.backlog.is_closed() { "drained" } else { "open" };
        Observed { state: state.into(), load }
    }
}

super::messages::stops!(WorkerPool);
