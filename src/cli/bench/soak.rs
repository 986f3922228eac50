//! `pgcue bench soak`: jobs at a steady rate, for a while.

use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::load::{Backdrop, Shape};
use super::measure::{Meter, fields};
use super::node::{At, Nodes};
use super::place::Place;
use super::report::{Found, asked};
use crate::error::Result;

/// Producers send so many batches a second.
const BATCHES: u32 = 50;
/// So many batches may be on their way; then the producer waits.
const ON_THE_WAY: usize = 500;
/// While the peak is looked for, so many jobs wait, as near as the producer can see.
const AHEAD: i64 = 10_000;
/// So long it takes until all is going, before the peak is measured.
const WARM_UP: Duration = Duration::from_secs(3);
/// Warmed up and measured after this time.
const PEAK: Duration = Duration::from_secs(15);

#[derive(Args, Serialize)]
#[command(
    after_help = "Every interval it says how many jobs a second began, how long they waited, and what lies about. pinned and \
    trend tell what changes while a snapshot is held: vacuum may remove nothing then. The trend is the slope \
    of jobs a second over the last three quarters of the time, in percent of their mean for each million jobs. \
    Here the --backlog is of a kind that no node handles, so that it stays."
)]
pub(super) struct Soak {
    /// So many jobs a second; 0: 60% of a peak that is measured first: what is worked off while as much is enqueued
    #[arg(long, value_name = "PER_SECOND", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    rate: u32,
    /// For so long
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    minutes: f64,
    /// After the first quarter of the time, hold a snapshot until the end
    #[arg(long)]
    pin: bool,
    #[command(flatten)]
    #[serde(flatten)]
    shape: Shape,
    #[command(flatten)]
    #[serde(flatten)]
    backdrop: Backdrop,
    /// How often it says how it goes, about; at least four times in all
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = positive)]
    interval: f64,
    /// So many run at once on a node
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: u32,
    /// So many nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    nodes: u32,
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|n| (0.001..=1e6).contains(n)).ok_or_else(|| "give a number from 0.001 to 1000000".into())
}

/// What was seen at the end of an interval.
struct Sight {
    at: Timestamp,
    second: f64,
    begun: u64,
    enqueued: i64,
    dead: i64,
    memory: Option<u64>,
    pinned: bool,
}

impl Soak {
    pub(super) async fn run(&self, place: &Place) -> Result<Found> {
        let (peak, rate) = match self.rate {
            0 => {
                let peak = self.peak(place).await?;
                (Some(peak), peak * 0.6)
            }
            rate => (None, f64::from(rate)),
        };
        let nodes = self.start(place).await?;
        let newest = place.sql.query_typed("select coalesce(max(id), 0) from jobs", &[]).await?[0].get::<_, i64>(0);
        let mut producer = Producer::new(place, &self.shape).await?;
        let meter = Meter::begin(place, &nodes).await?;
        eprintln!("{rate:.0} jobs a second for {} minutes", self.minutes);
        let sights = self.watch(place, &nodes, &mut producer, rate).await?;
        let jobs = producer.finish().await?;
        let late = jobs - sights.last().map_or(0, |sight| sight.begun as i64);
        let mut found = meter.until_gone(place, nodes, newest + 1, newest + jobs, jobs).await?;
        found.extend(place.times(newest + 1, newest + jobs, true).await?);
        found.extend(fields(json!({"rate": rate, "peak_jobs_per_second": peak, "left_at_the_end": late})));
        let intervals = intervals(place, &sights).await?;
        found.extend(self.compare(place, &sights, &intervals).await?);
        place.verify().await?;
        let list = Some(("intervals", intervals.into_iter().map(Value::Object).collect()));
        Ok(Found { bench: "soak", asked: asked(self), rounds: vec![found], list })
    }

    /// Nodes on a fresh schema, with what is to lie about.
    async fn start(&self, place: &Place) -> Result<Nodes> {
        place.fresh().await?;
        self.backdrop.load(place, "nobody").await?;
        place.sql.batch_execute("analyze jobs").await?;
        Nodes::start(place, self.nodes as usize, self.slots as usize, self.shape.state as usize).await
    }

