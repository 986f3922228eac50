//! The heartbeat that keeps the node's lease, and the watchdog that says when it is lost.

use std::time::Duration;

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture};

use super::bell::Bell;
use super::lease::{Lease, draw, since_boot};
use super::messages::{Cancel, Cause, EndLease, LeaseLost, Observe, Observed};
use super::worker_pool::WorkerPool;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::record;
use crate::store::{NodeInfo, Store};

/// A heartbeat that failed is sent again after this.
const AGAIN: Duration = Duration::from_millis(100);

/// Begins the node's lease and extends it three times per period. It counts the time from *sending*
/// the last heartbeat that was answered; when two thirds of the period have passed without one, it
/// declares the lease lost, so that work stops before the reaper acts. A lost lease is never taken up
/// again: the node begins a new one as soon as the database answers.
pub(crate) struct LeaseKeeper {
    store: Store,
    /// For heartbeats alone: they wait for nobody.
    own: Store,
    lease: Lease,
    node: NodeInfo,
    ttl: Duration,
    metrics: Metrics,
    bell: Bell,
    pools: Vec<Addr<WorkerPool>>,
    beating: bool,
    ending: bool,
}

/// What a heartbeat came to.
enum Beat {
    Begun(i64),
    Kept {
        id: i64,
        cancelled: Vec<i64>,
    },
    Ended,
    /// The lease was given up for lost before the answer came.
    Late,
}

impl LeaseKeeper {
    /// Begin the first lease; a node does not start without.
    pub(crate) async fn begin(
        store: Store,
        node: NodeInfo,
        ttl: Duration,
        metrics: Metrics,
        bell: Bell,
    ) -> Result<Self> {
        let asked = since_boot();
        let lease = Lease::default();
        let id = draw();
        let own = store.apart();
        own.begin_lease(id, &node, ttl).await?;
        tracing::trace!(target: record::TARGET, event = "lease_begun", lease = id);
        lease.confirmed(asked, ttl);
        lease.begun(id);
        Ok(LeaseKeeper {
            store,
            own,
            lease,
            node,
            ttl,
            metrics,
            bell,
            pools: Vec::new(),
            beating: false,
            ending: false,
        })
    }

    pub(crate) fn lease(&self) -> Lease {
        self.lease.clone()
    }

    /// Begin to keep it, for the jobs of these pools.
    pub(crate) fn keep(mut self, pools: Vec<Addr<WorkerPool>>) -> Addr<Self> {
        self.pools = pools;
        self.start()
    }

    fn beat(&mut self, ctx: &mut Context<Self>) {
        if self.beating || self.ending {
            return;
        }
        self.beating = true;
        let sent = since_boot();
        let (store, own) = (self.store.clone(), self.own.clone());
        let (lease, node, ttl) = (self.lease.clone(), self.node.clone(), self.ttl);
        let beat = async move {
            let Some(id) = lease.id() else {
                let id = draw();
                // Later than that the answer is of no use.
                let begin = tokio::time::timeout(ttl * 2 / 3, own.begin_lease(id, &node, ttl)).await;
                return begin.map_err(|_| Error::Deadline(ttl * 2 / 3))?.map(|()| Beat::Begun(id));
            };
            let extended = own.extend(id, ttl).await?;
            if lease.id() != Some(id) {
                return Ok(Beat::Late);
            }
            if !extended.alive {
                return Ok(Beat::Ended);
            }
            // Claims whose reply was lost: nobody here will ever run them.
            for token in lease.unknown(extended.open_claims) {
                let store = store.clone();
                actix_rt::spawn(async move {
                    match store.give_back(token).await {
                        Ok(0) => {} // settled while the heartbeat was on its way
                        moved => tracing::warn!(token, ?moved, "gave back a claim whose reply was lost"),
                    }
                });
            }
            Ok(Beat::Kept { id, cancelled: extended.cancelled })
        };
        ctx.spawn(beat.into_actor(self).map(move |beat, keeper, ctx| {
            keeper.beating = false;
            match beat {
                _ if keeper.ending => {}
                Ok(Beat::Begun(id)) => {
                    tracing::info!(lease = id, "began a new lease");
                    tracing::trace!(target: record::TARGET, event = "lease_begun", lease = id);
                    keeper.lease.confirmed(sent, keeper.ttl);
                    keeper.lease.begun(id);
                    keeper.bell.wake_all(Cause::Recovered);
                }
                Ok(Beat::Kept { id, cancelled }) => {
                    keeper.lease.confirmed(sent, keeper.ttl);
                    tracing::trace!(target: record::TARGET, event = "heartbeat", lease = id);
                    if !cancelled.is_empty() {
                        let cancel = Cancel(cancelled.into());
                        keeper.pools.iter().for_each(|pool| pool.do_send(cancel.clone()));
                    }
                }
                Ok(Beat::Late) => {}
                Ok(Beat::Ended) => keeper.lose("the reaper ended it"),
                Err(error) => {
                    tracing::warn!(%error, "heartbeat failed");
                    ctx.run_later(AGAIN, |keeper, ctx| keeper.beat(ctx));
                }
            }
        }));
    }

    fn watch(&mut self) {
        if self.lease.id().is_some() && self.lease.is_overdue() && !self.ending {
            self.lose("no heartbeat was answered for two thirds of its time");
        }
    }

    fn lose(&mut self, why: &str) {
        let lease = self.lease.lost();
        tracing::error!(lease, why, "lost the lease; running jobs are told to stop");
        tracing::trace!(target: record::TARGET, event = "lease_lost", lease);
        self.metrics.leases_lost.inc();
        self.pools.iter().for_each(|pool| pool.do_send(LeaseLost));
    }
}

impl Actor for LeaseKeeper {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(self.ttl / 3, |keeper, ctx| keeper.beat(ctx));
        ctx.run_interval(Duration::from_millis(250), |keeper, ctx| {
            keeper.watch();
            if keeper.lease.id().is_none() || keeper.lease.is_doubted() {
                keeper.beat(ctx);
            }
        });
    }
}

impl Handler<EndLease> for LeaseKeeper {
    type Result = ResponseActFuture<Self, bool>;

    fn handle(&mut self, _: EndLease, _: &mut Self::Context) -> Self::Result {
        self.ending = true; // no more heartbeats
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let end = async move {
            let Some(id) = lease.id() else { return true };
            match store.end_lease(id).await {
                Ok(_) => true,
                Err(error) => {
                    tracing::warn!(%error, "the lease could not be ended; it runs out by itself");
                    false
                }
            }
        };
        Box::pin(end.into_actor(self))
    }
}

impl Handler<Observe> for LeaseKeeper {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        let state = if self.lease.id().is_some() { "held" } else { "lost" };
        Observed { state: state.into(), load: self.lease.open_claims() }
    }
}

super::messages::stops!(LeaseKeeper);
