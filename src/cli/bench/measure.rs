//! Measuring: what the server, the nodes and the clock say at the beginning and at the end.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio_postgres::types::Type;

use super::load::bar;
use super::node::Nodes;
use super::place::Place;
use super::process;
use crate::error::Result;

/// How often it is asked whether all is done, once all has begun.
const ASK: Duration = Duration::from_millis(5);

/// What is read at once, without asking the server.
#[derive(Clone, Copy)]
struct Reading {
    at: Instant,
    server_cpu: Option<f64>,
    node_cpu: Option<f64>,
}

impl Reading {
    fn take(place: &Place, nodes: &Nodes) -> Self {
        let server_cpu = place.postmaster().and_then(process::family);
        Reading { at: Instant::now(), server_cpu, node_cpu: nodes.cpu() }
    }
}

/// A measurement that has begun.
pub(super) struct Meter {
    wal: i64,
    commits: i64,
    rest: Option<u64>,
    begin: Reading,
}

impl Meter {
    /// Begin. The last thing that is read is the clock.
    pub(super) async fn begin(place: &Place, nodes: &Nodes) -> Result<Self> {
        let commits = place.commits().await?;
        let wal = place.wal().await?;
        let rest = nodes.memory("VmRSS");
        Ok(Meter { wal, commits, rest, begin: Reading::take(place, nodes) })
    }

    /// Wait until the jobs up to this id are gone, which are so many, and say what they took. The nodes are stopped.
    ///
    /// Nobody asks the server before the nodes have begun all of them; then from the newest job on, so that the dead
    /// ones are walked over only by the question that finds nothing, and the clock is read before that one.
    pub(super) async fn until_gone(
        self,
        place: &Place,
        mut nodes: Nodes,
        last: i64,
        jobs: i64,
    ) -> Result<Map<String, Value>> {
        let progress = bar(jobs as u64, "running");
        while nodes.begun() < jobs as u64 {
            progress.set_position(nodes.begun());
            tokio::time::sleep(ASK).await;
            nodes.check()?;
        }
        progress.finish_and_clear();
        let end = loop {
            let reading = Reading::take(place, &nodes);
            let left = "select from jobs where id <= $1 order by id desc limit 1";
            if place.sql.query_typed(left, &[(&last, Type::INT8)]).await?.is_empty() {
                break reading;
            }
            tokio::time::sleep(ASK).await;
            nodes.check()?;
        };
        self.end(place, nodes, end, jobs).await
    }

    async fn end(self, place: &Place, nodes: Nodes, end: Reading, jobs: i64) -> Result<Map<String, Value>> {
        let wal = place.wal().await? - self.wal;
        let peak = nodes.memory("VmHWM");
        nodes.stop().await?;
        place.settle_statistics().await?;
        let commits = place.commits().await? - self.commits;
        let seconds = (end.at - self.begin.at).as_secs_f64();
        let each = |total: i64| total as f64 / jobs as f64;
        let used = |of: fn(&Reading) -> Option<f64>| Some(of(&end)? - of(&self.begin)?);
        let mut found = fields(json!({
            "jobs": jobs,
            "seconds": seconds,
            "jobs_per_second": jobs as f64 / seconds,
            "wal_bytes_per_job": each(wal),
            "commits_per_job": each(commits),
            "node_cpu_seconds": used(|r| r.node_cpu),
            "server_cpu_seconds": used(|r| r.server_cpu),
            "node_peak_memory_bytes": peak,
            "node_rest_memory_bytes": self.rest,
        }));
        found.extend(place.tuples().await?);
        Ok(found)
    }
}

/// The fields of what is an object.
pub(super) fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        other => Map::from_iter([("value".into(), other)]),
    }
}

impl Place {
    /// Where the WAL is, in bytes.
    pub(super) async fn wal(&self) -> Result<i64> {
        let lsn = "select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8";
        Ok(self.sql.query_typed(lsn, &[]).await?[0].get(0))
    }

    /// The commits of this database, as far as sessions have told.
    pub(super) async fn commits(&self) -> Result<i64> {
        self.sql.query_typed("select pg_stat_force_next_flush()", &[]).await?;
        let commits = "select xact_commit from pg_stat_database where datname = current_database()";
        Ok(self.sql.query_typed(commits, &[]).await?[0].get(0))
    }

    /// Wait until the sessions of the nodes have ended, and so told the statistics what they did.
    async fn settle_statistics(&self) -> Result<()> {
        let open = "select from pg_stat_activity where application_name like 'pgcue ' || $1 || ' %' limit 1";
        for _ in 0..1000 {
            if self.sql.query_typed(open, &[(&self.name, Type::TEXT)]).await?.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Dead rows of the jobs table, and the share of its updates that touched no index.
    async fn tuples(&self) -> Result<Map<String, Value>> {
        let tuples = "select n_dead_tup, n_tup_hot_upd::float8 / nullif(n_tup_upd, 0) from pg_stat_all_tables \
            where relid = 'jobs'::regclass";
        let row = &self.sql.query_typed(tuples, &[]).await?[0];
        let (dead, hot): (i64, Option<f64>) = (row.get(0), row.get(1));
        Ok(fields(json!({"dead_tuples": dead, "hot_update_share": hot})))
    }

    /// The ids of the first and the last job.
    pub(super) async fn ids(&self) -> Result<(i64, i64)> {
        let row = &self.sql.query_typed("select min(id), max(id) from jobs", &[]).await?[0];
        Ok((row.get(0), row.get(1)))
    }

    /// Percentiles of waiting and running in milliseconds, of the jobs between two ids; null without a history.
    /// stamps: also what the jobs themselves answered.
    pub(super) async fn times(&self, first: i64, last: i64, stamps: bool) -> Result<Map<String, Value>> {
        let row = &self
            .sql
            .query_typed(include_str!("times.sql"), &[(&first, Type::INT8), (&last, Type::INT8), (&stamps, Type::BOOL)])
            .await?[0];
        let of = |column| {
            let found: Option<Vec<f64>> = row.get(column);
            let at = |n: usize| found.as_ref().map(|found| found[n]);
            json!({"p50": at(0), "p95": at(1), "p99": at(2), "max": at(3)})
        };
        let mut times = fields(json!({"wait_ms": of(0), "run_ms": of(1)}));
        if stamps {
            times.insert("stamp_ms".into(), of(2));
        }
        Ok(times)
    }
}
