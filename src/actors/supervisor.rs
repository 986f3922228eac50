//! Running handlers so that nothing they do harms anybody else.
//!
//! actix ends an actor that panics, and its own `Supervisor` with it; it never rebuilds one from a
//! factory (tests/it/actix_facts.rs shows what it does). So a slot keeps a [`Runner`] for each kind
//! and throws it away, to be rebuilt from its factory when it is next needed, after a panic, a
//! timeout or a freeze. The attempt at hand is the only one that is lost.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use actix::{Actor, Addr, Context, Handler};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::sticky::{CursorLeft, Kept, Parting, Sticky};
use crate::cursor::OwnedCursor;
use crate::error::{Error, Result};
use crate::job::{Job, Meta, parse};
use crate::lifecycle::{End, Limits};
use crate::outcome::JobResult;
use crate::retry::RetryPolicy;
use crate::store::ClaimedJob;
use crate::task::Task;

/// What a slot holds to run one kind: built by a factory on the slot's thread, and never shared.
pub(crate) trait Runner {
    /// Begin an attempt.
    fn run(&mut self, payload: &str, meta: Meta) -> LocalBoxFuture<'static, End>;
}

/// How a kind is run.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) retry: RetryPolicy,
    timeout: Option<Duration>,
    source: Source,
}

/// Where the runners of a kind come from.
#[derive(Clone)]
enum Source {
    /// One for each slot.
    Slot(Arc<dyn Fn() -> Box<dyn Runner> + Send + Sync>),
    /// One for each cursor.
    Cursor(Arc<dyn StickyKind>),
}

/// A kind whose actors stay with their cursor.
trait StickyKind: Send + Sync {
    /// The actor's type: kinds that share it share the actor.
    fn actor(&self) -> TypeId;
    fn start(&self, key: &str, version: i64) -> Kept;
    /// None if the actor is of another type.
    fn runner(&self, kept: &Kept) -> Option<Box<dyn Runner>>;
}

struct StickyActor<T, A: Actor> {
    factory: Arc<dyn Fn(&str) -> A + Send + Sync>,
    task: std::marker::PhantomData<fn(T)>,
}

impl<T: Task, A> StickyKind for StickyActor<T, A>
where
    A: Actor<Context = Context<A>> + Handler<Job<T>> + Handler<CursorLeft>,
{
    fn actor(&self) -> TypeId {
        TypeId::of::<A>()
    }

    fn start(&self, key: &str, version: i64) -> Kept {
        Kept::new((self.factory)(key).start(), version)
    }

    fn runner(&self, kept: &Kept) -> Option<Box<dyn Runner>> {
        let address = kept.address::<A>()?.clone();
        Some(Box::new(ActorRunner::<T, A> { address, task: std::marker::PhantomData }))
    }
}

/// The kinds that a node handles.
#[derive(Clone)]
pub(crate) struct Handlers {
    kinds: HashMap<Arc<str>, Entry>,
    /// How long an attempt may take if neither job nor task says.
    timeout: Duration,
    limits: Limits,
}