    /// Jobs a second when the producer keeps pace with the nodes.
    async fn peak(&self, place: &Place) -> Result<f64> {
        eprintln!("looking for the peak");
        let nodes = self.start(place).await?;
        let mut producer = Producer::new(place, &self.shape).await?;
        let ahead = |_| nodes.begun() as i64 + AHEAD;
        let begin = Instant::now();
        producer.produce(begin, WARM_UP, ahead).await?;
        let (before, since) = (nodes.begun(), Instant::now());
        producer.produce(begin, PEAK, ahead).await?;
        let peak = (nodes.begun() - before) as f64 / since.elapsed().as_secs_f64();
        producer.finish().await?;
        nodes.stop().await?;
        Ok(peak)
    }

    /// Produce, look, and pin, until the time is over. The first sight is of the beginning.
    async fn watch(&self, place: &Place, nodes: &Nodes, producer: &mut Producer, rate: f64) -> Result<Vec<Sight>> {
        let time = Duration::from_secs_f64(self.minutes * 60.0);
        let interval = time / ((self.minutes * 60.0 / self.interval).round() as u32).max(4);
        let begin = Instant::now();
        let mut pin: Option<Client> = None;
        let mut sights = vec![look(place, nodes, 0, begin, false).await?];
        while begin.elapsed() < time {
            let until = (interval * sights.len() as u32).min(time);
            producer.produce(begin, until, |passed| (passed.as_secs_f64() * rate) as i64).await?;
            let sight = look(place, nodes, producer.sent, begin, pin.is_some()).await?;
            let before = sights.last().expect("there is the first");
            let speed = (sight.begun - before.begun) as f64 / (sight.second - before.second);
            let (second, dead, pinned) = (sight.second, sight.dead, if sight.pinned { ", pinned" } else { "" });
            eprintln!("{second:6.0} s  {speed:6.0} jobs/s  {dead} dead tuples{pinned}");
            sights.push(sight);
            if self.pin && pin.is_none() && begin.elapsed() >= time / 4 {
                let session = place.session().await?;
                session.batch_execute("begin isolation level repeatable read; select count(*) from queues").await?;
                pin = Some(session);
            }
        }
        Ok(sights)
    }

    /// How the time after the first quarter, which may be pinned, compares with that before.
    async fn compare(
        &self,
        place: &Place,
        sights: &[Sight],
        intervals: &[Map<String, Value>],
    ) -> Result<Map<String, Value>> {
        let quarter = self.minutes * 15.0;
        let at = sights.iter().position(|sight| sight.second >= quarter).unwrap_or(0);
        let [first, middle, last] = [&sights[0], &sights[at], &sights[sights.len() - 1]];
        let speed = |a: &Sight, b: &Sight| (b.begun - a.begun) as f64 / (b.second - a.second);
        let halves = place.times_between(&[first.at, middle.at, last.at], true).await?;
        let p99 = |half: &Map<String, Value>| half["stamp_ms"]["p99"].as_f64();
        let points: Vec<(f64, f64)> = sights[at..]
            .windows(2)
            .zip(&intervals[at..])
            .filter_map(|(pair, row)| Some((pair[1].begun as f64 / 1e6, row["jobs_per_second"].as_f64()?)))
            .collect();
        Ok(fields(json!({
            "pinned": self.pin,
            "first_quarter": {"jobs_per_second": speed(first, middle), "p99_ms": p99(&halves[0])},
            "afterwards": {"jobs_per_second": speed(middle, last), "p99_ms": p99(&halves[1])},
            "throughput_ratio": speed(middle, last) / speed(first, middle),
            "p99_ratio": p99(&halves[1]).zip(p99(&halves[0])).map(|(after, before)| after / before),
            "trend_percent_per_million_jobs": trend(&points),
        })))
    }
}

