//! A node: the only place where actors are built, wired and drained.
//!
//! ```text
//!   Listener ──wake──▶ Dispatcher (one a queue) ──demand, run──▶ WorkerPool ──▶ workers
//!   Scheduler ─wake──▶     │ claim                                                │ ended
//!   LeaseKeeper, Reaper    ▼                                                      ▼
//!                       the store ◀──────────────── settle ────────────────── Completer
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr, Handler};

use crate::actors::backlog::{Endings, Outbox};
use crate::actors::bell::Bell;
use crate::actors::completer::Completer;
use crate::actors::dispatcher::Dispatcher;
use crate::actors::keeper::LeaseKeeper;
use crate::actors::listener::Listener;
use crate::actors::messages::{Drain, DrainPool, EndLease, Flush, Observe, Observed, Stop};
use crate::actors::reaper::Reaper;
use crate::actors::resting::Resting;
use crate::actors::scheduler::{Rest, Scheduler};
use crate::actors::sticky::CursorLeft;
use crate::actors::supervisor::Handlers;
use crate::actors::worker::Tools;
use crate::actors::worker_pool::WorkerPool;
use crate::client::Client;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::job::Job;
use crate::lifecycle::Limits;
use crate::metrics::Metrics;
use crate::outcome::JobResult;
use crate::store::{NodeInfo, Store, Target};
use crate::task::Task;

/// A drain waits at most this long, each, for claims on their way, for settling and for the lease's end.
const SETTLING: Duration = Duration::from_secs(4);

/// A node to be: its configuration and its handlers.
pub struct Node {
    config: Config,
    store: Store,
    handlers: Handlers,
    metrics: Metrics,
    fault: Option<Error>,
}

impl Node {
    /// Connect, and migrate the schema or check it, as the configuration says.
    pub async fn new(config: Config) -> Result<Self> {
        let target = Target::parse(config.database_url()?)?.named(&format!("pgcue {}", config.name));
        let store = Store::new(target, &config.schema, config.connections);
        if config.migrate {
            store.migrate().await?;
        }
        store.check_schema().await?;
        let limits = Limits { result: config.max_result, state: config.max_state, snapshot: config.max_snapshot };
        let handlers = Handlers::new(config.timeout, limits);
        let mut node = Node { config, store, handlers, metrics: Metrics::default(), fault: None };
        if node.config.demo {
            crate::handlers::demo(&mut node.handlers)?;
        }
        Ok(node)
    }

    /// A node configured by the environment: `PGCUE_*` and `DATABASE_URL`.
    pub async fn from_env() -> Result<Self> {
        Self::new(Config::from_env()?).await
    }

    /// Enqueues into the same database.
    pub fn client(&self) -> Client {
        Client::new(self.store.clone(), self.config.max_payload)
    }

    /// The node's metrics, for a registry or page of your own.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Handle a task with an async function.
    pub fn handle_fn<T: Task, F, R>(mut self, handler: F) -> Self
    where
        F: Fn(Job<T>) -> R + Send + Sync + Clone + 'static,
        R: Future<Output = JobResult> + 'static,
    {
        let added = self.handlers.add_fn(handler);
        self.fault = self.fault.or(added.err());
        self
    }

