//! Actors that stay with a cursor between its runs, so that what they remember need not be built anew.
//!
//! A kept actor is used again if and only if its node took the cursor's very next turn, and the cursor is
//! at the version that the actor left: then nobody else has touched the cursor since. It is parted with when somebody has, when a job of it did not complete
//! (what it remembers may be ahead of the state), when it was idle for long, when the lease is lost and
//! when the node drains; and it is told, with [`CursorLeft`]
//! (but for one whose slot is given up with its blocked thread).

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use actix::{Actor, Addr, Context, Handler, Message};

/// To a sticky actor: its cursor's ownership has ended for it. The last message it gets.
#[derive(Message, Debug, Clone)]
#[rtype(result = "()")]
pub struct CursorLeft {
    /// The cursor's key.
    pub key: Arc<str>,
    /// The reason.
    pub why: Parting,
}

/// Why a node parts with a sticky actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Parting {
    /// Another node owned the cursor since, or an operator changed it.
    Elsewhere,
    /// A job of it did not complete.
    Failed,
    /// No job came for a while.
    Idle,
    /// The node lost its lease.
    LeaseLost,
    /// The node stops.
    Drained,
}

/// The address of an actor of some type.
pub(crate) struct Kept {
    /// The cursor's version that it knows.
    pub(crate) version: i64,
    address: Box<dyn Any + Send>,
    is_connected: fn(&dyn Any) -> bool,
    tell: fn(&dyn Any, CursorLeft),
}

impl Kept {
    pub(crate) fn new<A>(address: Addr<A>, version: i64) -> Self
    where
        A: Actor<Context = Context<A>> + Handler<CursorLeft>,
    {
        Kept {
            version,
            address: Box::new(address),
            is_connected: |address| address.downcast_ref::<Addr<A>>().is_some_and(Addr::connected),
            tell: |address, left| address.downcast_ref::<Addr<A>>().into_iter().for_each(|a| a.do_send(left.clone())),
        }
    }

    /// The address, if it is one of `A`.
    pub(crate) fn address<A: Actor>(&self) -> Option<&Addr<A>> {
        self.address.downcast_ref()
    }

    pub(crate) fn part(self, key: Arc<str>, why: Parting) {
        (self.tell)(&*self.address, CursorLeft { key, why });
    }
}

/// The kept actors of one queue, by their type and the cursor's key.
pub(crate) struct Sticky {
    idle: Duration,
    kept: Mutex<HashMap<(TypeId, Arc<str>), Waiting>>,
}

struct Waiting {
    kept: Kept,
    turn: i64,
    since: Instant,
}

impl Sticky {
    pub(crate) fn new(idle: Duration) -> Self {
        Sticky { idle, kept: Mutex::default() }
    }

    /// The actor of the turn before this one, if it is here and nobody came in between.
    pub(crate) fn take(&self, kind: TypeId, key: &Arc<str>, turn: i64) -> Option<Kept> {
        let waiting = self.lock().remove(&(kind, Arc::clone(key)))?;
        if !(waiting.kept.is_connected)(&*waiting.kept.address) {
            return None;
        }
        if waiting.turn + 1 != turn {
            waiting.kept.part(Arc::clone(key), Parting::Elsewhere);
            return None;
        }
        Some(waiting.kept)
    }

    /// Keep an actor after a turn.
    pub(crate) fn keep(&self, kind: TypeId, key: Arc<str>, turn: i64, kept: Kept) {
        self.lock().insert((kind, key), Waiting { kept, turn, since: Instant::now() });
    }

    /// Part with those that were idle for long.
    pub(crate) fn sweep(&self) {
        let idle = self.idle;
        self.part_if(Parting::Idle, |waiting| waiting.since.elapsed() > idle);
    }

    pub(crate) fn part_with_all(&self, why: Parting) {
        self.part_if(why, |_| true);
    }

    fn part_if(&self, why: Parting, which: impl Fn(&Waiting) -> bool) {
        let parted: Vec<_> = self.lock().extract_if(|_, waiting| which(waiting)).collect();
        parted.into_iter().for_each(|((_, key), waiting)| waiting.kept.part(key, why));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(TypeId, Arc<str>), Waiting>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
