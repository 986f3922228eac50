//! Settles what ended, in batches: while one settle is on its way, the next batch gathers.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, ResponseFuture, WrapFuture};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use prometheus::{Histogram, IntCounter};
use tokio::sync::oneshot;

use super::backlog::Outbox;
use super::bell::Bell;
use super::lease::Lease;
use super::messages::{Cause, Collect, Flush, Observe, Observed};
use crate::cursor::Fold;
use crate::error::Result;
use crate::lifecycle::{Settled, Verdict};
use crate::metrics::Metrics;
use crate::record;
use crate::store::{EndedRun, Store};

/// About so many attempts are settled in one call.
const MAX_SETTLE: usize = 1000;
/// A call takes no further run when it carries so many bytes: the database reads no message of a gigabyte.
const MAX_SETTLE_BYTES: usize = 16 << 20;

pub(crate) struct Completer {
    store: Store,
    lease: Lease,
    metrics: Metrics,
    kinds: HashMap<(Arc<str>, Arc<str>), KindMetrics>,
    pending: VecDeque<EndedRun>,
    settling: bool,
    flushed: Vec<oneshot::Sender<()>>,
    bell: Bell,
    outbox: Arc<Outbox>,
}

/// The metrics of one kind, looked up once.
struct KindMetrics {
    run: Histogram,
    outcomes: [IntCounter; Settled::ALL.len()],
}

impl Completer {
    pub(crate) fn new(store: Store, lease: Lease, metrics: Metrics, bell: Bell, outbox: Arc<Outbox>) -> Self {
        Completer {
            store,
            lease,
            metrics,
            bell,
            outbox,
            kinds: HashMap::new(),
            pending: VecDeque::new(),
            settling: false,
            flushed: Vec::new(),
        }
    }

    fn measure(&mut self, run: &EndedRun) {
        for job in &run.jobs {
            let (queue, kind, metrics) = (&run.queue, &job.kind, &self.metrics);
            let kind_metrics = self.kinds.entry((Arc::clone(queue), Arc::clone(kind))).or_insert_with(|| KindMetrics {
                run: metrics.run.with_label_values(&[&**queue, &**kind]),
                outcomes: Settled::ALL
                    .map(|outcome| metrics.finished.with_label_values(&[&**queue, &**kind, outcome.as_str()])),
            });
            if let Some(ran) = job.ran {
                kind_metrics.run.observe(ran.as_secs_f64());
            }
            kind_metrics.outcomes[job.verdict.outcome as usize].inc();
        }
    }

    fn settle(&mut self, ctx: &mut Context<Self>) {
        if self.settling {
            return;
        }
        if self.pending.is_empty() {
            for done in self.flushed.drain(..) {
                let _ = done.send(());
            }
            return;
        }
        let batch: Vec<EndedRun> = self.pending.drain(..cut(&self.pending)).collect();
        let size = jobs(&batch);
        self.settling = true;
        self.metrics.settle_size.with_label_values::<&str>(&[]).observe(size as f64);
        // What runs again, or lets a cursor go, leaves work behind for somebody.
        let leaves_work =
            batch.iter().any(|run| run.cursor.is_some() || run.jobs.iter().any(|job| !job.verdict.outcome.is_final()));
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let settle = async move { settle_all(&store, batch, &lease).await };
        ctx.spawn(settle.into_actor(self).map(move |refused, completer, ctx| {
            completer.settling = false;
            if completer.outbox.settled(size) {
                completer.bell.wake_all(Cause::Slots);
            }
            completer.metrics.settles_refused.inc_by(refused as u64);
            if leaves_work {
                completer.bell.wake_all(Cause::Settled);
                completer.bell.wake_scheduler(Cause::Settled);
            }
            completer.settle(ctx);
        }));
    }
}

