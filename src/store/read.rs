//! Looking at jobs, queues and nodes.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql, Type};

use super::{Store, rows::json};
use crate::error::Result;
use crate::job::check_name;

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

/// Which cursors to list.
#[derive(Debug, Clone)]
pub struct CursorFilter {
    /// Of this queue.
    pub queue: String,
    /// Only this one.
    pub key: Option<String>,
    /// Only in this status.
    pub status: Option<String>,
    /// At most so many, those with the most waiting jobs first.
    pub limit: i64,
}

/// One cursor, as the view `all_cursors` shows it.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct CursorRow {
    pub queue: String,
    pub key: String,
    /// idle, owned, held or halted.
    pub status: String,
    pub state: Option<Box<RawValue>>,
    pub version: i64,
    /// The node that owns it.
    pub owner: Option<String>,
    /// The job that must run next, and when it will.
    pub held_by: Option<i64>,
    pub held_until: Option<Timestamp>,
    pub halted_at: Option<Timestamp>,
    /// The job whose failure halted it; none if an operator did.
    pub halted_by: Option<i64>,
    /// How many jobs wait in its mailbox, and since when the oldest could run.
    pub waiting: i64,
    pub waiting_since: Option<Timestamp>,
}

impl CursorRow {
    /// Its status with what it comes from.
    pub fn status_text(&self) -> String {
        match (self.status.as_str(), &self.owner, self.held_by, self.halted_by) {
            ("owned", Some(node), ..) => format!("owned by {node}"),
            ("held", _, Some(job), _) => {
                let until = self.held_until.map(|t| t.strftime(" until %F %T UTC").to_string()).unwrap_or_default();
                format!("held by job {job}{until}")
            }
            ("halted", .., Some(job)) => format!("halted by job {job}"),
            (status, ..) => status.to_owned(),
        }
    }
}

/// What an operator does to a cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CursorVerb {
    /// Start no more of its jobs.
    Halt,
    /// Let it go on.
    Resume,
    /// Take it away from its owner; answers how many jobs went back.
    Release,
    /// Cancel the job that would run next; answers which.
    Skip,
    /// Forget it.
    Delete,
}

impl JobRow {
    fn read(row: &Row) -> Self {
        JobRow {
            id: row.get("id"),
            queue: row.get("queue"),
            kind: row.get("kind"),
            state: row.get("state"),
            payload: raw(row, "payload"),
            result: raw(row, "result"),
            error: row.get("error"),
            attempt: row.get("attempt"),
            max_attempts: row.get("max_attempts"),
            priority: row.get("priority"),
            expected_at: time(row, "expected_at"),
            timeout_ms: row.get("timeout_ms"),
            headers: raw(row, "headers"),
            losses: row.get("losses"),
            cursor_key: row.get("cursor_key"),
            cursor_snapshot: raw(row, "cursor_snapshot"),
            cursor_version: row.get("cursor_version"),
            created_at: time(row, "created_at").unwrap_or_default(),
            run_at: time(row, "run_at").unwrap_or_default(),
            started_at: time(row, "started_at"),
            finished_at: time(row, "finished_at"),
        }
    }
}

/// A time of the database, whose calendar is wider than ours: what lies beyond becomes the last or first moment.
struct Time(Timestamp);

impl<'a> FromSql<'a> for Time {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        let since_2000 = i64::from_sql(&Type::INT8, raw)?;
        Ok(Time(Timestamp::from_sql(ty, raw).unwrap_or(if since_2000 > 0 { Timestamp::MAX } else { Timestamp::MIN })))
    }

    fn accepts(ty: &Type) -> bool {
        <Timestamp as FromSql>::accepts(ty)
    }
}

pub(super) fn time(row: &Row, column: impl tokio_postgres::row::RowIndex + std::fmt::Display) -> Option<Timestamp> {
    row.get::<_, Option<Time>>(column).map(|time| time.0)
}

/// A JSON column as the text it came with.
fn raw(row: &Row, column: &str) -> Option<Box<RawValue>> {
    json(row, column).and_then(|text| RawValue::from_string(text.to_owned()).ok())
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

    /// Cursors with what they wait for.
    pub async fn cursors(&self, filter: &CursorFilter) -> Result<Vec<CursorRow>> {
        let params: [(&(dyn ToSql + Sync), Type); 4] = [
            (&filter.queue, Type::TEXT),
            (&filter.key, Type::TEXT),
            (&filter.status, Type::TEXT),
            (&filter.limit, Type::INT8),
        ];
        let rows = self.call(async |c, q| c.query_typed(&q.cursors, &params).await).await?;
        let read = |row: &Row| CursorRow {
            queue: row.get("queue"),
            key: row.get("key"),
            status: row.get("status"),
            state: raw(row, "state"),
            version: row.get("version"),
            owner: row.get("owner"),
            held_by: row.get("held_by"),
            held_until: time(row, "held_until"),
            halted_at: time(row, "halted_at"),
            halted_by: row.get("halted_by"),
            waiting: row.get("waiting"),
            waiting_since: time(row, "waiting_since"),
        };
        Ok(rows.iter().map(read).collect())
    }

    /// What an operator does to a cursor; safe while its jobs run. Answers a job or a number of jobs.
    pub async fn cursor(&self, verb: CursorVerb, queue: &str, key: &str) -> Result<Option<i64>> {
        check_name("queue", queue, 512)?;
        check_name("cursor_key", key, 1024)?;
        let params: [(&(dyn ToSql + Sync), Type); 2] = [(&queue, Type::TEXT), (&key, Type::TEXT)];
        let rows = self
            .call(async |c, q| {
                let statement = match verb {
                    CursorVerb::Halt => &q.halt_cursor,
                    CursorVerb::Resume => &q.resume_cursor,
                    CursorVerb::Release => &q.release_cursor,
                    CursorVerb::Skip => &q.skip_cursor,
                    CursorVerb::Delete => &q.delete_cursor,
                };
                c.query_typed(statement, &params).await
            })
            .await?;
        Ok(rows[0].get(0))
    }

    /// Replace a cursor's state by JSON text; none takes it away.
    pub async fn set_cursor_state(&self, queue: &str, key: &str, state: Option<&str>) -> Result<()> {
        check_name("queue", queue, 512)?;
        check_name("cursor_key", key, 1024)?;
        let params: [(&(dyn ToSql + Sync), Type); 3] = [(&queue, Type::TEXT), (&key, Type::TEXT), (&state, Type::TEXT)];
        self.call(async |c, q| c.query_typed(&q.set_cursor_state, &params).await).await?;
        Ok(())
    }

    /// One sentence on why a job is not running, or what became of it.
    pub async fn why(&self, id: i64) -> Result<String> {
        self.call(async |c, q| Ok(c.query_typed(&q.why, &[(&id, Type::INT8)]).await?[0].get(0))).await
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
