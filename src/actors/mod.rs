//! The actors of a node. They carry; what to do is decided by the pure modules, and what is written
//! by the store. [`crate::node`] is the only place that builds and wires them.

pub(crate) mod backlog;
pub(crate) mod bell;
pub(crate) mod completer;
pub(crate) mod dispatcher;
pub(crate) mod keeper;
pub(crate) mod lease;
pub(crate) mod listener;
pub(crate) mod messages;
pub(crate) mod reaper;
pub(crate) mod resting;
pub(crate) mod scheduler;
pub(crate) mod sticky;
pub(crate) mod supervisor;
pub(crate) mod worker;
pub(crate) mod worker_pool;
