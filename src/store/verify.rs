//! Whether the tables keep what the protocol promises, and repairs. The rules are in
//! `migrations/functions/08_verify.sql`.

use std::time::Duration;

use serde::Serialize;
use tokio_postgres::types::{ToSql, Type};

use super::Store;
use crate::error::Result;

/// Verifying reads every table whole; how long that takes is the history's size.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Something in the tables that breaks a promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Offence {
    /// Which rule, by the name of its offence.
    pub rule: String,
    /// The queue, if it is in one.
    pub queue: Option<String>,
    /// The job.
    pub job: Option<i64>,
    /// The cursor.
    pub cursor_key: Option<String>,
    /// The claim; of a lease that nobody ends, the lease.
    pub token: Option<i64>,
    /// What was found, for people.
    pub found: String,
    /// The name of what mends it; none if only a human can decide.
    pub repair: Option<String>,
}

impl Store {
    /// What breaks a promise, up to a hundred offenders of each rule. Safe while nodes run: it only reads,
    /// in one snapshot. Reads every table whole.
    pub async fn verify(&self) -> Result<Vec<Offence>> {
        let rows = self.call_within(DEADLINE, async |c, q| c.query_typed(&q.verify, &[]).await).await?;
        let read = |row: &tokio_postgres::Row| Offence {
            rule: row.get(0),
            queue: row.get(1),
            job: row.get(2),
            cursor_key: row.get(3),
            token: row.get(4),
            found: row.get(5),
            repair: row.get(6),
        };
        Ok(rows.iter().map(read).collect())
    }

    /// Mend one offence, if it has a repair and is still there. Safe while nodes run. True if it did something.
    pub async fn repair(&self, offence: &Offence) -> Result<bool> {
        let Some(repair) = &offence.repair else { return Ok(false) };
        let params: [(&(dyn ToSql + Sync), Type); 5] = [
            (repair, Type::TEXT),
            (&offence.queue, Type::TEXT),
            (&offence.job, Type::INT8),
            (&offence.cursor_key, Type::TEXT),
            (&offence.token, Type::INT8),
        ];
        self.call(async |c, q| Ok(c.query_typed(&q.repair, &params).await?[0].get(0))).await
    }
}
