#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod actors;
pub mod checker;
pub mod client;
pub mod config;
pub mod cursor;
pub mod dev;
mod error;
mod handlers;
mod http;
mod job;
pub mod lifecycle;
mod metrics;
mod node;
mod outcome;
pub mod pacing;
pub mod record;
mod retry;
pub mod store;
mod task;

#[doc(hidden)]
pub mod cli;

pub use actors::messages::Observed;
pub use actors::sticky::{CursorLeft, Parting};
pub use client::{Client, Enqueued};
pub use config::Config;
pub use cursor::{Collapse, OnFailure, OnRetry};
pub use error::{Error, Fault, Result};
pub use job::{Job, Meta, NewJob};
pub use metrics::Metrics;
pub use node::{Node, Running, stop_signal};
pub use outcome::{JobError, JobResult, Left, Outcome};
pub use retry::RetryPolicy;
pub use task::{CursorTask, Task};
