//! `pgcue bench latency`: one job at a time for a node that sleeps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_postgres::types::Type;

use super::load::bar;
use super::measure::{Meter, percentiles};
use super::node::{At, Nodes};
use super::place::Place;
use super::report::{Found, asked};
use crate::error::{Error, Result};

#[derive(Args, Serialize)]
#[command(
    after_help = "stamp_ms is the time from just before the job was sent to the server until its handler began: the commit, \
    the waking and the claim are in it. enqueue_ms is how long the enqueueing itself took, as its caller saw \
    it. Neither counts the first second, in which sessions plan. Jobs are sent at their time, whether the ones \
    before were answered or not."
)]
pub(super) struct Latency {
    /// So many jobs a second, each in a transaction of its own
    #[arg(long, value_name = "PER_SECOND", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// For so long, after a second that does not count
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// So many run at once on the node
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: u32,
}

impl Latency {
    pub(super) async fn run(&self, place: &Place) -> Result<Found> {
        place.fresh().await?;
        let nodes = Nodes::start(place, 1, self.slots as usize, 0).await?;
        let session = Arc::new(place.session().await?);
        let enqueue = "select enqueue('stamp', json_build_object('at', $1))";
        let enqueue = session.prepare_typed(enqueue, &[Type::INT8]).await?;
        place.asleep().await?;
        let warm_up = i64::from(self.rate);
        let jobs = warm_up + i64::from(self.rate) * i64::from(self.seconds);
        let meter = Meter::begin(place, &nodes).await?;
        let begin = tokio::time::Instant::now();
        let progress = bar(jobs as u64, "enqueueing");
        let mut sent = JoinSet::new();
        for n in 0..jobs {
            tokio::time::sleep_until(begin + Duration::from_secs_f64(n as f64 / f64::from(self.rate))).await;
            let (session, enqueue) = (Arc::clone(&session), enqueue.clone());
            sent.spawn(async move {
                let begin = Instant::now();
                session.query_one(&enqueue, &[&At::now().at]).await?;
                Ok((n, begin.elapsed().as_secs_f64() * 1000.0))
            });
            progress.inc(1);
        }
        progress.finish_and_clear();
        let mut times =
            sent.join_all().await.into_iter().collect::<Result<Vec<(i64, f64)>, tokio_postgres::Error>>()?;
        times.retain(|(n, _)| *n >= warm_up);
        drop((session, enqueue));
        let mut round = meter.until_gone(place, nodes, 1, jobs, jobs).await?;
        round.insert("enqueue_ms".into(), percentiles(times.into_iter().map(|(_, ms)| ms).collect()));
        round.extend(place.times(1 + warm_up, jobs, true).await?);
        place.verify().await?;
        Ok(Found { bench: "latency", asked: asked(self), rounds: vec![round], list: None })
    }
}

impl Place {
    /// Wait until a node sleeps: then a session holds the queue's lock.
    async fn asleep(&self) -> Result<()> {
        let sentry = "select from pg_locks l where l.locktype = 'advisory' and l.mode = 'ExclusiveLock' and l.granted \
            and l.classid = (quote_ident($1) || '.jobs')::regclass";
        let begin = Instant::now();
        while self.sql.query_typed(sentry, &[(&self.schema, Type::TEXT)]).await?.is_empty() {
            if begin.elapsed() > Duration::from_secs(60) {
                return Err(Error::Setup("the node of the bench does not fall asleep".into()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}
