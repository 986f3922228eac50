//! Enqueueing from Rust: one job, many, or a stream of them by COPY; on a connection of its own or in
//! the caller's transaction.

use std::fmt::Write;

use futures_util::SinkExt;
use jiff::Timestamp;
use tokio_postgres::types::{Json, ToSql, Type};

use crate::error::{Error, Fault, Result};
use crate::job::NewJob;
use crate::store::{Queries, Store};

/// A COPY sends its text in pieces of about this many bytes.
const COPY_CHUNK: usize = 64 * 1024;

/// Puts jobs into queues. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    store: Store,
    max_payload: usize,
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

    /// Enqueue one job; returns its id.
    pub async fn enqueue(&self, job: impl Into<NewJob>) -> Result<i64> {
        let connection = self.store.connection().await?;
        self.within(&connection).enqueue(job).await
    }

    /// Enqueue many jobs in one statement; returns their ids in order.
    pub async fn enqueue_many(&self, jobs: impl IntoIterator<Item = impl Into<NewJob>>) -> Result<Vec<i64>> {
        let connection = self.store.connection().await?;
        self.within(&connection).enqueue_many(jobs).await
    }

    /// Enqueue any number of jobs by COPY, the fastest way; all or none. Returns how many.
    pub async fn copy(&self, jobs: impl IntoIterator<Item = Result<NewJob>>) -> Result<u64> {
        let connection = self.store.connection().await?;
        self.within(&connection).copy(jobs).await
    }
}

impl Within<'_> {
    /// Enqueue one job; returns its id.
    pub async fn enqueue(&self, job: impl Into<NewJob>) -> Result<i64> {
        Ok(self.enqueue_many([job]).await?[0])
    }

    /// Enqueue many jobs in one statement; returns their ids in order.
    pub async fn enqueue_many(&self, jobs: impl IntoIterator<Item = impl Into<NewJob>>) -> Result<Vec<i64>> {
        let jobs: Vec<NewJob> = jobs.into_iter().map(Into::into).collect();
        for job in &jobs {
            job.check(self.max_payload)?;
        }
        fn column<'a, T>(jobs: &'a [NewJob], field: impl Fn(&'a NewJob) -> T) -> Vec<T> {
            jobs.iter().map(field).collect()
        }
        let raw = |text: &str| Json(serde_json::from_str::<Box<serde_json::value::RawValue>>(text).expect("checked"));
        let kinds = column(&jobs, |j| j.kind.as_str());
        let payloads = column(&jobs, |j| raw(&j.payload));
        let queues = column(&jobs, |j| j.queue.as_str());
        let priorities = column(&jobs, |j| j.priority);
        let expected = column(&jobs, |j| j.expected_at);
        let run_at = column(&jobs, |j| j.run_at);
        let delays = column(&jobs, |j| j.delay.map(|d| d.as_secs_f64()));
        let attempts = column(&jobs, |j| j.max_attempts as i16);
        let timeouts = column(&jobs, |j| j.timeout.map(|t| t.as_secs_f64()));
        let cursors = column(&jobs, |j| j.cursor_key.as_deref());
        let headers = column(&jobs, |j| j.headers.as_deref().map(raw));
        let params: [(&(dyn ToSql + Sync), Type); 11] = [
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
        ];
        let rows = self.connection.query_typed(&self.queries.enqueue, &params).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
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
            copy_line(&mut text, &job, now)?;
            if text.len() >= COPY_CHUNK {
                sink.send(bytes::Bytes::from(std::mem::take(&mut text))).await?;
            }
        }
        sink.send(bytes::Bytes::from(text)).await?;
        Ok(sink.finish().await?)
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
    for optional in [&job.cursor_key, &job.headers] {
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