impl Handlers {
    pub(crate) fn new(timeout: Duration, limits: Limits) -> Self {
        Handlers { kinds: HashMap::new(), timeout, limits }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Handle `T` with an async function.
    pub(crate) fn add_fn<T: Task, F, R>(&mut self, handler: F) -> Result<()>
    where
        F: Fn(Job<T>) -> R + Send + Sync + Clone + 'static,
        R: Future<Output = JobResult> + 'static,
    {
        self.add::<T>(Source::Slot(Arc::new(move || {
            Box::new(FnRunner { handler: handler.clone(), task: std::marker::PhantomData::<fn(T)> })
        })))
    }

    /// Handle `T` with actors that `factory` makes, one for each slot.
    pub(crate) fn add_actor<T: Task, A>(&mut self, factory: impl Fn() -> A + Send + Sync + 'static) -> Result<()>
    where
        A: Actor<Context = Context<A>> + Handler<Job<T>>,
    {
        let factory = Arc::new(factory);
        self.add::<T>(Source::Slot(Arc::new(move || {
            let factory = Arc::clone(&factory);
            Box::new(ActorRunner::<T, A> { address: factory().start(), task: std::marker::PhantomData })
        })))
    }

    /// Handle `T` with actors that `factory` makes, one for each cursor.
    pub(crate) fn add_sticky<T: Task, A>(&mut self, factory: impl Fn(&str) -> A + Send + Sync + 'static) -> Result<()>
    where
        A: Actor<Context = Context<A>> + Handler<Job<T>> + Handler<CursorLeft>,
    {
        let factory = Arc::new(factory);
        self.add::<T>(Source::Cursor(Arc::new(StickyActor::<T, A> { factory, task: std::marker::PhantomData })))
    }

    fn add<T: Task>(&mut self, source: Source) -> Result<()> {
        let entry = Entry { retry: T::retry(), timeout: T::TIMEOUT, source };
        match self.kinds.insert(T::KIND.into(), entry) {
            Some(_) => Err(Error::Setup(format!("kind {:?} has two handlers; register it once", T::KIND))),
            None => Ok(()),
        }
    }

    pub(crate) fn kinds(&self) -> Vec<Arc<str>> {
        self.kinds.keys().cloned().collect()
    }

    /// How long an attempt of this job may take.
    pub(crate) fn limit(&self, job: &ClaimedJob) -> Duration {
        job.timeout.or_else(|| self.get(&job.meta.kind)?.timeout).unwrap_or(self.timeout)
    }

    pub(crate) fn get(&self, kind: &str) -> Option<&Entry> {
        self.kinds.get(kind)
    }
}

struct FnRunner<T, F> {
    handler: F,
    task: std::marker::PhantomData<fn(T)>,
}

impl<T: Task, F, R> Runner for FnRunner<T, F>
where
    F: Fn(Job<T>) -> R + Clone + 'static,
    R: Future<Output = JobResult> + 'static,
{
    fn run(&mut self, payload: &str, meta: Meta) -> LocalBoxFuture<'static, End> {
        let args = match parse(payload) {
            Ok(args) => args,
            Err(why) => return std::future::ready(End::Rejected(why)).boxed_local(),
        };
        let handler = self.handler.clone();
        async move { End::Returned(handler(Job { args, meta }).await) }.boxed_local()
    }
}

struct ActorRunner<T, A: Actor> {
    address: Addr<A>,
    task: std::marker::PhantomData<fn(T)>,
}

impl<T: Task, A: Actor<Context = Context<A>> + Handler<Job<T>>> Runner for ActorRunner<T, A> {
    fn run(&mut self, payload: &str, meta: Meta) -> LocalBoxFuture<'static, End> {
        let args = match parse(payload) {
            Ok(args) => args,
            Err(why) => return std::future::ready(End::Rejected(why)).boxed_local(),
        };
        let answer = self.address.send(Job { args, meta });
        async move {
            match answer.await {
                Ok(result) => End::Returned(result),
                // The actor is gone: it panicked, or stopped itself.
                Err(_) => End::Panicked(
                    last_panic().unwrap_or_else(|| "the handler's actor stopped without an answer".into()),
                ),
            }
        }
        .boxed_local()
    }
}

/// How often a slot may rebuild a handler before it pauses.
#[derive(Debug)]
struct RestartBudget {
    left: u32,
    since: Instant,
}

impl RestartBudget {
    const REBUILDS: u32 = 100;
    const WINDOW: Duration = Duration::from_secs(10);
    const PAUSE: Duration = Duration::from_secs(1);

    /// Spend one; the pause to make before rebuilding.
    fn spend(&mut self, now: Instant) -> Duration {
        if now - self.since > Self::WINDOW {
            *self = RestartBudget { left: Self::REBUILDS, since: now };
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 { Self::PAUSE } else { Duration::ZERO }
    }
}

/// The runners of one slot.
pub(crate) struct Runners {
    handlers: Arc<Handlers>,
    sticky: Arc<Sticky>,
    built: HashMap<Arc<str>, Box<dyn Runner>>,
    /// The cursor of the run at hand: key and turn.
    cursor: Option<(Arc<str>, i64)>,
    /// Its sticky actors, by their type, as long as all its jobs complete.
    held: HashMap<TypeId, Kept>,
    budget: RestartBudget,
}

impl Runners {
    pub(crate) fn new(handlers: Arc<Handlers>, sticky: Arc<Sticky>) -> Self {
        catch_panic_messages();
        let budget = RestartBudget { left: RestartBudget::REBUILDS, since: Instant::now() };
        Runners { handlers, sticky, built: HashMap::new(), cursor: None, held: HashMap::new(), budget }
    }

