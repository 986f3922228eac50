//! The history of cursors, for the [checker](crate::checker).

use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Row;

use super::{Store, rows::json};
use crate::error::Result;

/// A finished job of a cursor.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct FinishedCursorJob {
    pub id: i64,
    pub queue: String,
    pub key: String,
    /// False if it failed, was cancelled or lost.
    pub completed: bool,
    pub priority: i16,
    /// None comes last.
    pub expected_at: Option<Timestamp>,
    pub attempt: u16,
    pub payload: Value,
    pub snapshot: Option<Value>,
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

fn value(row: &Row, column: usize) -> Result<Option<Value>> {
    Ok(json(row, column).map(serde_json::from_str).transpose()?)
}

impl Store {
    /// Every finished job that had a cursor. Reads the whole history.
    pub async fn finished_cursor_jobs(&self) -> Result<Vec<FinishedCursorJob>> {
        let rows = self.call(async |c, q| c.query_typed(&q.finished_cursor_jobs, &[]).await).await?;
        let read = |row: &Row| {
            Ok(FinishedCursorJob {
                id: row.get(0),
                queue: row.get(1),
                key: row.get(2),
                completed: row.get(3),
                priority: row.get(4),
                expected_at: row.get(5),
                attempt: row.get::<_, i16>(6) as u16,
                payload: value(row, 7)?.unwrap_or_default(),
                snapshot: value(row, 8)?,
                version: row.get(9),
            })
        };
        rows.iter().map(read).collect()
    }

    /// Every cursor's version and state.
    pub async fn cursor_ends(&self) -> Result<Vec<CursorEnd>> {
        let rows = self.call(async |c, q| c.query_typed(&q.cursor_ends, &[]).await).await?;
        let read = |row: &Row| {
            Ok(CursorEnd { queue: row.get(0), key: row.get(1), version: row.get(2), state: value(row, 3)? })
        };
        rows.iter().map(read).collect()
    }

    /// What of cursors is not at rest: live jobs, owned and held cursors; a few of each.
    pub async fn unrest(&self) -> Result<Vec<String>> {
        let rows = self.call(async |c, q| c.query_typed(&q.unrest, &[]).await).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
