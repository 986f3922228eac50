//! Looking at jobs, queues and nodes.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Store, rows::json};
use crate::error::Result;

/// One job in any state, as the view `all_jobs` shows it.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct JobRow {
    pub id: i64,
    pub queue: String,
    pub kind: String,
    pub state: String,
    pub payload: Option<Box<RawValue>>,
    pub result: Option<Box<RawValue>>,
    pub error: Option<String>,
    pub attempt: i16,
    pub max_attempts: i16,
    pub priority: i16,
    pub expected_at: Option<Timestamp>,
    pub timeout_ms: Option<i64>,
    pub headers: Option<Box<RawValue>>,
    pub losses: i16,
    pub cursor_key: Option<String>,
    pub cursor_snapshot: Option<Box<RawValue>>,
    pub cursor_version: Option<i64>,
    pub created_at: Timestamp,
    pub run_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only of this queue.
    pub queue: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only in this state.
    pub state: Option<String>,
    /// At most so many, newest first.
    pub limit: i64,
}

/// How many live jobs of a queue are in a state.
#[derive(Debug, Serialize)]
pub struct LiveCount {
    /// The queue.
    pub queue: String,
    /// The state.
    pub state: String,
    /// How many jobs.
    pub jobs: i64,
    /// How long the oldest of them has been due, in seconds.
    pub oldest_seconds: f64,
}

/// A lease: a node, or a claim of an SQL consumer.
#[derive(Debug, Serialize)]
pub struct NodeRow {
    /// The lease's id.
    pub id: i64,
    /// The node's name.
    pub node: String,
    /// When it began.
    pub started_at: Timestamp,
    /// Its last heartbeat.
    pub seen_at: Timestamp,
    /// Whether its lease holds.
    pub alive: bool,
    /// How many jobs it holds.
    pub claimed: i64,
}

impl JobRow {
    fn read(row: &Row) -> Self {
        let raw = |column| json(row, column).and_then(|text: &str| RawValue::from_string(text.to_owned()).ok());
        JobRow {
            id: row.get("id"),
            queue: row.get("queue"),
            kind: row.get("kind"),
            state: row.get("state"),
            payload: raw("payload"),
            result: raw("result"),
            error: row.get("error"),
            attempt: row.get("attempt"),
            max_attempts: row.get("max_attempts"),
            priority: row.get("priority"),
            expected_at: row.get("expected_at"),
            timeout_ms: row.get("timeout_ms"),
            headers: raw("headers"),
            losses: row.get("losses"),
            cursor_key: row.get("cursor_key"),
            cursor_snapshot: raw("cursor_snapshot"),
            cursor_version: row.get("cursor_version"),
            created_at: row.get("created_at"),
            run_at: row.get("run_at"),
            started_at: row.get("started_at"),
            finished_at: row.get("finished_at"),
        }
    }
}

impl Store {
    /// One job, live or finished.
    pub async fn job(&self, id: i64) -> Result<Option<JobRow>> {
        let rows = self.call(async |c, q| c.query_typed(&q.job, &[(&id, Type::INT8)]).await).await?;
        Ok(rows.first().map(JobRow::read))
    }

    /// Jobs, newest first.
    pub async fn jobs(&self, filter: &Filter) -> Result<Vec<JobRow>> {
        let rows = self
            .call(async |c, q| {
                c.query_typed(
                    &q.jobs,
                    &[
                        (&filter.queue, Type::TEXT),
                        (&filter.kind, Type::TEXT),
                        (&filter.state, Type::TEXT),
                        (&filter.limit, Type::INT8),
                    ],
                )
                .await
            })
            .await?;
        Ok(rows.iter().map(JobRow::read).collect())
    }

    /// Live jobs by queue and state. Reads the whole live table.
    pub async fn counts(&self) -> Result<Vec<LiveCount>> {
        let rows = self.call(async |c, q| c.query_typed(&q.counts, &[]).await).await?;
        let read = |row: &Row| LiveCount {
            queue: row.get(0),
            state: row.get(1),
            jobs: row.get(2),
            oldest_seconds: row.get::<_, f64>(3).max(0.0),
        };
        Ok(rows.iter().map(read).collect())
    }

    /// Jobs that finished within the last hour: queue, state, count.
    pub async fn finished(&self) -> Result<Vec<(String, String, i64)>> {
        let rows = self.call(async |c, q| c.query_typed(&q.finished, &[]).await).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
    }

    /// Nodes and SQL consumers, oldest first.
    pub async fn nodes(&self) -> Result<Vec<NodeRow>> {
        let rows = self.call(async |c, q| c.query_typed(&q.nodes, &[]).await).await?;
        let read = |row: &Row| NodeRow {
            id: row.get(0),
            node: row.get(1),
            started_at: row.get(2),
            seen_at: row.get(3),
            alive: row.get(4),
            claimed: row.get(5),
        };
        Ok(rows.iter().map(read).collect())
    }
}
