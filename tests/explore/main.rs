//! The protocol as models that are small enough to visit every state they can reach, in any order of steps, with
//! faults at any moment. Each model is also explored without one of its guards, and must then break the promise
//! that the guard is for. `cargo test --test explore -- --nocapture` tells how many states there were, and the
//! shortest story of each break. No database is needed; `tests/it/walk.rs` compares the real one with a model.
#![forbid(unsafe_code)]

mod cursors;
mod explorer;
mod wakeups;
