//! `pgcue bench enqueue`: many producers at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use futures_util::SinkExt;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::bare;
use super::measure::{Meter, fields, percentiles};
use super::node::Nodes;
use super::place::Place;
use super::report::{Found, asked};
use crate::error::Result;

#[derive(Args, Serialize)]
#[command(
    after_help = "Beside it, alternately: the same producers with a bare INSERT or COPY into a table of the same columns \
    and indexes, without triggers. A node works the jobs off meanwhile, since producers need not wake \
    one that is awake; what it costs is in the figures, and --no-node leaves it out."
)]
pub(super) struct Enqueue {
    /// So many producers, each with a session of its own
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=150))]
    clients: u32,
    /// How: a plain INSERT, enqueue(), enqueue_many(), or COPY
    #[arg(long, value_name = "HOW", default_value = "single")]
    mode: Mode,
    /// So many jobs in all
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(i64).range(1..))]
    jobs: i64,
    /// So many a call; with --mode insert or single it is 1
    #[arg(long, value_name = "PER_CALL", default_value_t = 1000, value_parser = clap::value_parser!(i32).range(1..=1_000_000))]
    rows: i32,
    /// Leave the jobs lying
    #[arg(long)]
    no_node: bool,
    /// So many rounds of each; the medians are reported, and each round
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

#[derive(ValueEnum, Serialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Insert,
    Single,
    Many,
    Copy,
}

impl Mode {
    fn statement(self, bare: bool) -> &'static str {
        match (self, bare) {
            (Mode::Single, false) => "select enqueue('noop', '{}')",
            (Mode::Insert, false) => "insert into jobs (kind, payload) values ('noop', '{}') returning id",
            (Mode::Insert | Mode::Single, true) => {
                "insert into bare_jobs (kind, payload) values ('noop', '{}') returning id"
            }
            (Mode::Many, false) => "select enqueue_many('noop', array_fill('{}'::json, array[$1]))",
            (Mode::Many, true) => {
                "insert into bare_jobs (kind, payload) \
                select 'noop', p from unnest(array_fill('{}'::json, array[$1])) p returning id"
            }
            (Mode::Copy, false) => "copy jobs (kind, payload) from stdin",
            (Mode::Copy, true) => "copy bare_jobs (kind, payload) from stdin",
        }
    }
}

impl Enqueue {
    pub(super) async fn run(&self, place: &Place) -> Result<Found> {
        let rounds = bare::beside(place, self.rounds, || self.bare(place), || self.round(place)).await?;
        Ok(Found { bench: "enqueue", asked: asked(self), rounds, list: None })
    }

    async fn bare(&self, place: &Place) -> Result<Map<String, Value>> {
        bare::tables(place).await?;
        let sessions = self.sessions(place).await?;
        let wal = place.wal().await?;
        let (seconds, calls) = self.produce(sessions, true).await?;
        let wal = (place.wal().await? - wal) as f64 / self.jobs as f64;
        place.sql.batch_execute("drop table bare_jobs, bare_history").await?;
        Ok(fields(json!({
            "bare_jobs_per_second": self.jobs as f64 / seconds,
            "bare_call_ms": calls,
            "bare_wal_bytes_per_job": wal,
        })))
    }

    async fn round(&self, place: &Place) -> Result<Map<String, Value>> {
        let nodes = Nodes::start(place, usize::from(!self.no_node), 16, 0).await?;
        let sessions = self.sessions(place).await?;
        let meter = Meter::begin(place, &nodes).await?;
        let (seconds, calls) = self.produce(sessions, false).await?;
        let begun = nodes.begun();
        let mut round = meter.stop(place, nodes, self.jobs).await?;
        round.extend(fields(json!({
            "seconds": seconds,
            "jobs_per_second": self.jobs as f64 / seconds,
            "call_ms": calls,
            "begun_meanwhile": begun,
        })));
        place.verify().await?;
        Ok(round)
    }

    async fn sessions(&self, place: &Place) -> Result<Vec<Client>> {
        let mut sessions = Vec::new();
        for _ in 0..self.clients {
            sessions.push(place.session().await?);
        }
        Ok(sessions)
    }

    /// All jobs, by all clients. Returns the seconds, and how long the calls took.
    async fn produce(&self, sessions: Vec<Client>, bare: bool) -> Result<(f64, Value)> {
        let (mode, rows) = (self.mode, if matches!(self.mode, Mode::Insert | Mode::Single) { 1 } else { self.rows });
        let left = Arc::new(AtomicI64::new(self.jobs));
        let begin = Instant::now();
        let mut clients = JoinSet::new();
        for session in sessions {
            clients.spawn(produce(session, mode, mode.statement(bare), rows, Arc::clone(&left)));
        }
        let times = clients.join_all().await.into_iter().collect::<Result<Vec<Vec<f64>>, tokio_postgres::Error>>()?;
        Ok((begin.elapsed().as_secs_f64(), percentiles(times.concat())))
    }
}

/// One producer: takes of what is left, a call at a time. Returns how long each took, in milliseconds.
async fn produce(
    session: Client,
    mode: Mode,
    text: &'static str,
    rows: i32,
    left: Arc<AtomicI64>,
) -> Result<Vec<f64>, tokio_postgres::Error> {
    let mut times = Vec::new();
    let types = if mode == Mode::Many { &[Type::INT4][..] } else { &[] };
    let statement = session.prepare_typed(text, types).await?;
    loop {
        let before = left.fetch_sub(i64::from(rows), Ordering::Relaxed);
        if before <= 0 {
            return Ok(times);
        }
        let rows = i64::from(rows).min(before) as i32;
        let begin = Instant::now();
        match mode {
            Mode::Insert | Mode::Single => drop(session.query(&statement, &[]).await?),
            Mode::Many => drop(session.query(&statement, &[&rows]).await?),
            Mode::Copy => {
                let mut sink = std::pin::pin!(session.copy_in::<_, Bytes>(&statement).await?);
                sink.send("noop\t{}\n".repeat(rows as usize).into()).await?;
                sink.finish().await?;
            }
        }
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
}
