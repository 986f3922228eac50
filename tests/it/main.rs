//! Everything that needs a real PostgreSQL, in one program, so that one private server serves it all.

mod actix_facts;
mod bench;
mod checker;
mod cli;
mod collapse;
mod cursors;
mod deploy;
mod drain;
mod enqueue;
mod examples;
mod fuzz;
mod guards;
mod handlers;
mod history;
mod inputs;
mod leases;
mod model;
mod operators;
mod plans;
mod protocol;
mod reading;
mod sticky;
mod support;
mod verify;
mod wakeups;
mod walk;