    /// Handle a task with actix actors: the factory makes one for each slot, on the slot's thread, and
    /// again after a panic, a timeout or a freeze.
    pub fn handle_actor<T: Task, A>(mut self, factory: impl Fn() -> A + Send + Sync + 'static) -> Self
    where
        A: Actor<Context = actix::Context<A>> + Handler<Job<T>>,
    {
        let added = self.handlers.add_actor::<T, A>(factory);
        self.fault = self.fault.or(added.err());
        self
    }

    /// Handle a task with actix actors that stay with their cursor: the factory is given the cursor's key,
    /// and the actor lives as long as this node is the only one to run the cursor's jobs and all of them
    /// complete, so that it may remember what is costly to build. [`CursorLeft`] tells it that this is over.
    /// Tasks with the same actor type share the cursor's actor.
    pub fn handle_sticky<T: Task, A>(mut self, factory: impl Fn(&str) -> A + Send + Sync + 'static) -> Self
    where
        A: Actor<Context = actix::Context<A>> + Handler<Job<T>> + Handler<CursorLeft>,
    {
        let added = self.handlers.add_sticky::<T, A>(factory);
        self.fault = self.fault.or(added.err());
        self
    }

    /// Run until SIGTERM or SIGINT, then drain. An error says that jobs had to be given back.
    pub async fn run(self) -> Result<()> {
        self.run_until(stop_signal()).await
    }

    /// Run until `shutdown` is ready, then drain: claim nothing more, let running jobs go on for the
    /// grace period, give back the rest uncounted, end the lease.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let running = self.start().await?;
        tokio::select! {
            () = shutdown => running.drain().await,
            name = running.died() => Err(Error::Setup(format!("the node's {name} died; this is a bug of pgcue"))),
        }
    }

    /// Start without waiting. Must be called inside an actix system.
    pub async fn start(self) -> Result<Running> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let Node { config, store, handlers, metrics, .. } = self;
        let kinds: Arc<[Arc<str>]> = handlers.kinds().into();
        if kinds.is_empty() {
            return Err(Error::Setup("the node handles no kind of job; register a handler, or run with --demo".into()));
        }
        let bell = Bell::default();
        let node = NodeInfo {
            name: config.name.clone(),
            queues: config.queues.keys().cloned().collect(),
            kinds: kinds.iter().map(|kind| kind.to_string()).collect(),
        };
        let keeper = LeaseKeeper::begin(store.clone(), node, config.lease, metrics.clone(), bell.clone()).await?;
        let lease = keeper.lease();
        let outbox = Arc::new(Outbox::default());
        let completer =
            Completer::new(store.clone(), lease.clone(), metrics.clone(), bell.clone(), Arc::clone(&outbox)).start();
        let endings = Endings { outbox, completer: completer.clone().recipient() };
        let tools = Tools {
            store: store.clone(),
            handlers: Arc::new(handlers),
            lease: lease.clone(),
            endings,
            bell: bell.clone(),
            metrics: metrics.clone(),
        };
        let pools: HashMap<Arc<str>, Addr<WorkerPool>> = config
            .queues
            .iter()
            .map(|(name, queue)| {
                let name: Arc<str> = name.as_str().into();
                let pool = WorkerPool::new(Arc::clone(&name), queue.clone(), tools.clone(), config.sticky_idle);
                (name, pool.start())
            })
            .collect();
        let scheduler = Scheduler {
            store: store.clone(),
            history_days: config.history_days as i32,
            bell: bell.clone(),
            rest: Rest::default(),
        }
        .start();
        let listener = config.listen.then(|| {
            let pools = pools.values().map(|pool| pool.clone().recipient()).collect();
            Listener::new(store.clone(), metrics.clone(), bell.clone(), pools).start()
        });
        let dispatchers: HashMap<Arc<str>, Addr<Dispatcher>> = pools
            .iter()
            .map(|(queue, pool)| {
                let dispatcher = Dispatcher {
                    queue: Arc::clone(queue),
                    kinds: Arc::clone(&kinds),
                    store: store.clone(),
                    lease: lease.clone(),
                    pool: pool.clone(),
                    listener: listener.clone(),
                    bell: bell.clone(),
                    metrics: metrics.clone(),
                    poll: config.poll,
                    run_length: config.run_length,
                    full_passes: config.full_passes,
                    rest: Resting::default(),
                };
                (Arc::clone(queue), dispatcher.start())
            })
            .collect();
        bell.hang(
            dispatchers.iter().map(|(queue, d)| (Arc::clone(queue), d.clone().recipient())).collect(),
            scheduler.clone().recipient(),
        );
        let keeper = keeper.keep(pools.values().cloned().collect());
        let reaper = Reaper::new(store.clone(), config.lease, metrics.clone(), bell).start();
        let http = match &config.http {
            Some(address) => {
                Some(crate::http::serve(address, store.clone(), metrics.clone(), keeper.clone(), scheduler.clone())?)
            }
            None => None,
        };
        tracing::info!(node = config.name, queues = ?config.queues.keys().collect::<Vec<_>>(), kinds = kinds.len(), "node started");
        Ok(Running { grace: config.grace, keeper, completer, pools, dispatchers, listener, scheduler, reaper, http })
    }
}

