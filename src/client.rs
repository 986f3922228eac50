//! Enqueueing from Rust: one job, many, or a stream of them by COPY; on a connection of its own or in
//! the caller's transaction.

use std::fmt::Write;

use deadpool_postgres::Object;
use futures_util::SinkExt;
use jiff::Timestamp;
use serde_json::value::RawValue;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql, Type};

use crate::cursor::{Collapse, OnFailure, OnRetry};
use crate::error::{Error, Fault, Result};
use crate::job::{NewJob, parse};
use crate::store::{Queries, Store};
use crate::task::Task;

/// A COPY sends its text in pieces of about this many bytes.
const COPY_CHUNK: usize = 64 * 1024;

/// Puts jobs into queues. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    store: Store,
    max_payload: usize,
}

/// What became of a job that was enqueued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Enqueued {
    /// The job's id, or that of the waiting job that it collapsed into.
    pub id: i64,
    /// True if it collapsed; see [`NewJob::collapse`].
    pub collapsed: bool,
}

/// What [`Client::within`] can enqueue on: a connection or an open transaction of `tokio_postgres` or
/// `deadpool_postgres`.
pub trait Connection {
    /// The `tokio_postgres` client below.
    fn raw(&self) -> &tokio_postgres::Client;
}

macro_rules! connection {
    ($type:ty, |$this:ident| $raw:expr) => {
        impl Connection for $type {
            fn raw(&self) -> &tokio_postgres::Client {
                let $this = self;
                $raw
            }
        }
    };
}