/// Settle a batch, whatever it takes: outages are waited for (the lease bounds how long that makes
/// sense; afterwards the answer is a refusal). What the database cannot take is found by halving, and
/// fails with the reason. Returns how many were refused.
fn settle_all<'a>(store: &'a Store, mut batch: Vec<EndedRun>, lease: &'a Lease) -> LocalBoxFuture<'a, usize> {
    async move {
        let mut pause = Duration::from_millis(20);
        let error = loop {
            match attempt(store, &batch).await {
                Ok(refused) => {
                    batch.iter().flat_map(|run| &run.jobs).for_each(|job| lease.settled(job.token));
                    return refused;
                }
                Err(error) if error.is_transient() || !error.is_of_data() => {
                    tracing::warn!(%error, jobs = jobs(&batch), "settle failed; it is tried again");
                    tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>())).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
                Err(error) => break error,
            }
        };
        if batch.len() > 1 {
            let second = batch.split_off(batch.len() / 2);
            return settle_all(store, batch, lease).await + settle_all(store, second, lease).await;
        }
        tracing::error!(%error, job = batch[0].jobs[0].id, jobs = jobs(&batch), "the database refuses what these jobs left");
        let why = format!("what it left cannot be stored: {error}");
        let verdict = Verdict { outcome: Settled::Failed, error: Some(why), ..Default::default() };
        if batch[0].jobs.iter().filter(|job| job.verdict.outcome.is_final()).all(|job| job.verdict == verdict) {
            // Not even that: the heartbeat gives back what the node no longer knows of.
            batch.iter().flat_map(|run| &run.jobs).for_each(|job| lease.settled(job.token));
            return jobs(&batch);
        }
        for run in &mut batch {
            // Not whole: what its actor remembers is not what is stored.
            run.cursor = run.cursor.take().map(|fold| Fold { whole: false, hold: fold.hold, ..Fold::new(fold.cursor) });
            for job in run.jobs.iter_mut().filter(|job| job.verdict.outcome.is_final()) {
                job.verdict = verdict.clone();
                (job.snapshot, job.version) = (None, None);
            }
        }
        settle_all(store, batch, lease).await
    }
    .boxed_local()
}

fn jobs(batch: &[EndedRun]) -> usize {
    batch.iter().map(|run| run.jobs.len()).sum()
}

/// How many of the runs that wait to settle in one call.
fn cut(pending: &VecDeque<EndedRun>) -> usize {
    let (mut jobs, mut bytes) = (0, 0);
    let fits = |run: &&EndedRun| {
        let fits = jobs < MAX_SETTLE && bytes < MAX_SETTLE_BYTES;
        jobs += run.jobs.len();
        bytes += run.bytes();
        fits
    };
    pending.iter().take_while(fits).count()
}

async fn attempt(store: &Store, batch: &[EndedRun]) -> Result<usize> {
    let settled = store.settle(batch).await;
    // Only who records, or is refused, pays for these.
    let all = || batch.iter().flat_map(|run| &run.jobs);
    let ids = || all().map(|job| job.id).collect::<Vec<_>>();
    let Ok(refused) = &settled else {
        tracing::trace!(target: record::TARGET, event = "settle_unknown", jobs = ?ids());
        return settled.map(|refused| refused.len());
    };
    tracing::trace!(
        target: record::TARGET,
        event = "settled",
        jobs = ?ids(),
        tokens = ?all().map(|job| job.token).collect::<Vec<_>>(),
        outcomes = ?all().map(|job| job.verdict.outcome.as_str()).collect::<Vec<_>>(),
        ?refused,
    );
    if !refused.is_empty() {
        let ids = ids();
        let jobs: Vec<i64> = refused.iter().take(10).map(|place| ids[*place]).collect();
        tracing::warn!(?jobs, count = refused.len(), "settle refused: the lease was lost");
    }
    Ok(refused.len())
}

impl Actor for Completer {
    type Context = Context<Self>;
}

impl Handler<Collect> for Completer {
    type Result = ();

    fn handle(&mut self, _: Collect, ctx: &mut Self::Context) {
        let ended = self.outbox.collect();
        ended.iter().for_each(|run| self.measure(run));
        self.pending.extend(ended);
        self.settle(ctx);
    }
}

impl Handler<Flush> for Completer {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Flush, ctx: &mut Self::Context) -> Self::Result {
        let (done, flushed) = oneshot::channel();
        self.flushed.push(done);
        self.settle(ctx);
        Box::pin(async move { drop(flushed.await) })
    }
}

impl Handler<Observe> for Completer {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        let load = self.outbox.unsettled();
        Observed { state: if load == 0 { "idle" } else { "settling" }.into(), load }
    }
}

super::messages::stops!(Completer);