/// A node that runs.
pub struct Running {
    grace: Duration,
    keeper: Addr<LeaseKeeper>,
    completer: Addr<Completer>,
    pools: HashMap<Arc<str>, Addr<WorkerPool>>,
    dispatchers: HashMap<Arc<str>, Addr<Dispatcher>>,
    listener: Option<Addr<Listener>>,
    scheduler: Addr<Scheduler>,
    reaper: Addr<Reaper>,
    http: Option<crate::http::Server>,
}

impl Running {
    /// Where the service port is, if there is one.
    pub fn http(&self) -> Option<std::net::SocketAddr> {
        self.http.as_ref().map(|server| server.address)
    }

    /// The state of each actor, by name: for tests and for people who wonder.
    pub async fn observe(&self) -> Vec<(String, Observed)> {
        async fn ask<A>(name: impl Into<String>, actor: &Addr<A>) -> (String, Observed)
        where
            A: Actor<Context = actix::Context<A>> + Handler<Observe>,
        {
            let gone = Observed { state: "gone".into(), load: 0 };
            (name.into(), actor.send(Observe).await.unwrap_or(gone))
        }
        let mut all = vec![
            ask("lease", &self.keeper).await,
            ask("completer", &self.completer).await,
            ask("scheduler", &self.scheduler).await,
            ask("reaper", &self.reaper).await,
        ];
        if let Some(listener) = &self.listener {
            all.push(ask("listener", listener).await);
        }
        for (queue, dispatcher) in &self.dispatchers {
            all.push(ask(format!("dispatcher {queue}"), dispatcher).await);
            all.push(ask(format!("pool {queue}"), &self.pools[queue]).await);
        }
        all
    }

    /// Ready when one of the node's own actors is gone: then the process should end, and be restarted.
    async fn died(&self) -> &'static str {
        loop {
            actix_rt::time::sleep(Duration::from_secs(1)).await;
            let living = [
                ("lease keeper", self.keeper.connected()),
                ("completer", self.completer.connected()),
                ("scheduler", self.scheduler.connected()),
                ("reaper", self.reaper.connected()),
                ("listener", self.listener.as_ref().is_none_or(Addr::connected)),
                ("dispatcher", self.dispatchers.values().all(Addr::connected)),
                ("worker pool", self.pools.values().all(Addr::connected)),
            ];
            if let Some((name, _)) = living.iter().find(|(_, lives)| !lives) {
                return name;
            }
        }
    }

    /// Drain: see [`Node::run_until`].
    pub async fn drain(self) -> Result<()> {
        tracing::info!(grace = ?self.grace, "draining");
        // A claim on its way is waited for, but not for ever: what it brings is then given back.
        let claims = self.dispatchers.values().map(|dispatcher| dispatcher.send(Drain));
        let _ = tokio::time::timeout(SETTLING, futures_util::future::join_all(claims)).await;
        let drains = self.pools.values().map(|pool| pool.send(DrainPool { grace: self.grace }));
        let given_back: usize = futures_util::future::join_all(drains).await.into_iter().flatten().sum();
        // Settling waits out an outage, but not for ever: the lease runs out by itself.
        let flushed = tokio::time::timeout(SETTLING, self.completer.send(Flush)).await.is_ok();
        let ended =
            tokio::time::timeout(SETTLING, self.keeper.send(EndLease)).await.is_ok_and(|ended| ended.unwrap_or(false));
        if let Some(http) = self.http {
            http.stop().await;
        }
        self.dispatchers.values().for_each(|actor| actor.do_send(Stop));
        self.pools.values().for_each(|actor| actor.do_send(Stop));
        self.listener.iter().for_each(|actor| actor.do_send(Stop));
        self.scheduler.do_send(Stop);
        self.reaper.do_send(Stop);
        self.completer.do_send(Stop);
        self.keeper.do_send(Stop);
        tracing::info!(given_back, flushed, ended, "drained");
        if given_back > 0 || !flushed {
            return Err(Error::Unfinished(given_back));
        }
        Ok(())
    }
}

/// Ready at the first SIGTERM or SIGINT.
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
