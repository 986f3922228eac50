//! Claims and settlements between Rust and the SQL protocol's rows and arrays.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_util::sync::CancellationToken;

use super::Tid;
use crate::cursor::{Fold, OnFailure, OnRetry, OwnedCursor};
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
    /// At most so many jobs of one cursor, if many cursors have jobs.
    pub run_length: usize,
    /// At most so many jobs of one cursor.
    pub longest_run: usize,
    /// Move at most so many rows of busy cursors out of the way of later claims.
    pub to_park: usize,
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
    /// What should start, in order.
    pub runs: Vec<ClaimedRun>,
    /// Where the next claim goes on reading.
    pub marks: Vec<Mark>,
    /// True if rows were seen that another transaction held.
    pub contended: bool,
    /// True if nothing stands in the line behind what was read.
    pub at_end: bool,
    /// How long the database read the line.
    pub reading: Duration,
}

/// Consecutive jobs of one cursor, or one job without.
#[derive(Debug)]
pub struct ClaimedRun {
    /// The cursor, owned until the run is settled.
    pub cursor: Option<OwnedCursor>,
    /// The jobs, in order.
    pub jobs: VecDeque<ClaimedJob>,
}

/// A job as it comes out of the database.
#[derive(Debug, Clone)]
pub struct ClaimedJob {
    /// What its handler is told of it.
    pub meta: Meta,
    /// Its payload, JSON text; none if it is large, see [`Store::running_payload`](super::Store::running_payload).
    pub payload: Option<Box<str>>,
    /// Where its row is.
    pub tid: Tid,
    /// The claim's token.
    pub token: i64,
    /// How long an attempt may take, if the job says so.
    pub timeout: Option<Duration>,
    /// How long it was due when it was claimed.
    pub waited: Duration,
    /// What the jobs behind it do while it waits for its next attempt.
    pub on_retry: OnRetry,
    /// What its cursor does after it failed for good.
    pub on_failure: OnFailure,
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
            runs: Vec::with_capacity(rows.len()),
            marks: Vec::new(),
            contended: false,
            at_end: false,
            reading: Duration::ZERO,
        };
        let mut cursors: HashMap<Arc<str>, OwnedCursor> = HashMap::new();
        let mut in_order: Vec<i64> = Vec::new();
        let mut jobs: HashMap<i64, &Row> = HashMap::with_capacity(rows.len());
        for row in rows {
            match (row.get::<_, Option<i64>>(5), row.get::<_, Option<&str>>(16)) {
                (None, None) => {
                    if let Some(priority) = row.get(0) {
                        claimed.marks.push(Mark { priority, pos: row.get(1) });
                    }
                    claimed.contended |= row.get::<_, bool>(2);
                    claimed.at_end |= row.get::<_, Option<bool>>(3).unwrap_or_default();
                    in_order.extend(row.get::<_, Option<Vec<i64>>>(4).unwrap_or_default());
                    let reading = row.get::<_, Option<f64>>(13).unwrap_or_default();
                    claimed.reading = Duration::from_secs_f64(reading.max(0.0) / 1000.0);
                }
                (None, Some(key)) => {
                    let key: Arc<str> = key.into();
                    let state = json(row, 17).map(Arc::from);
                    let cursor = OwnedCursor { key: Arc::clone(&key), state, version: row.get(18), turn: row.get(19) };
                    cursors.insert(key, cursor);
                }
                (Some(id), _) => {
                    jobs.insert(id, row);
                }
            }
        }
        for row in in_order.iter().filter_map(|id| jobs.get(id)) {
            let key: Option<&str> = row.get(16);
            match (claimed.runs.last_mut(), key) {
                (Some(ClaimedRun { cursor: Some(cursor), jobs }), Some(key)) if *cursor.key == *key => {
                    let key = Arc::clone(&cursor.key);
                    jobs.push_back(job(row, Some(key), claim));
                }
                (_, key) => {
                    // Every key has its cursor among the rows; and comes once, its jobs together.
                    let cursor = key.and_then(|key| cursors.remove(key));
                    let key = cursor.as_ref().map(|cursor| Arc::clone(&cursor.key));
                    claimed.runs.push(ClaimedRun { cursor, jobs: VecDeque::from([job(row, key, claim)]) });
                }
            }
        }
        claimed
    }

    /// The jobs that it brought.
    pub fn ids(&self) -> Vec<i64> {
        self.runs.iter().flat_map(|run| &run.jobs).map(|job| job.meta.id).collect()
    }

    /// How many jobs it brought.
    pub fn jobs(&self) -> usize {
        self.runs.iter().map(|run| run.jobs.len()).sum()
    }
}

fn job(row: &Row, cursor_key: Option<Arc<str>>, claim: &Claim<'_>) -> ClaimedJob {
    let kind: &str = row.get(7);
    ClaimedJob {
        meta: Meta {
            id: row.get(5),
            // The node asked for these kinds: share its strings.
            kind: claim.kinds.iter().find(|k| ***k == *kind).map_or_else(|| kind.into(), Arc::clone),
            queue: Arc::clone(claim.queue),
            attempt: row.get::<_, i16>(9) as u16,
            max_attempts: row.get::<_, i16>(10) as u16,
            headers: json(row, 12).map(Arc::from),
            cursor_key,
            cursor_state: None,
            cursor_version: None,
            cancelled: CancellationToken::new(),
        },
        payload: json(row, 8).map(Box::from),
        tid: row.get(6),
        token: claim.token,
        timeout: row.get::<_, Option<i64>>(11).map(|ms| Duration::from_millis(ms.max(1) as u64)),
        waited: Duration::from_secs_f64(row.get::<_, f64>(13).max(0.0) / 1000.0),
        on_retry: if row.get(14) { OnRetry::Pass } else { OnRetry::Hold },
        on_failure: if row.get(15) { OnFailure::Halt } else { OnFailure::Continue },
    }
}