connection!(tokio_postgres::Client, |c| c);
connection!(tokio_postgres::Transaction<'_>, |t| tokio_postgres::GenericClient::client(t));
connection!(deadpool_postgres::Client, |c| c);
connection!(deadpool_postgres::ClientWrapper, |c| c);
connection!(deadpool_postgres::Transaction<'_>, |t| tokio_postgres::GenericClient::client(&**t));

/// The same verbs on a connection of the caller's.
pub struct Within<'a> {
    connection: &'a tokio_postgres::Client,
    queries: &'a Queries,
    max_payload: usize,
}

impl Client {
    /// A client that refuses payloads of more than `max_payload` bytes.
    pub fn new(store: Store, max_payload: usize) -> Self {
        Client { store, max_payload }
    }

    /// The store below.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The largest payload that is enqueued, in bytes.
    pub fn max_payload(&self) -> usize {
        self.max_payload
    }

    /// Enqueue in the caller's transaction: the job exists, and wakes a node, if and only if it commits.
    ///
    /// ```no_run
    /// # use pgcue::Task;
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct Ship { order: i64 }
    /// # impl Task for Ship { const KIND: &'static str = "ship"; }
    /// # async fn example(client: pgcue::Client, mut db: tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let tx = db.transaction().await?;
    /// tx.execute("insert into orders default values", &[]).await?;
    /// client.within(&tx).enqueue(Ship { order: 1 }).await?;
    /// tx.commit().await?;
    /// # Ok(()) }
    /// ```
    pub fn within<'a>(&'a self, connection: &'a impl Connection) -> Within<'a> {
        Within { connection: connection.raw(), queries: self.store.queries(), max_payload: self.max_payload }
    }

    /// Enqueue one job.
    pub async fn enqueue(&self, job: impl Into<NewJob>) -> Result<Enqueued> {
        self.store.on_connection(async |connection| self.within(&*connection).enqueue(job).await).await
    }

    /// Enqueue many jobs, all or none; what became of each, in order.
    pub async fn enqueue_many(&self, jobs: impl IntoIterator<Item = impl Into<NewJob>>) -> Result<Vec<Enqueued>> {
        let act = async |connection: &mut Object| {
            let transaction = connection.transaction().await?;
            let enqueued = self.within(&transaction).enqueue_many(jobs).await?;
            transaction.commit().await?;
            Ok(enqueued)
        };
        self.store.on_connection(act).await
    }

    /// See [`Within::collapse_with`].
    pub async fn collapse_with<T: Task>(
        &self,
        job: impl Into<NewJob>,
        resolve: impl FnOnce(T, T) -> T,
    ) -> Result<Enqueued> {
        let act = async |connection: &mut Object| {
            let transaction = connection.transaction().await?;
            let enqueued = self.within(&transaction).collapse_with(job, resolve).await?;
            transaction.commit().await?;
            Ok(enqueued)
        };
        self.store.on_connection(act).await
    }

    /// Enqueue any number of jobs by COPY, the fastest way; all or none. Returns how many.
    pub async fn copy(&self, jobs: impl IntoIterator<Item = Result<NewJob>>) -> Result<u64> {
        self.store.on_connection(async |connection| self.within(&*connection).copy(jobs).await).await
    }
}

/// PostgreSQL reads JSON by recursion, and says only that its stack is used up.
fn refused(error: tokio_postgres::Error) -> Error {
    match error.code() {
        Some(&SqlState::STATEMENT_TOO_COMPLEX) => {
            Fault::new("payload", "nested too deeply", "the limit is the server's max_stack_depth; make it flatter")
                .into()
        }
        _ => error.into(),
    }
}

/// A JSON text as the parameter of a statement.
fn raw(text: &str) -> Json<Box<RawValue>> {
    Json(serde_json::from_str(text).expect("NewJob::check has parsed it"))
}

impl Within<'_> {
    /// Enqueue one job.
    pub async fn enqueue(&self, job: impl Into<NewJob>) -> Result<Enqueued> {
        Ok(self.enqueue_many([job]).await?[0])
    }

    /// Enqueue many jobs; what became of each, in order. Those that collapse take a statement each.
    pub async fn enqueue_many(&self, jobs: impl IntoIterator<Item = impl Into<NewJob>>) -> Result<Vec<Enqueued>> {
        let jobs: Vec<NewJob> = jobs.into_iter().map(Into::into).collect();
        for job in &jobs {
            job.check(self.max_payload)?;
        }
        if jobs.iter().all(|job| job.collapse.is_none()) {
            return self.insert(&jobs).await;
        }
        let mut enqueued = Vec::with_capacity(jobs.len());
        for job in &jobs {
            match job.collapse {
                Some(policy) => enqueued.push(self.collapse(job, policy).await?),
                None => enqueued.extend(self.insert(std::slice::from_ref(job)).await?),
            }
        }
        Ok(enqueued)
    }

    /// Enqueue a job, or, if one of its queue, kind and collapse key waits for its first start, replace
    /// that one's payload by `resolve(waiting, new)`. Nothing can start the waiting job meanwhile: it is
    /// locked until the transaction ends; so this needs one.
    ///
    /// ```no_run
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct Notify { user: i64, events: Vec<String> }
    /// # impl pgcue::Task for Notify { const KIND: &'static str = "notify"; }
    /// # async fn example(client: pgcue::Client, notify: Notify) -> pgcue::Result<()> {
    /// use pgcue::Task;
    /// let key = format!("user {}", notify.user);
    /// let job = notify.job().delay(std::time::Duration::from_secs(60)).collapse_key(key);
    /// client.collapse_with(job, |mut waiting: Notify, new: Notify| {
    ///     waiting.events.extend(new.events);
    ///     waiting
    /// }).await?;
    /// # Ok(()) }
    /// ```
    pub async fn collapse_with<T: Task>(
        &self,
        job: impl Into<NewJob>,
        resolve: impl FnOnce(T, T) -> T,
    ) -> Result<Enqueued> {
        let job = job.into().collapse(Collapse::Keep);
        job.check(self.max_payload)?;
        // Whoever comes first makes the row, and has it locked.
        let enqueued = self.collapse(&job, Collapse::Keep).await?;
        if enqueued.collapsed {
            let row = self.connection.query_typed(&self.queries.payload, &[(&enqueued.id, Type::INT8)]).await?;
            let gone = "the waiting job started meanwhile: call it within a transaction, which locks that job";
            let gone = || Error::from(Fault::new("collapse_with", "not in a transaction", gone));
            let waiting: Json<Box<RawValue>> = row.first().ok_or_else(gone)?.get(0);
            let misfit = |which: &str, why: String| Error::from(Fault::new("payload", which, why));
            let waiting = parse(waiting.0.get()).map_err(|why| misfit("of another shape in the waiting job", why))?;
            let new = parse(&job.payload).map_err(|why| misfit("of another shape", why))?;
            let resolved = NewJob::from(resolve(waiting, new));
            resolved.check(self.max_payload)?;
            let payload = raw(&resolved.payload);
            let set = [(&enqueued.id as &(dyn ToSql + Sync), Type::INT8), (&payload, Type::JSON)];
            if self.connection.query_typed(&self.queries.set_payload, &set).await?.is_empty() {
                return Err(gone());
            }
        }
        Ok(enqueued)
    }

    /// One call of the SQL function `collapse`.
    async fn collapse(&self, job: &NewJob, policy: Collapse) -> Result<Enqueued> {
        let payload = raw(&job.payload);
        let headers = job.headers.as_deref().map(raw);
        let expected_at = job.expected_at;
        let params: [(&(dyn ToSql + Sync), Type); 15] = [
            (&job.kind, Type::TEXT),
            (&payload, Type::JSON),
            (&job.queue, Type::TEXT),
            (&(job.priority as i32), Type::INT4),
            (&expected_at, Type::TIMESTAMPTZ),
            (&job.run_at, Type::TIMESTAMPTZ),
            (&job.delay.map(|d| d.as_secs_f64()), Type::FLOAT8),
            (&(job.max_attempts as i32), Type::INT4),
            (&job.timeout.map(|t| t.as_secs_f64()), Type::FLOAT8),
            (&job.cursor_key, Type::TEXT),
            (&headers, Type::JSON),
            (&job.on_retry.map(OnRetry::as_str), Type::TEXT),
            (&job.on_failure.map(OnFailure::as_str), Type::TEXT),
            (&job.collapse_key, Type::TEXT),
            (&policy.as_str(), Type::TEXT),
        ];
        let row = self.connection.query_typed(&self.queries.collapse, &params).await.map_err(refused)?;
        Ok(Enqueued { id: row[0].get(0), collapsed: row[0].get(1) })
    }

    /// One statement for jobs that were checked and do not collapse.
    async fn insert(&self, jobs: &[NewJob]) -> Result<Vec<Enqueued>> {
        fn column<'a, T>(jobs: &'a [NewJob], field: impl Fn(&'a NewJob) -> T) -> Vec<T> {
            jobs.iter().map(field).collect()
        }
        let kinds = column(jobs, |j| j.kind.as_str());
        let payloads = column(jobs, |j| raw(&j.payload));
        let queues = column(jobs, |j| j.queue.as_str());
        let priorities = column(jobs, |j| j.priority);
        let expected = column(jobs, |j| j.expected_at);
        let run_at = column(jobs, |j| j.run_at);
        let delays = column(jobs, |j| j.delay.map(|d| d.as_secs_f64()));
        let attempts = column(jobs, |j| j.max_attempts as i16);
        let timeouts = column(jobs, |j| j.timeout.map(|t| t.as_secs_f64()));
        let cursors = column(jobs, |j| j.cursor_key.as_deref());
        let headers = column(jobs, |j| j.headers.as_deref().map(raw));
        let on_retry = column(jobs, |j| j.on_retry.map(OnRetry::as_str));
        let on_failure = column(jobs, |j| j.on_failure.map(OnFailure::as_str));
        let params: [(&(dyn ToSql + Sync), Type); 13] = [
            (&kinds, Type::TEXT_ARRAY),
            (&payloads, Type::JSON_ARRAY),
            (&queues, Type::TEXT_ARRAY),
            (&priorities, Type::INT2_ARRAY),
            (&expected, Type::TIMESTAMPTZ_ARRAY),
            (&run_at, Type::TIMESTAMPTZ_ARRAY),
            (&delays, Type::FLOAT8_ARRAY),
            (&attempts, Type::INT2_ARRAY),
            (&timeouts, Type::FLOAT8_ARRAY),
            (&cursors, Type::TEXT_ARRAY),
            (&headers, Type::JSON_ARRAY),
            (&on_retry, Type::TEXT_ARRAY),
            (&on_failure, Type::TEXT_ARRAY),
        ];
        let rows = self.connection.query_typed(&self.queries.enqueue, &params).await.map_err(refused)?;
        Ok(rows.iter().map(|row| Enqueued { id: row.get(0), collapsed: false }).collect())
    }

    /// Enqueue any number of jobs by COPY; all or none. A job that is an error ends it with that error.
    pub async fn copy(&self, jobs: impl IntoIterator<Item = Result<NewJob>>) -> Result<u64> {
        let now: Timestamp = self.connection.query_typed("select now()", &[]).await?[0].get(0);
        let sink = self.connection.copy_in(&self.queries.copy).await?;
        let mut sink = std::pin::pin!(sink);
        let mut text = String::with_capacity(COPY_CHUNK * 2);
        for job in jobs {
            let job = job?;
            job.check(self.max_payload)?;
            if let Some(policy) = job.collapse {
                return Err(
                    Fault::new("collapse", policy.as_str(), "jobs that collapse cannot be copied in bulk").into()
                );
            }
            copy_line(&mut text, &job, now)?;
            if text.len() >= COPY_CHUNK {
                sink.send(bytes::Bytes::from(std::mem::take(&mut text))).await?;
            }
        }
        sink.send(bytes::Bytes::from(text)).await?;
        sink.finish().await.map_err(refused)
    }
}