    /// A run begins.
    pub(crate) fn enter(&mut self, cursor: Option<&OwnedCursor>) {
        self.cursor = cursor.map(|cursor| (Arc::clone(&cursor.key), cursor.turn));
    }

    /// An attempt did not complete: what sticky actors remember may be ahead of the state.
    pub(crate) fn doubt(&mut self) {
        if let Some((key, _)) = &self.cursor {
            self.held.drain().for_each(|(_, kept)| kept.part(Arc::clone(key), Parting::Failed));
        }
    }

    /// The run has ended: its sticky actors wait for the cursor's next turn.
    pub(crate) fn leave(&mut self) {
        if let Some((key, turn)) = self.cursor.take() {
            self.held.drain().for_each(|(actor, kept)| self.sticky.keep(actor, Arc::clone(&key), turn, kept));
        }
    }

    /// Make one attempt, which may take `limit`. The second answer says why the runner was thrown away.
    pub(crate) async fn attempt(&mut self, payload: &str, meta: Meta, limit: Duration) -> (End, Option<&'static str>) {
        let kind = Arc::clone(&meta.kind);
        let cancelled = meta.cancelled.clone();
        let attempt = std::panic::catch_unwind(AssertUnwindSafe(|| self.begin(payload, meta)));
        let end = match attempt {
            Ok(Ok(attempt)) => match tokio::time::timeout(limit, AssertUnwindSafe(attempt).catch_unwind()).await {
                Ok(Ok(end)) => end,
                Ok(Err(panic)) => End::Panicked(last_panic().unwrap_or_else(|| panic_text(&*panic))),
                Err(_) => End::TimedOut(limit),
            },
            Ok(Err(end)) => end,
            Err(panic) => End::Panicked(last_panic().unwrap_or_else(|| panic_text(&*panic))),
        };
        let cause = match &end {
            End::Panicked(_) => "panic",
            End::TimedOut(_) => "timeout",
            _ => return (end, None),
        };
        cancelled.cancel();
        self.built.remove(&kind);
        self.doubt();
        tokio::time::sleep(self.budget.spend(Instant::now())).await;
        (end, Some(cause))
    }

    /// Find or build the runner, and let it begin.
    fn begin(&mut self, payload: &str, meta: Meta) -> Result<LocalBoxFuture<'static, End>, End> {
        let Some(entry) = self.handlers.get(&meta.kind) else {
            return Err(End::Released); // claims ask only for kinds that are handled
        };
        match &entry.source {
            Source::Slot(build) => {
                let runner = self.built.entry(Arc::clone(&meta.kind)).or_insert_with(|| build());
                Ok(runner.run(payload, meta))
            }
            Source::Cursor(sticky) => {
                let Some((key, turn)) = &self.cursor else {
                    return Err(End::Rejected("its handler is an actor of a cursor; enqueue it with a cursor".into()));
                };
                let (actor, version) = (sticky.actor(), meta.cursor_version.unwrap_or_default());
                let held = self.held.remove(&actor).or_else(|| self.sticky.take(actor, key, *turn));
                let kept = match held {
                    Some(kept) if kept.version == version => kept,
                    held => {
                        // Another handler has changed the state meanwhile.
                        held.into_iter().for_each(|kept| kept.part(Arc::clone(key), Parting::Elsewhere));
                        sticky.start(key, version)
                    }
                };
                let kept = self.held.entry(actor).or_insert(kept);
                kept.version = version + 1; // as it will be when the job completes

                let runner = sticky.runner(kept);
                Ok(runner.expect("kept actors are found by their type").run(payload, meta))
            }
        }
    }
}

thread_local! {
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static IS_SLOT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// On threads of slots, keep a panic's message and place for the job's error instead of printing it.
fn catch_panic_messages() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if IS_SLOT.get() {
                let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
                LAST_PANIC.set(Some(panic_text(panic.payload()) + &place));
            } else {
                previous(panic);
            }
        }));
    });
    IS_SLOT.set(true);
}

fn last_panic() -> Option<String> {
    LAST_PANIC.take()
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a value that is no text".into())
}
