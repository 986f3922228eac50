//! `pgcue bench burn-down`: jobs wait already, and nodes work them off.

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::bare;
use super::load::{Backdrop, Rows, Shape};
use super::measure::Meter;
use super::node::Nodes;
use super::place::Place;
use super::report::{Found, asked};
use crate::error::Result;

#[derive(Args, Serialize)]
#[command(
    after_help = "The time runs from the moment when the queue is resumed, with the nodes ready and waiting, until the \
    measured jobs are gone. Beside it, in the same run, the bare limit: the same durable transitions as a loop \
    of plain SQL on the server, of jobs without cursors."
)]
pub(super) struct BurnDown {
    /// So many jobs
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(i64).range(1..))]
    jobs: i64,
    /// So many run at once on a node
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: u32,
    /// So many nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    nodes: u32,
    #[command(flatten)]
    #[serde(flatten)]
    shape: Shape,
    /// Each job's payload has about so many bytes
    #[arg(long, value_name = "BYTES", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=100_000_000))]
    payload: u32,
    #[command(flatten)]
    #[serde(flatten)]
    backdrop: Backdrop,
    /// So many rounds, each beside a bare one; the medians are reported, and each round
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// So many jobs of the bare limit [default: --jobs]; 0 leaves it out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    bare_jobs: Option<i64>,
    /// So many jobs a transaction of the bare limit
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
}

impl BurnDown {
    pub(super) async fn run(&self, place: &Place) -> Result<Found> {
        let rounds = bare::beside(place, self.rounds, || self.bare(place), || self.round(place)).await?;
        Ok(Found { bench: "burn-down", asked: asked(self), rounds, list: None })
    }

    async fn bare(&self, place: &Place) -> Result<Map<String, Value>> {
        let jobs = self.bare_jobs.unwrap_or(self.jobs);
        let (speed, wal) = match jobs {
            0 => (None, None),
            _ => {
                let (speed, wal) = bare::burn_down(place, jobs, self.batch, self.payload).await?;
                (Some(speed), Some(wal))
            }
        };
        Ok(super::measure::fields(json!({"bare_jobs_per_second": speed, "bare_wal_bytes_per_job": wal})))
    }

    /// One round of pgcue, in a fresh schema.
    async fn round(&self, place: &Place) -> Result<Map<String, Value>> {
        let Shape { cursors, state } = self.shape;
        place.sql.query_typed("select pause('default')", &[]).await?;
        let kind = self.shape.kind(false);
        Rows { table: "jobs", kind, count: self.jobs, cursors, payload: self.payload }.load(place).await?;
        let (first, last) = place.ids().await?;
        self.backdrop.load(place, "backlog").await?;
        place.sql.batch_execute("analyze jobs").await?;
        let nodes = Nodes::start(place, self.nodes as usize, self.slots as usize, state as usize).await?;
        let meter = Meter::begin(place, &nodes).await?;
        place.sql.query_typed("select resume('default')", &[]).await?;
        let mut round = meter.until_gone(place, nodes, first, last, self.jobs).await?;
        round.extend(place.times(first, last, false).await?);
        place.verify().await?;
        Ok(round)
    }
}
