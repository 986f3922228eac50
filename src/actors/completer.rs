//! Settles what ended, in batches: while one settle is on its way, the next batch gathers.

use std::collections::HashMap;
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
use super::messages::{Cause, Collect, EndedAttempt, Flush, Observe, Observed};
use crate::error::{Result, shorten};
use crate::lifecycle::{Settled, Verdict};
use crate::metrics::Metrics;
use crate::store::{Settlement, Store};

/// At most so many attempts are settled in one call.
const MAX_SETTLE: usize = 1000;

pub(crate) struct Completer {
    store: Store,
    lease: Lease,
    metrics: Metrics,
    kinds: HashMap<(Arc<str>, Arc<str>), KindMetrics>,
    /// No result, error or snapshot is kept that is larger, in bytes.
    max_result: usize,
    pending: Vec<Settlement>,
    settling: usize,
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
    pub(crate) fn new(
        store: Store,
        lease: Lease,
        metrics: Metrics,
        bell: Bell,
        outbox: Arc<Outbox>,
        max_result: usize,
    ) -> Self {
        Completer {
            store,
            lease,
            metrics,
            bell,
            outbox,
            max_result,
            kinds: HashMap::new(),
            pending: Vec::new(),
            settling: 0,
            flushed: Vec::new(),
        }
    }

    fn measure(&mut self, ended: &EndedAttempt) {
        let (queue, kind, metrics) = (&ended.queue, &ended.kind, &self.metrics);
        let kind_metrics = self.kinds.entry((Arc::clone(queue), Arc::clone(kind))).or_insert_with(|| KindMetrics {
            run: metrics.run.with_label_values(&[&**queue, &**kind]),
            outcomes: Settled::ALL
                .map(|outcome| metrics.finished.with_label_values(&[&**queue, &**kind, outcome.as_str()])),
        });
        if let Some(ran) = ended.ran {
            kind_metrics.run.observe(ran.as_secs_f64());
        }
        kind_metrics.outcomes[ended.settlement.verdict.outcome as usize].inc();
    }

    /// Keep what is written within bounds, and free of what the database cannot hold.
    fn bound(&self, settlement: &mut Settlement) {
        let max = self.max_result;
        let verdict = &mut settlement.verdict;
        if let Some(size) = verdict.result.as_ref().map(String::len).filter(|size| *size > max) {
            verdict.result = None;
            verdict.error =
                Some(format!("the result of {size} bytes was dropped: the limit is {max} bytes (max_result)"));
        }
        if let Some(error) = &mut verdict.error {
            *error = shorten(&error.replace('\0', "\u{fffd}"), max);
        }
        if settlement.snapshot.as_ref().is_some_and(|snapshot| snapshot.len() > max) {
            settlement.snapshot = None;
        }
    }

    fn settle(&mut self, ctx: &mut Context<Self>) {
        if self.settling > 0 {
            return;
        }
        if self.pending.is_empty() {
            for done in self.flushed.drain(..) {
                let _ = done.send(());
            }
            return;
        }
        let rest = self.pending.split_off(cut(&self.pending, MAX_SETTLE));
        let batch = std::mem::replace(&mut self.pending, rest);
        self.settling = batch.len();
        self.metrics.settle_size.with_label_values::<&str>(&[]).observe(batch.len() as f64);
        // What runs again, or lets a cursor go, leaves work behind for somebody.
        let leaves_work = batch.iter().any(|s| !s.verdict.outcome.is_final() || s.in_cursor);
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let settle = async move { settle_all(&store, batch, &lease).await };
        ctx.spawn(settle.into_actor(self).map(move |refused, completer, ctx| {
            completer.settling = 0;
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
fn settle_all<'a>(store: &'a Store, mut batch: Vec<Settlement>, lease: &'a Lease) -> LocalBoxFuture<'a, usize> {
    async move {
        let mut pause = Duration::from_millis(20);
        let error = loop {
            match attempt(store, &batch).await {
                Ok(refused) => {
                    batch.iter().for_each(|settlement| lease.settled(settlement.token));
                    return refused;
                }
                Err(error) if error.is_transient() => {
                    tracing::warn!(%error, jobs = batch.len(), "settle failed; it is tried again");
                    tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>())).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
                Err(error) => break error,
            }
        };
        let half = cut(&batch, batch.len() / 2);
        if half < batch.len() {
            let second = batch.split_off(half);
            return settle_all(store, batch, lease).await + settle_all(store, second, lease).await;
        }
        tracing::error!(%error, job = batch[0].id, jobs = batch.len(), "the database refuses what these jobs left");
        let why = format!("what it left cannot be stored: {error}");
        let verdict = Verdict { outcome: Settled::Failed, error: Some(why), ..Default::default() };
        if batch[0].verdict == verdict {
            return batch.len(); // not even that: the lease will run out
        }
        for settlement in &mut batch {
            settlement.verdict = verdict.clone();
            settlement.snapshot = None;
        }
        settle_all(store, batch, lease).await
    }
    .boxed_local()
}

/// Where to cut a batch, at `wanted` or as soon after it as cuts through no run: a settle lets a cursor
/// go, so it must have all of the run.
fn cut(batch: &[Settlement], wanted: usize) -> usize {
    let of_one_run = |i: usize| {
        let (a, b) = (&batch[i - 1], &batch[i]);
        a.in_cursor && b.in_cursor && a.token == b.token
    };
    (wanted.max(1)..batch.len()).find(|i| !of_one_run(*i)).unwrap_or(batch.len())
}

async fn attempt(store: &Store, batch: &[Settlement]) -> Result<usize> {
    let refused = store.settle(batch).await?;
    if !refused.is_empty() {
        tracing::warn!(jobs = ?&refused[..refused.len().min(10)], count = refused.len(), "settle refused: the lease was lost");
    }
    Ok(refused.len())
}

impl Actor for Completer {
    type Context = Context<Self>;
}

impl Handler<Collect> for Completer {
    type Result = ();

    fn handle(&mut self, _: Collect, ctx: &mut Self::Context) {
        for mut attempt in self.outbox.collect() {
            self.measure(&attempt);
            self.bound(&mut attempt.settlement);
            self.pending.push(attempt.settlement);
        }
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
        let load = self.pending.len() + self.settling;
        Observed { state: if load == 0 { "idle" } else { "settling" }.into(), load }
    }
}

super::messages::stops!(Completer);

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(tokens: &[(i64, bool)]) -> Vec<Settlement> {
        let settlement = |&(token, in_cursor): &(i64, bool)| Settlement {
            id: 0,
            token,
            tid: Default::default(),
            verdict: Verdict::default(),
            started: std::time::Instant::now(),
            in_cursor,
            snapshot: None,
        };
        tokens.iter().map(settlement).collect()
    }

    #[test]
    fn batches_are_cut_through_no_run() {
        let plain = batch(&[(1, false); 5]);
        assert_eq!((cut(&plain, 2), cut(&plain, 9), cut(&plain[..1], 0)), (2, 5, 1));
        let runs = batch(&[(1, true), (1, true), (1, true), (2, true), (2, true)]);
        assert_eq!((cut(&runs, 1), cut(&runs, 3), cut(&runs, 4)), (3, 3, 5));
    }
}
