//! Measuring: what the server, the nodes and the clock say at the beginning and at the end.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

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

    /// Wait until the jobs between two ids are gone, which are so many, and say what they took. The nodes are stopped.
    ///
    /// Nobody asks the server before the nodes have begun all of them; then from the newest job on, so that the dead
    /// ones are walked over only by the question that finds nothing, and the clock is read before that one.
    pub(super) async fn until_gone(
        self,
        place: &Place,
        mut nodes: Nodes,
        first: i64,
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
            let left = "select from jobs where id between $1 and $2 order by id desc limit 1";
            if place.sql.query_typed(left, &[(&first, Type::INT8), (&last, Type::INT8)]).await?.is_empty() {
                break reading;
            }
            tokio::time::sleep(ASK).await;
            nodes.check()?;
        };
        self.end(place, nodes, end, jobs).await
    }

    /// End at once.
    pub(super) async fn stop(self, place: &Place, nodes: Nodes, jobs: i64) -> Result<Map<String, Value>> {
        let end = Reading::take(place, &nodes);
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

/// The percentiles that are reported everywhere.
pub(super) fn percentiles(mut of: Vec<f64>) -> Value {
    of.sort_by(f64::total_cmp);
    let at = |share: f64| of.get(((of.len() as f64 - 1.0) * share).round() as usize);
    json!({"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": at(1.0)})
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

    /// Wait until the other sessions of this bench have ended, and so told the statistics what they did.
    async fn settle_statistics(&self) -> Result<()> {
        let open = "select from pg_stat_activity where pid <> pg_backend_pid() \
            and (application_name = $1 or application_name like 'pgcue ' || $1 || ' %') limit 1";
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
        let of: [(&(dyn ToSql + Sync), Type); 3] = [(&first, Type::INT8), (&last, Type::INT8), (&stamps, Type::BOOL)];
        let text = include_str!("times.sql").replace(":which", "f.id between $1 and $2").replace(":group", "1");
        let rows = self.sql.query_typed(&text, &of).await?;
        Ok(times(rows.first(), stamps))
    }

    /// The same of the jobs that finished between each of these moments and the next.
    pub(super) async fn times_between(&self, ends: &[Timestamp], stamps: bool) -> Result<Vec<Map<String, Value>>> {
        let (first, last) = (ends.first(), ends.last());
        let of: [(&(dyn ToSql + Sync), Type); 4] = [
            (&first, Type::TIMESTAMPTZ),
            (&last, Type::TIMESTAMPTZ),
            (&stamps, Type::BOOL),
            (&ends, Type::TIMESTAMPTZ_ARRAY),
        ];
        let text = include_str!("times.sql")
            .replace(":which", "f.finished_at >= $1 and f.finished_at < $2")
            .replace(":group", "width_bucket(f.finished_at, $4)");
        let rows = self.sql.query_typed(&text, &of).await?;
        let of = |n: usize| times(rows.iter().find(|row| row.get::<_, i32>(0) as usize == n), stamps);
        Ok((1..ends.len()).map(of).collect())
    }
}

/// A row of `times.sql`; without one, nulls.
fn times(row: Option<&Row>, stamps: bool) -> Map<String, Value> {
    let of = |column| {
        let found: Option<Vec<f64>> = row.and_then(|row| row.get(column));
        let at = |n: usize| found.as_ref().map(|found| found[n]);
        json!({"p50": at(0), "p95": at(1), "p99": at(2), "max": at(3)})
    };
    let mut times = fields(json!({"wait_ms": of(1), "run_ms": of(2)}));
    if stamps {
        times.insert("stamp_ms".into(), of(3));
    }
    times
}
