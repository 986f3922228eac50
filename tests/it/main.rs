//! Everything that needs a real PostgreSQL, in one program, so that one private server serves it all.

mod actix_facts;
mod checker;
mod cli;
mod crashes;
mod cursors;
mod deploy;
mod enqueue;
mod examples;
mod handlers;
mod model;
mod protocol;
mod support;
mod wakeups;
