//! `pgcue bench`: what this machine does with pgcue, beside the least that PostgreSQL itself needs for the same.
//!
//! The nodes are processes of their own, so that their processor time and memory are theirs alone. Everything
//! happens in one schema, which is made for it and dropped at the end.

mod bare;
mod burn_down;
mod enqueue;
mod latency;
mod load;
mod measure;
mod node;
mod place;
mod process;
mod report;
mod soak;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::Common;
use crate::error::{Error, Result};
use crate::node::stop_signal;
use place::Place;

#[derive(Args)]
#[command(
    after_help = "Without --database-url (or its environment variables) a private PostgreSQL is started for it, with fsync. \
    The schema is pgcue_bench, or --schema: it is made, and dropped at the end; one that bench did not make is \
    refused. Progress goes to standard error."
)]
pub(super) struct Bench {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    options: Options,
}

#[derive(Args, Serialize, Clone)]
struct Options {
    /// Print one JSON object
    #[arg(long, global = true)]
    #[serde(skip)]
    json: bool,
    /// Whether finished jobs go into the history; without, nothing is known of waits and runs
    #[arg(long, global = true, value_name = "ON|OFF", default_value = "on")]
    history: Switch,
}

#[derive(ValueEnum, Serialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Switch {
    On,
    Off,
}

#[derive(Subcommand)]
enum What {
    /// Jobs that wait already: how fast nodes work them off
    BurnDown(burn_down::BurnDown),
    /// Single jobs for a node that sleeps: how soon it starts them
    Latency(latency::Latency),
    /// Many producers at once: how fast jobs get in
    Enqueue(enqueue::Enqueue),
    /// Jobs at a steady rate: whether it stays as it is, also while something pins a snapshot
    Soak(soak::Soak),
    /// A node of a bench, which ends with it
    #[command(hide = true)]
    Node(node::BenchNode),
}

impl Bench {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let Bench { what, options } = self;
        if let What::Node(node) = what {
            return node.run(common).await;
        }
        let place = Place::open(common, options.history == Switch::On).await?;
        let work = async {
            match &what {
                What::BurnDown(burn_down) => burn_down.run(&place).await,
                What::Latency(latency) => latency.run(&place).await,
                What::Enqueue(enqueue) => enqueue.run(&place).await,
                What::Soak(soak) => soak.run(&place).await,
                What::Node(_) => unreachable!("it needs no place"),
            }
        };
        // Whatever `work` was doing is dropped, and its nodes with it, before the schema goes.
        let done = tokio::select! {
            done = work => done,
            () = stop_signal() => Err(Error::Setup("interrupted".into())),
        };
        let settings = place.describe().await;
        let closed = place.close().await;
        let report = report::Report::new(done?, settings?, &options);
        closed?;
        report.print(options.json)
    }
}
