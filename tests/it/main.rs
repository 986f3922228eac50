//! Everything that needs a real PostgreSQL, in one program, so that one private server serves it all.

mod actix_facts;
mod cursors;
mod handlers;
mod protocol;
mod support;
mod wakeups;
