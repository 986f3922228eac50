//! What the actors say to each other. Upward traffic is hints without data; what carries jobs goes down.

use std::sync::Arc;
use std::time::Duration;

use actix::Message;

use crate::store::ClaimedRun;

/// Work may exist. The notified path and the recovery path are one path.
#[derive(Message, Debug, Clone, Copy, PartialEq, Eq)]
#[rtype(result = "()")]
pub struct Wake(pub Cause);

/// Why an idle queue is woken; a label of the wake-up metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A notification: somebody enqueued while all slept.
    Notified,
    /// A sentry left its post.
    Sentry,
    /// A timer.
    Tick,
    /// Due jobs were moved into the line.
    Due,
    /// Slots ran low on claimed jobs.
    Slots,
    /// A settle made jobs claimable.
    Settled,
    /// A connection or lease came back.
    Recovered,
}

impl Cause {
    /// Its label.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Notified => "notified",
            Cause::Sentry => "sentry",
            Cause::Tick => "tick",
            Cause::Due => "due",
            Cause::Slots => "slots",
            Cause::Settled => "settled",
            Cause::Recovered => "recovered",
        }
    }
}

/// Dispatcher to WorkerPool: how many jobs could start soon?
#[derive(Message)]
#[rtype(result = "Wanted")]
pub struct Demand;

/// The answer to [`Demand`].
#[derive(actix::MessageResponse, Debug, Clone, Copy)]
pub struct Wanted {
    /// At most so many jobs; zero means that the pool will send a [`Wake`] when it wants some.
    pub jobs: usize,
    /// How long a job ran lately, on average.
    pub mean_run: Duration,
}

/// Dispatcher to WorkerPool: claimed jobs, in order.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Run(pub Vec<ClaimedRun>);

/// To the Completer: attempts ended, collect them from the outbox.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Collect;

/// To the Completer: answer when everything that ended before is settled.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Flush;

/// To WorkerPools: these running jobs should stop.
#[derive(Message, Clone)]
#[rtype(result = "()")]
pub struct Cancel(pub Arc<[i64]>);

/// To WorkerPools: the lease is lost. Nothing that was claimed may be trusted.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct LeaseLost;

/// To Dispatchers: claim nothing more; answered when no claim is in flight.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct Drain;

/// To WorkerPools: give back what has not started, let running jobs go on for the grace period, then
/// give them back too. Answers how many had to be.
#[derive(Message, Clone, Copy)]
#[rtype(result = "usize")]
pub struct DrainPool {
    /// The grace period.
    pub grace: Duration,
}

/// To the LeaseKeeper, last: end the lease. Answers whether the database confirmed it.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct EndLease;

/// Dispatcher to Listener: the line of this queue is empty, may I sleep?
#[derive(Message)]
#[rtype(result = "Standing")]
pub struct Rest(pub Arc<str>);

/// The answer to [`Rest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, actix::MessageResponse)]
pub enum Standing {
    /// This node is the queue's sentry: look once more, then sleep; producers will notify.
    Sentry,
    /// Another node is the sentry: the same.
    Guarded,
    /// Producers are busy: poll.
    Busy,
    /// There is no listening connection: poll.
    Deaf,
}

/// Dispatcher to Listener: let another node stand sentry. Answered when the others are told.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Leave(pub Arc<str>);

/// To any actor, when the node has drained: end, and let go of what you hold.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct Stop;

/// Every actor of a node ends the same way.
macro_rules! stops {
    ($actor:ty) => {
        impl actix::Handler<$crate::actors::messages::Stop> for $actor {
            type Result = ();

            fn handle(&mut self, _: $crate::actors::messages::Stop, ctx: &mut Self::Context) {
                actix::ActorContext::stop(ctx);
            }
        }
    };
}
pub(crate) use stops;

/// To any actor: what is your state? Tests wait on it instead of sleeping.
#[derive(Message)]
#[rtype(result = "Observed")]
pub struct Observe;

/// What an actor says of its state: for tests and for people who wonder.
#[derive(Debug, Clone, Default, PartialEq, Eq, actix::MessageResponse)]
pub struct Observed {
    /// What the actor does now, in a word.
    pub state: String,
    /// How much of its work is at hand: slots busy, attempts to settle, claims open.
    pub load: usize,
}
