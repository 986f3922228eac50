//! The reaper: takes back what dead nodes held. Every node has one; any number may run at once.
//!
//! It makes a pass on each tick, unless a pass has failed within the last lease period: after an outage all
//! leases look expired, and their nodes need the time to say that they live. What ends a lease is decided in SQL
//! (`reap`), on the database's clock alone; after a restart of the server it waits as long.

use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, WrapFuture};

use super::bell::Bell;
use super::messages::{Cause, Observe, Observed};
use crate::metrics::Metrics;
use crate::store::Store;

pub(crate) struct Reaper {
    store: Store,
    ttl: Duration,
    metrics: Metrics,
    bell: Bell,
    not_before: Option<Instant>,
    passing: bool,
}

impl Reaper {
    pub(crate) fn new(store: Store, ttl: Duration, metrics: Metrics, bell: Bell) -> Self {
        Reaper { store, ttl, metrics, bell, not_before: None, passing: false }
    }

    fn pass(&mut self, ctx: &mut Context<Self>) {
        if self.passing || self.not_before.is_some_and(|moment| Instant::now() < moment) {
            return;
        }
        self.passing = true;
        let store = self.store.clone();
        let pass = async move { store.reap().await };
        ctx.spawn(pass.into_actor(self).map(|reaped, reaper, _| {
            reaper.passing = false;
            match reaped {
                Ok(reaped) => {
                    if reaped.ended > 0 || reaped.stuck > 0 {
                        tracing::warn!(
                            leases = reaped.ended,
                            jobs = reaped.moved,
                            stuck = reaped.stuck,
                            "took back jobs of dead nodes"
                        );
                    }
                    if reaped.moved > 0 {
                        reaper.metrics.reaped.inc_by(reaped.moved as u64);
                        reaper.bell.wake_all(Cause::Settled);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, wait = ?reaper.ttl, "reaping failed; the next pass waits a lease period");
                    reaper.not_before = Some(Instant::now() + reaper.ttl);
                }
            }
        }));
    }
}

impl Actor for Reaper {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval((self.ttl / 10).clamp(Duration::from_millis(250), Duration::from_secs(2)), |reaper, ctx| {
            reaper.pass(ctx)
        });
    }
}

impl Handler<Observe> for Reaper {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        let waits = self.not_before.is_some_and(|moment| Instant::now() < moment);
        Observed { state: if waits { "waiting" } else { "watching" }.into(), load: 0 }
    }
}

super::messages::stops!(Reaper);
