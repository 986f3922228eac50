//! The scheduler: moves due jobs into the line when their time comes, moves the horizon that lets cursors
//! skip what was settled, and tends the history. Every node has one; duties are leaderless, and two nodes
//! doing one at once do no harm.
//!
//! A pass promotes what is due and learns when the next job will be. It is made when that moment
//! comes, on every hint that something was scheduled, and at least each second.

use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, SpawnHandle, WrapFuture};

use super::bell::Bell;
use super::messages::{Cause, Observe, Observed, Wake};
use crate::store::{Horizon, Store};

/// At most so many jobs are promoted in one call.
const BATCH: i32 = 1000;
/// A pass is made at least this often.
const TICK: Duration = Duration::from_secs(1);
/// After this time a pass is worth while for who only thinks that something may have been scheduled: those who enqueue
/// while nodes are awake tell nobody.
const FRESH: Duration = Duration::from_millis(250);
/// How often the horizon is moved.
const HORIZON_EVERY: Duration = Duration::from_millis(500);
/// Between two passes lies this multiple of the last one's duration, up to a tick: what took long may have been
/// an outage.
const SHARE: u32 = 4;
/// How often the history is tended.
const TEND_EVERY: Duration = Duration::from_secs(60);

pub(crate) struct Scheduler {
    pub(crate) store: Store,
    pub(crate) history_days: i32,
    pub(crate) bell: Bell,
    pub(crate) rest: Rest,
}

pub(crate) struct Rest {
    passing: bool,
    woken: bool,
    began: Instant,
    not_before: Instant,
    timer: Option<SpawnHandle>,
    days_ahead: Option<i32>,
    horizon: Horizon,
    moving_horizon: bool,
}

impl Default for Rest {
    fn default() -> Self {
        Rest {
            passing: false,
            woken: false,
            began: Instant::now(),
            not_before: Instant::now(),
            timer: None,
            days_ahead: None,
            horizon: Horizon::default(),
            moving_horizon: false,
        }
    }
}

impl Scheduler {
    fn pass(&mut self, ctx: &mut Context<Self>) {
        let early = self.rest.not_before.saturating_duration_since(Instant::now());
        if self.rest.passing {
            self.rest.woken = true;
        } else if early > Duration::ZERO {
            self.pass_in(early, ctx);
        } else {
            self.rest.passing = true;
            self.rest.woken = false;
            let store = self.store.clone();
            self.rest.began = Instant::now();
            let pass = async move { store.promote(BATCH).await };
            ctx.spawn(pass.into_actor(self).map(|promoted, scheduler, ctx| {
                scheduler.rest.passing = false;
                let took = scheduler.rest.began.elapsed();
                scheduler.rest.not_before = Instant::now() + (took * SHARE).min(TICK);
                let next = match promoted {
                    Ok((promoted, due_in)) => {
                        if promoted > 0 {
                            scheduler.bell.wake_all(Cause::Due);
                        }
                        due_in.unwrap_or(TICK).min(TICK)
                    }
                    Err(error) => {
                        tracing::warn!(%error, "due jobs cannot be promoted");
                        TICK
                    }
                };
                scheduler.pass_in(if scheduler.rest.woken { Duration::ZERO } else { next }, ctx);
            }));
        }
    }

    fn pass_in(&mut self, time: Duration, ctx: &mut Context<Self>) {
        if let Some(timer) = self.rest.timer.take() {
            ctx.cancel_future(timer);
        }
        self.rest.timer = Some(ctx.run_later(time, |scheduler, ctx| {
            scheduler.rest.timer = None;
            scheduler.pass(ctx);
        }));
    }

    fn move_horizon(&mut self, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.rest.moving_horizon, true) {
            return; // the database is silent
        }
        let (store, last) = (self.store.clone(), self.rest.horizon.clone());
        let see = async move { store.move_horizon(&last).await };
        ctx.spawn(see.into_actor(self).map(|seen, scheduler, _| {
            scheduler.rest.moving_horizon = false;
            match seen {
                Ok(seen) => scheduler.rest.horizon = seen,
                Err(error) => tracing::warn!(%error, "the horizon cannot be moved"),
            }
        }));
    }

    fn tend(&mut self, ctx: &mut Context<Self>) {
        let (store, days) = (self.store.clone(), self.history_days);
        let tend = async move { store.tend_history(days).await };
        ctx.spawn(tend.into_actor(self).map(|ahead, scheduler, _| match ahead {
            Ok(ahead) => scheduler.rest.days_ahead = ahead.or(scheduler.rest.days_ahead),
            Err(error) => tracing::warn!(%error, "the history cannot be tended"),
        }));
    }
}

impl Actor for Scheduler {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.pass(ctx);
        self.tend(ctx);
        ctx.run_interval(HORIZON_EVERY, |scheduler, ctx| scheduler.move_horizon(ctx));
        ctx.run_interval(TEND_EVERY, |scheduler, ctx| scheduler.tend(ctx));
    }
}

impl Handler<Wake> for Scheduler {
    type Result = ();

    fn handle(&mut self, Wake(cause): Wake, ctx: &mut Self::Context) {
        if cause != Cause::Tick || self.rest.began.elapsed() > FRESH {
            self.pass(ctx);
        }
    }
}

impl Handler<Observe> for Scheduler {
    type Result = Observed;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Observed {
        // load: whole days of history partitions ahead.
        let load = self.rest.days_ahead.unwrap_or(0).max(0) as usize;
        Observed { state: if self.rest.passing { "passing" } else { "waiting" }.into(), load }
    }
}

super::messages::stops!(Scheduler);
