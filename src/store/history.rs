//! The history, for the [checker](crate::checker).

use futures_util::TryStreamExt;
use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Row;

use super::read::time;
use super::{Store, rows::json};
use crate::error::Result;

/// A finished job.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct FinishedJob {
    pub id: i64,
    pub queue: String,
    /// `completed`, `failed`, `cancelled` or `lost`.
    pub state: String,
    pub cursor_key: Option<String>,
    pub priority: i16,
    /// None comes last.
    pub expected_at: Option<Timestamp>,
    pub run_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub attempt: u16,
    pub max_attempts: u16,
    /// How many nodes it lost.
    pub losses: u16,
    /// JSON text.
    pub payload: Box<str>,
    /// The payload's field `key`, by which the job's producer knows it; empty if it has none.
    pub enqueued_as: String,
    /// JSON text.
    pub snapshot: Option<Box<str>>,
    pub version: Option<i64>,
}

/// How a cursor ended up.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct CursorEnd {
    pub queue: String,
    pub key: String,
    pub version: i64,
    pub state: Option<Value>,
}

impl Store {
    /// Every finished job. Reads the whole history, however long that takes.
    pub async fn finished_jobs(&self) -> Result<Vec<FinishedJob>> {
        let connection = self.connection().await?;
        let rows = connection.query_typed_raw(&self.queries().finished_jobs, std::iter::empty::<(i64, _)>()).await?;
        let read = |row: Row| FinishedJob {
            id: row.get(0),
            queue: row.get(1),
            state: row.get(2),
            cursor_key: row.get(3),
            priority: row.get(4),
            expected_at: time(&row, 5),
            run_at: time(&row, 6).unwrap_or_default(),
            started_at: time(&row, 7),
            attempt: row.get::<_, i16>(8) as u16,
            max_attempts: row.get::<_, i16>(9) as u16,
            losses: row.get::<_, i16>(14) as u16,
            payload: json(&row, 10).unwrap_or("null").into(),
            enqueued_as: row.get::<_, Option<String>>(11).unwrap_or_default(),
            snapshot: json(&row, 12).map(Into::into),
            version: row.get(13),
        };
        Ok(rows.map_ok(read).try_collect().await?)
    }

    /// Every cursor's version and state.
    pub async fn cursor_ends(&self) -> Result<Vec<CursorEnd>> {
        let rows = self.call(async |c, q| c.query_typed(&q.cursor_ends, &[]).await).await?;
        let read = |row: &Row| {
            let state = json(row, 3).map(serde_json::from_str).transpose()?;
            Ok(CursorEnd { queue: row.get(0), key: row.get(1), version: row.get(2), state })
        };
        rows.iter().map(read).collect()
    }

    /// What is not at rest: live jobs, owned and held cursors; a few of each.
    pub async fn unrest(&self) -> Result<Vec<String>> {
        let rows = self.call(async |c, q| c.query_typed(&q.unrest, &[]).await).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
