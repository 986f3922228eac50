//! The node's lease, as its actors see it, and the heartbeat that keeps it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture};

use super::bell::Bell;
use super::messages::{Cancel, Cause, LeaseLost, Observe, Observed};
use super::worker_pool::WorkerPool;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::store::Store;

/// The lease that claims are made for, and the claims that are open. Shared by the actors of a node.
#[derive(Clone, Default)]
pub(crate) struct Lease(Arc<Held>);

#[derive(Default)]
struct Held {
    /// 0: none.
    id: AtomicI64,
    /// Somebody was told that the lease has ended.
    doubted: AtomicBool,
    /// How many jobs of each claim are not settled yet.
    open: Mutex<HashMap<i64, usize>>,
}

/// A random number that was never used before: a lease, or a claim's token.
pub(crate) fn draw() -> i64 {
    loop {
        match rand::random() {
            0 => continue,
            token => return token,
        }
    }
}

impl Lease {
    /// The living lease.
    pub(crate) fn id(&self) -> Option<i64> {
        Some(self.0.id.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// The database refused the lease: the keeper finds out at once.
    pub(crate) fn doubt(&self) {
        self.0.doubted.store(true, Ordering::Release);
    }

    /// A claim is about to be made; until it is settled or failed, the heartbeat knows it.
    pub(crate) fn opens(&self, token: i64) {
        self.open().insert(token, usize::MAX);
    }

    /// A claim brought this many jobs.
    pub(crate) fn opened(&self, token: i64, jobs: usize) {
        match jobs {
            0 => self.open().remove(&token),
            _ => self.open().insert(token, jobs),
        };
    }

    /// A job of a claim is settled.
    pub(crate) fn settled(&self, token: i64) {
        let mut open = self.open();
        if let Some(jobs) = open.get_mut(&token) {
            *jobs -= 1;
            if *jobs == 0 {
                open.remove(&token);
            }
        }
    }

    fn unknown(&self, tokens: Vec<i64>) -> Vec<i64> {
        let open = self.open();
        tokens.into_iter().filter(|token| !open.contains_key(token)).collect()
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<i64, usize>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time since boot, counting time in suspend, which [`std::time::Instant`] does not on Linux.
fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Begins the node's lease and extends it three times per period. It counts the time from *sending*
/// the last heartbeat that was answered; when two thirds of the period have passed without one, it
/// declares the lease lost, so that work stops before the reaper acts. A lost lease is never taken up
/// again: the node begins a new one as soon as the database answers.
pub(crate) struct LeaseKeeper {
    store: Store,
    lease: Lease,
    node: String,
    ttl: Duration,
    metrics: Metrics,
    bell: Bell,
    pools: Vec<Addr<WorkerPool>>,
    /// When the last heartbeat that was answered was sent, since boot.
    confirmed: Duration,
    beating: bool,
}

/// What a heartbeat came to.
enum Beat {
    Begun(i64),
    Kept { cancelled: Vec<i64> },
    Ended,
}

impl LeaseKeeper {
    /// Begin the first lease; a node does not start without.
    pub(crate) async fn begin(store: Store, node: String, ttl: Duration, metrics: Metrics, bell: Bell) -> Result<Self> {
        let confirmed = since_boot();
        let lease = Lease::default();
        let id = draw();
        store.begin_lease(id, &node, ttl).await?;
        lease.0.id.store(id, Ordering::Release);
        Ok(LeaseKeeper { store, lease, node, ttl, metrics, bell, pools: Vec::new(), confirmed, beating: false })
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
        if self.beating {
            return;
        }
        self.beating = true;
        let sent = since_boot();
        let (store, lease, node, ttl) = (self.store.clone(), self.lease.clone(), self.node.clone(), self.ttl);
        let beat = async move {
            let Some(id) = lease.id() else {
                let id = draw();
                return store.begin_lease(id, &node, ttl).await.map(|()| Beat::Begun(id));
            };
            let extended = store.extend(id, ttl).await?;
            if !extended.alive {
                return Ok(Beat::Ended);
            }
            // A claim whose reply was lost: nobody here will ever run it.
            for token in lease.unknown(extended.open_claims) {
                let moved = store.give_back(token).await?;
                tracing::warn!(token, moved, "gave back a claim whose reply was lost");
            }
            Ok(Beat::Kept { cancelled: extended.cancelled })
        };
        ctx.spawn(beat.into_actor(self).map(move |beat, keeper, _| {
            keeper.beating = false;
            match beat {
                Ok(Beat::Begun(id)) => {
                    tracing::info!(lease = id, "began a new lease");
                    keeper.confirmed = sent;
                    keeper.lease.0.id.store(id, Ordering::Release);
                    keeper.bell.wake_all(Cause::Recovered);
                }
                Ok(Beat::Kept { cancelled }) => {
                    keeper.confirmed = sent;
                    if !cancelled.is_empty() {
                        let cancel = Cancel(cancelled.into());
                        keeper.pools.iter().for_each(|pool| pool.do_send(cancel.clone()));
                    }
                }
                Ok(Beat::Ended) => keeper.lose("the reaper ended it"),
                Err(error) => tracing::warn!(%error, "heartbeat failed"),
            }
        }));
    }

    fn watch(&mut self) {
        if self.lease.id().is_some() && since_boot() - self.confirmed > self.ttl * 2 / 3 {
            self.lose("no heartbeat was answered for two thirds of its time");
        }
    }

    fn lose(&mut self, why: &str) {
        let lease = self.lease.0.id.swap(0, Ordering::AcqRel);
        tracing::error!(lease, why, "lost the lease; running jobs are told to stop");
        self.lease.open().clear();
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
            if keeper.lease.id().is_none() || keeper.lease.0.doubted.swap(false, Ordering::AcqRel) {
                keeper.beat(ctx);
            }
        });
    }
}

/// To the LeaseKeeper, last: end the lease. Answers whether the database confirmed it.
#[derive(actix::Message)]
#[rtype(result = "bool")]
pub(crate) struct EndLease;

impl Handler<EndLease> for LeaseKeeper {
    type Result = ResponseActFuture<Self, bool>;

    fn handle(&mut self, _: EndLease, _: &mut Self::Context) -> Self::Result {
        self.beating = true; // no more heartbeats
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
        Observed { state: state.into(), load: self.lease.open().len() }
    }
}