async fn look(place: &Place, nodes: &Nodes, enqueued: i64, begin: Instant, pinned: bool) -> Result<Sight> {
    let (begun, second) = (nodes.begun(), begin.elapsed().as_secs_f64());
    let row = "select clock_timestamp(), n_dead_tup from pg_stat_all_tables where relid = 'jobs'::regclass";
    let row = &place.sql.query_typed(row, &[]).await?[0];
    Ok(Sight { at: row.get(0), dead: row.get(1), second, begun, enqueued, memory: nodes.memory("VmRSS"), pinned })
}

/// A row an interval.
async fn intervals(place: &Place, sights: &[Sight]) -> Result<Vec<Map<String, Value>>> {
    let ends: Vec<Timestamp> = sights.iter().map(|sight| sight.at).collect();
    let times = place.times_between(&ends, true).await?;
    let row = |(pair, times): (&[Sight], Map<String, Value>)| {
        let [before, now] = pair else { unreachable!("windows of two") };
        let mut row = fields(json!({
            "second": now.second,
            "pinned": now.pinned,
            "jobs_per_second": (now.begun - before.begun) as f64 / (now.second - before.second),
            "waiting": now.enqueued - now.begun as i64,
            "dead_tuples": now.dead,
            "node_memory_bytes": now.memory,
        }));
        row.extend(times.into_iter().filter(|(name, _)| name != "run_ms"));
        row
    };
    Ok(sights.windows(2).zip(times).map(row).collect())
}

/// The slope of the least squares' line, in percent of the mean for each unit of x; none of fewer than two points.
fn trend(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let squares: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / squares;
    Some(slope / y * 100.0).filter(|trend| trend.is_finite())
}

/// Sends jobs in batches when they are due, whether the ones before were answered or not.
struct Producer {
    session: std::sync::Arc<Client>,
    kind: &'static str,
    cursors: i64,
    sent: i64,
    on_the_way: JoinSet<Result<(), tokio_postgres::Error>>,
}

impl Producer {
    async fn new(place: &Place, shape: &Shape) -> Result<Self> {
        let session = place.session().await?.into();
        let (kind, cursors) = (shape.kind(true), shape.cursors);
        Ok(Producer { session, kind, cursors, sent: 0, on_the_way: JoinSet::new() })
    }

    /// Produce until this much time has passed since `begin`. How many jobs are due depends on the time so far.
    async fn produce(&mut self, begin: Instant, until: Duration, due: impl Fn(Duration) -> i64) -> Result<()> {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / BATCHES);
        loop {
            ticks.tick().await;
            let now = begin.elapsed().min(until);
            let due = due(now);
            if due > self.sent {
                self.send(due);
            }
            while let Some(answer) = self.on_the_way.try_join_next() {
                answer.expect("a batch does not panic")?;
            }
            if self.on_the_way.len() > ON_THE_WAY {
                self.on_the_way.join_next().await.expect("there are some").expect("a batch does not panic")?;
            }
            if now >= until {
                return Ok(());
            }
        }
    }

    fn send(&mut self, due: i64) {
        let (session, kind, cursors, first) = (self.session.clone(), self.kind, self.cursors, self.sent + 1);
        self.sent = due;
        self.on_the_way.spawn(async move {
            let insert = "insert into jobs (kind, payload, cursor_key) \
                select $1, json_build_object('at', $2), case when $3 > 0 then 'cursor ' || n % $3 end \
                from generate_series($4, $5) n";
            let at = At::now().at;
            let params: [(&(dyn ToSql + Sync), Type); 5] = [
                (&kind, Type::TEXT),
                (&at, Type::INT8),
                (&cursors, Type::INT8),
                (&first, Type::INT8),
                (&due, Type::INT8),
            ];
            session.query_typed(insert, &params).await.map(drop)
        });
    }

    /// Wait for the last answers. Returns how many jobs were enqueued.
    async fn finish(mut self) -> Result<i64> {
        while let Some(answer) = self.on_the_way.join_next().await {
            answer.expect("a batch does not panic")?;
        }
        Ok(self.sent)
    }
}