/// One line of COPY's text format.
fn copy_line(out: &mut String, job: &NewJob, now: Timestamp) -> Result<()> {
    let run_at = match job.delay {
        Some(delay) => {
            now.checked_add(delay).map_err(|e| Error::from(Fault::new("delay", format!("{delay:?}"), e.to_string())))?
        }
        None => job.run_at.unwrap_or(now),
    };
    escaped(out, &job.kind);
    out.push('\t');
    escaped(out, &job.payload);
    out.push('\t');
    escaped(out, &job.queue);
    let _ = write!(out, "\t{}\t", job.priority);
    match job.expected_at {
        Some(at) => {
            let _ = write!(out, "{at}");
        }
        None => out.push_str("infinity"),
    }
    let _ = write!(out, "\t{run_at}\t{}\t", job.max_attempts);
    match job.timeout {
        Some(timeout) => {
            let _ = write!(out, "{} microseconds", timeout.as_micros());
        }
        None => out.push_str("\\N"),
    }
    let on_retry = job.on_retry.map(OnRetry::as_str);
    let on_failure = job.on_failure.map(OnFailure::as_str);
    for optional in [job.cursor_key.as_deref(), job.headers.as_deref(), on_retry, on_failure] {
        out.push('\t');
        match optional {
            Some(text) => escaped(out, text),
            None => out.push_str("\\N"),
        }
    }
    out.push('\n');
    Ok(())
}

fn escaped(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
}
