#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod actors;
pub mod client;
pub mod config;
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
mod retry;
pub mod store;
mod task;

#[doc(hidden)]
pub mod cli;

pub use actors::messages::Observed;
pub use client::Client;
pub use config::Config;
pub use error::{Error, Fault, Result};
pub use job::{Job, Meta, NewJob};
pub use metrics::Metrics;
pub use node::{Node, Running, stop_signal};
pub use outcome::{Completion, JobError, JobResult, Outcome};
pub use retry::RetryPolicy;
pub use task::Task;
