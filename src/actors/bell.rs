//! Who can be woken. Hints flow from everywhere to the dispatchers and the scheduler; the bell holds
//! their addresses, so that actors need not be built in an order that suits each other.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use actix::Recipient;

use super::messages::{Cause, Wake};

/// Rings nothing until it is hung, once, when all actors are built.
#[derive(Clone, Default)]
pub(crate) struct Bell(Arc<OnceLock<Ropes>>);

struct Ropes {
    dispatchers: HashMap<Arc<str>, Recipient<Wake>>,
    scheduler: Recipient<Wake>,
}

impl Bell {
    pub(crate) fn hang(&self, dispatchers: HashMap<Arc<str>, Recipient<Wake>>, scheduler: Recipient<Wake>) {
        let _ = self.0.set(Ropes { dispatchers, scheduler });
    }

    /// Wake one queue's dispatcher, if this node serves the queue.
    pub(crate) fn wake(&self, queue: &str, cause: Cause) {
        if let Some(dispatcher) = self.0.get().and_then(|ropes| ropes.dispatchers.get(queue)) {
            dispatcher.do_send(Wake(cause));
        }
    }

    /// Wake every dispatcher.
    pub(crate) fn wake_all(&self, cause: Cause) {
        self.0.get().into_iter().flat_map(|ropes| ropes.dispatchers.values()).for_each(|d| d.do_send(Wake(cause)));
    }

    /// Something may have been scheduled.
    pub(crate) fn wake_scheduler(&self, cause: Cause) {
        self.0.get().into_iter().for_each(|ropes| ropes.scheduler.do_send(Wake(cause)));
    }
}