/// How one attempt ended.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The job's id.
    pub id: i64,
    /// Its kind.
    pub kind: Arc<str>,
    /// The token it was claimed under.
    pub token: i64,
    /// Where its row was.
    pub tid: Tid,
    /// What it becomes.
    pub verdict: Verdict,
    /// When its attempt started, on this machine's clock.
    pub started: Instant,
    /// How long it ran; none if it was not made.
    pub ran: Option<Duration>,
    /// The cursor's state that it began with.
    pub snapshot: Option<Arc<str>>,
    /// The cursor's version that it produced.
    pub version: Option<i64>,
}

/// How a run ended, ready to be written: a run is settled whole.
#[derive(Debug, Clone)]
pub struct EndedRun {
    /// Its queue.
    pub queue: Arc<str>,
    /// What it made of its cursor.
    pub cursor: Option<Fold>,
    /// Its jobs, in order.
    pub jobs: Vec<Settlement>,
}

impl EndedRun {
    /// A run of so many jobs begins.
    pub fn new(queue: Arc<str>, cursor: Option<OwnedCursor>, jobs: usize) -> Self {
        EndedRun { queue, cursor: cursor.map(Fold::new), jobs: Vec::with_capacity(jobs) }
    }

    /// How much text its settle carries.
    pub fn bytes(&self) -> usize {
        let state = self.cursor.as_ref().and_then(|fold| fold.state.as_deref()).map_or(0, str::len);
        let left = |job: &Settlement| {
            let texts = [job.verdict.result.as_deref(), job.verdict.error.as_deref(), job.snapshot.as_deref()];
            texts.into_iter().flatten().map(str::len).sum::<usize>()
        };
        state + self.jobs.iter().map(left).sum::<usize>()
    }

    /// The attempt at its next job ended like this; one without a start was not made. The cursor's state
    /// that it began with is kept up to `max_snapshot` bytes. Answers whether the next job may start.
    pub fn end(&mut self, job: ClaimedJob, verdict: Verdict, started: Option<Instant>, max_snapshot: usize) -> bool {
        let step = self.cursor.as_mut().map(|fold| fold.ended(job.meta.id, &verdict, job.on_retry, job.on_failure));
        self.jobs.push(Settlement {
            id: job.meta.id,
            kind: job.meta.kind,
            token: job.token,
            tid: job.tid,
            verdict,
            started: started.unwrap_or_else(Instant::now),
            ran: started.map(|started| started.elapsed()),
            snapshot: job.meta.cursor_state.filter(|state| state.len() <= max_snapshot),
            version: step.and_then(|step| step.version),
        });
        step.is_none_or(|step| step.goes_on)
    }
}

/// The same as parallel arrays: first with an entry a job, then with an entry a run of a cursor. What no job left is
/// an empty array, which costs nothing.
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
    versions: Vec<Option<i64>>,
    run_queues: Vec<&'a str>,
    run_keys: Vec<&'a str>,
    run_tokens: Vec<i64>,
    run_versions: Vec<i64>,
    run_new_versions: Vec<i64>,
    run_states: Vec<Option<&'a str>>,
    run_holds: Vec<Option<i64>>,
    run_whole: Vec<bool>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(ended: &'a [EndedRun]) -> Self {
        let mut columns = Columns::default();
        for run in ended {
            for end in &run.jobs {
                columns.tids.push(end.tid);
                columns.ids.push(end.id);
                columns.tokens.push(end.token);
                columns.outcomes.push(end.verdict.outcome.as_str());
                columns.results.push(end.verdict.result.as_deref());
                columns.errors.push(end.verdict.error.as_deref());
                columns.delays_ms.push(end.verdict.delay.map(|d| d.as_secs_f64() * 1000.0));
                columns.ages_ms.push(end.started.elapsed().as_secs_f64() * 1000.0);
                columns.snapshots.push(end.snapshot.as_deref());
                columns.versions.push(end.version);
            }
            if let (Some(fold), Some(first)) = (&run.cursor, run.jobs.first()) {
                columns.run_queues.push(&run.queue);
                columns.run_keys.push(&fold.cursor.key);
                columns.run_tokens.push(first.token);
                columns.run_versions.push(fold.cursor.version);
                columns.run_new_versions.push(fold.version);
                columns.run_states.push(fold.state.as_deref());
                columns.run_holds.push(fold.hold);
                columns.run_whole.push(fold.whole);
            }
        }
        fn clear<T>(column: &mut Vec<Option<T>>) {
            if column.iter().all(Option::is_none) {
                column.clear();
            }
        }
        clear(&mut columns.results);
        clear(&mut columns.errors);
        clear(&mut columns.delays_ms);
        clear(&mut columns.snapshots);
        clear(&mut columns.versions);
        columns
    }

    pub(super) fn params(&self) -> [(&(dyn ToSql + Sync), Type); 18] {
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
            (&self.versions, Type::INT8_ARRAY),
            (&self.run_queues, Type::TEXT_ARRAY),
            (&self.run_keys, Type::TEXT_ARRAY),
            (&self.run_tokens, Type::INT8_ARRAY),
            (&self.run_versions, Type::INT8_ARRAY),
            (&self.run_new_versions, Type::INT8_ARRAY),
            (&self.run_states, Type::TEXT_ARRAY),
            (&self.run_holds, Type::INT8_ARRAY),
            (&self.run_whole, Type::BOOL_ARRAY),
        ]
    }
}
