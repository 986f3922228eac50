//! Claims and settlements between Rust and the SQL protocol's rows and arrays.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_util::sync::CancellationToken;

use super::Tid;
use crate::job::Meta;
use crate::lifecycle::Verdict;

/// What to claim.
#[derive(Debug)]
pub struct Claim<'a> {
    /// The living lease to claim for.
    pub lease: i64,
    /// A random number, never used before.
    pub token: i64,
    /// The queue.
    pub queue: &'a Arc<str>,
    /// The kinds that the claimer handles.
    pub kinds: &'a [Arc<str>],
    /// At most so many jobs.
    pub max_jobs: usize,
    /// At most so many jobs of one cursor.
    pub run_length: usize,
    /// Where to go on reading; lanes without a mark are read from their start.
    pub marks: &'a [Mark],
}

/// How far a lane was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The lane's priority.
    pub priority: i16,
    /// The last position read.
    pub pos: i64,
}

/// What a claim brought.
#[derive(Debug)]
pub struct Claimed {
    /// The jobs in the order in which they should start; jobs of one cursor stand together.
    pub jobs: Vec<ClaimedJob>,
    /// Where the next claim goes on reading.
    pub marks: Vec<Mark>,
    /// True if rows were seen that another transaction held.
    pub contended: bool,
    /// How long the database read the line.
    pub reading: Duration,
}

/// A job as it comes out of the database.
#[derive(Debug, Clone)]
pub struct ClaimedJob {
    pub(crate) meta: Meta,
    pub(crate) payload: Box<str>,
    pub(crate) tid: Tid,
    pub(crate) token: i64,
    pub(crate) timeout: Option<Duration>,
    pub(crate) waited: Duration,
}

/// A JSON column as the text it came with.
struct Text<'a>(&'a str);

impl<'a> FromSql<'a> for Text<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Text(std::str::from_utf8(raw)?))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSON
    }
}

/// A JSON column of a row as text.
pub(super) fn json<'a>(
    row: &'a Row,
    column: impl tokio_postgres::row::RowIndex + std::fmt::Display,
) -> Option<&'a str> {
    row.get::<_, Option<Text<'a>>>(column).map(|text| text.0)
}

impl Claimed {
    pub(super) fn read(rows: &[Row], claim: &Claim<'_>) -> Self {
        let mut claimed = Claimed {
            jobs: Vec::with_capacity(rows.len()),
            marks: Vec::new(),
            contended: false,
            reading: Duration::ZERO,
        };
        for row in rows {
            let Some(id) = row.get::<_, Option<i64>>(3) else {
                if let Some(priority) = row.get(0) {
                    claimed.marks.push(Mark { priority, pos: row.get(1) });
                }
                claimed.contended |= row.get::<_, bool>(2);
                let reading = row.get::<_, Option<f64>>(11).unwrap_or_default();
                claimed.reading = Duration::from_secs_f64(reading.max(0.0) / 1000.0);
                continue;
            };
            let kind: &str = row.get(5);
            claimed.jobs.push(ClaimedJob {
                meta: Meta {
                    id,
                    // The node asked for these kinds: share its strings.
                    kind: claim.kinds.iter().find(|k| ***k == *kind).map_or_else(|| kind.into(), Arc::clone),
                    queue: Arc::clone(claim.queue),
                    attempt: row.get::<_, i16>(7) as u16,
                    max_attempts: row.get::<_, i16>(8) as u16,
                    headers: json(row, 10).map(Arc::from),
                    cursor_key: row.get::<_, Option<&str>>(12).map(Arc::from),
                    cursor_state: json(row, 13).map(Arc::from),
                    cancelled: CancellationToken::new(),
                },
                payload: json(row, 6).unwrap_or("null").into(),
                tid: row.get(4),
                token: claim.token,
                timeout: row.get::<_, Option<i64>>(9).map(|ms| Duration::from_millis(ms.max(1) as u64)),
                waited: Duration::from_secs_f64(row.get::<_, f64>(11).max(0.0) / 1000.0),
            });
        }
        claimed
    }
}

/// How one attempt ended, ready to be written.
#[derive(Debug)]
pub struct Settlement {
    /// The job's id.
    pub id: i64,
    /// The token it was claimed under.
    pub token: i64,
    /// Where its row was.
    pub tid: Tid,
    /// What it becomes.
    pub verdict: Verdict,
    /// When its attempt started, on this machine's clock.
    pub started: std::time::Instant,
    /// Whether the job belongs to a cursor.
    pub in_cursor: bool,
    /// The cursor's state that it began with.
    pub snapshot: Option<Arc<str>>,
}

/// The same as parallel arrays.
#[derive(Default)]
pub(super) struct Columns<'a> {
    tids: Vec<Tid>,
    ids: Vec<i64>,
    tokens: Vec<i64>,
    outcomes: Vec<&'static str>,
    results: Vec<Option<&'a str>>,
    errors: Vec<Option<&'a str>>,
    delays_ms: Vec<Option<f64>>,
    ages_ms: Vec<f64>,
    snapshots: Vec<Option<&'a str>>,
    new_states: Vec<Option<&'a str>>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(ended: &'a [Settlement]) -> Self {
        let mut columns = Columns::default();
        for end in ended {
            columns.tids.push(end.tid);
            columns.ids.push(end.id);
            columns.tokens.push(end.token);
            columns.outcomes.push(end.verdict.outcome.as_str());
            columns.results.push(end.verdict.result.as_deref());
            columns.errors.push(end.verdict.error.as_deref());
            columns.delays_ms.push(end.verdict.delay.map(|d| d.as_secs_f64() * 1000.0));
            columns.ages_ms.push(end.started.elapsed().as_secs_f64() * 1000.0);
            columns.snapshots.push(end.snapshot.as_deref());
            columns.new_states.push(end.verdict.state.as_deref());
        }
        columns
    }

    pub(super) fn params(&self) -> [(&(dyn ToSql + Sync), Type); 10] {
        [
            (&self.tids, Type::TID_ARRAY),
            (&self.ids, Type::INT8_ARRAY),
            (&self.tokens, Type::INT8_ARRAY),
            (&self.outcomes, Type::TEXT_ARRAY),
            (&self.results, Type::TEXT_ARRAY),
            (&self.errors, Type::TEXT_ARRAY),
            (&self.delays_ms, Type::FLOAT8_ARRAY),
            (&self.ages_ms, Type::FLOAT8_ARRAY),
            (&self.snapshots, Type::TEXT_ARRAY),
            (&self.new_states, Type::TEXT_ARRAY),
        ]
    }
}
