//! The only place that speaks SQL: one method a verb, each one call of the SQL protocol.
//!
//! Every call of a node has a deadline. One that runs out closes its connection, because nobody knows what the
//! server is still doing on it. What enqueues, migrates or reads the whole history takes its time.

mod connect;
mod history;
mod migrate;
mod queries;
mod read;
mod rows;
mod tid;
mod verify;

use std::ops::{AsyncFn, AsyncFnOnce};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

pub use connect::Target;
pub use history::{CursorEnd, FinishedJob};
pub use migrate::{Migrated, VERSION, script};
pub(crate) use queries::{Queries, quote};
pub use read::{CursorFilter, CursorRow, CursorVerb, Filter, JobRow, LiveCount, NodeRow};
pub use rows::{Claim, Claimed, ClaimedJob, ClaimedRun, EndedRun, Mark, Settlement};
pub use tid::Tid;
pub use verify::Offence;

use crate::error::{Error, Result};

/// A call that was not answered after this long is given up and its connection closed.
const DEADLINE: Duration = Duration::from_secs(15);
/// A claim brings no larger payload, in bytes: it stays where it is until a slot is free for its job.
const MAX_INLINE: i32 = 32 << 10;

/// The deadline of what keeps a lease of `ttl`. A heartbeat is sent every third of it and the lease given up after
/// two thirds: there is time for another attempt.
fn soon(ttl: Duration) -> Duration {
    DEADLINE.min(ttl / 6)
}

/// A connection that a call is made on. If the call does not come to its end, nobody knows what the server is still
/// doing on it: then it is closed, and never used again.
struct InFlight(Option<Object>);

impl InFlight {
    fn client(&self) -> &Client {
        self.0.as_ref().expect("it is there until it lands")
    }

    /// The call came to its end. If the server takes no writes any more the connection is closed all the same: the
    /// next one is made to a primary, or refused.
    fn land<T>(mut self, result: &Result<T>) {
        if !result.as_ref().is_err_and(Error::is_read_only) {
            drop(self.0.take());
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.take().map(Object::take);
    }
}

/// A database with pgcue's schema in it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    target: Target,
    pool: Pool,
    schema: String,
    queries: Queries,
    /// Calls must begin their transaction themselves.
    begins: AtomicBool,
}

/// What a node says of itself with its lease.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// Its name, for people.
    pub name: String,
    /// The queues it serves.
    pub queues: Vec<String>,
    /// The kinds it handles.
    pub kinds: Vec<String>,
}

/// What a heartbeat found.
#[derive(Debug)]
pub struct Extended {
    /// False if the reaper ended the lease.
    pub alive: bool,
    /// The tokens of the lease's open claims.
    pub open_claims: Vec<i64>,
    /// Running jobs that should be cancelled.
    pub cancelled: Vec<i64>,
}

/// What the last call of [`Store::move_horizon`] saw.
#[derive(Debug, Clone, Default)]
pub struct Horizon {
    seen: Option<i64>,
    line_end: Option<i64>,
    writers: Vec<String>,
}

/// What a pass of the reaper did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reaped {
    /// Leases that ended.
    pub ended: i32,
    /// Jobs that were given back or finished as lost.
    pub moved: i32,
    /// Jobs that another transaction holds locked; a later pass takes them.
    pub stuck: i32,
}

impl Store {
    /// A store over a pool of at most `connections`. Connects when it is first used.
    pub fn new(target: Target, schema: &str, connections: usize) -> Self {
        let pool = target.pool(connections);
        let (queries, begins) = (Queries::new(schema), AtomicBool::new(false));
        Store { inner: Arc::new(Inner { target, pool, schema: schema.into(), queries, begins }) }
    }

    /// The schema's name; also the channel of its notifications.
    pub fn schema(&self) -> &str {
        &self.inner.schema
    }

    /// Where the database is.
    pub fn target(&self) -> &Target {
        &self.inner.target
    }

    pub(crate) fn queries(&self) -> &Queries {
        &self.inner.queries
    }

    /// The same database over a connection of its own, which no other call ever takes.
    pub(crate) fn apart(&self) -> Self {
        let Inner { target, schema, .. } = &*self.inner;
        Store::new(target.clone(), schema, 1)
    }

    /// A connection of the pool.
    pub async fn connection(&self) -> Result<Object> {
        self.inner.pool.get().await.map_err(|e| self.inner.target.explain_pool(e))
    }

    /// Do something on a pooled connection, however long it takes.
    pub(crate) async fn on_connection<T>(&self, act: impl AsyncFnOnce(&mut Object) -> Result<T>) -> Result<T> {
        let mut in_flight = InFlight(Some(self.connection().await?));
        let result = act(in_flight.0.as_mut().expect("it is there until it lands")).await;
        in_flight.land(&result);
        result
    }

    /// Run one call on a pooled connection, with the deadline.
    async fn call<T>(&self, call: impl AsyncFn(&Client, &Queries) -> Result<T, tokio_postgres::Error>) -> Result<T> {
        self.call_within(DEADLINE, call).await
    }

    /// The same with a deadline of its own.
    async fn call_within<T>(
        &self,
        deadline: Duration,
        call: impl AsyncFn(&Client, &Queries) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T> {
        let connection = std::cell::Cell::new(None);
        let call = async {
            let in_flight = InFlight(Some(self.connection().await?));
            connection.set(Some(in_flight.client().cancel_token()));
            let result = self.isolated(in_flight.client(), &call).await;
            in_flight.land(&result);
            result
        };
        match tokio::time::timeout(deadline, call).await {
            Ok(result) => result,
            Err(_) => {
                connection.take().into_iter().for_each(|token| self.inner.target.cancel(token));
                Err(Error::Deadline(deadline))
            }
        }
    }

    /// Make a call in its own transaction, of isolation level read committed. Where that is the default, as it
    /// usually is, the call itself is the transaction; else the first call is refused, and from then on each
    /// is sent between two statements, all three in one flight: the transaction never waits for its client.
    async fn isolated<T>(
        &self,
        connection: &Client,
        call: &impl AsyncFn(&Client, &Queries) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T> {
        let Inner { queries, begins, .. } = &*self.inner;
        if !begins.load(Ordering::Relaxed) {
            match call(connection, queries).await.map_err(Error::from) {
                Err(error) if error.is_isolation() => {}
                result => return result,
            }
            begins.store(true, Ordering::Relaxed);
            tracing::warn!("the database's default_transaction_isolation is not read committed: every call costs more");
        }
        // The commit of a transaction that failed rolls it back.
        let (began, result, ended) = tokio::join!(
            biased;
            connection.batch_execute("begin isolation level read committed"),
            call(connection, queries),
            connection.batch_execute("commit"),
        );
        began?;
        let result = result?;
        ended?;
        Ok(result)
    }

    /// Create or upgrade the schema.
    pub async fn migrate(&self) -> Result<Migrated> {
        migrate::migrate(&mut *self.connection().await?, self.schema()).await
    }

    /// Refuse a schema that is missing or newer than this program.
    pub async fn check_schema(&self) -> Result<()> {
        let connection = self.connection().await?;
        migrate::check(self.schema(), migrate::version(&connection, self.schema()).await?)
    }

    /// Begin a lease of `ttl` for a node that serves these queues and kinds.
    pub async fn begin_lease(&self, lease: i64, node: &NodeInfo, ttl: Duration) -> Result<()> {
        self.call(async |c, q| {
            let ttl = ttl.as_secs_f64();
            c.query_typed(
                &q.begin_lease,
                &[
                    (&lease, Type::INT8),
                    (&node.name, Type::TEXT),
                    (&ttl, Type::FLOAT8),
                    (&node.queues, Type::TEXT_ARRAY),
                    (&node.kinds, Type::TEXT_ARRAY),
                ],
            )
            .await
        })
        .await?;
        Ok(())
    }

    /// The heartbeat.
    pub async fn extend(&self, lease: i64, ttl: Duration) -> Result<Extended> {
        self.call_within(soon(ttl), async |c, q| {
            let row = c.query_typed(&q.extend, &[(&lease, Type::INT8), (&ttl.as_secs_f64(), Type::FLOAT8)]).await?;
            Ok(Extended { alive: row[0].get(0), open_claims: row[0].get(1), cancelled: row[0].get(2) })
        })
        .await
    }

    /// Give back all that a lease holds, and end it. Returns how many jobs went back.
    pub async fn end_lease(&self, lease: i64) -> Result<i32> {
        self.call(async |c, q| Ok(c.query_typed(&q.end_lease, &[(&lease, Type::INT8)]).await?[0].get(0))).await
    }

    /// Give back what is left of one claim, uncounted. Returns how many jobs went back.
    pub async fn give_back(&self, token: i64) -> Result<i32> {
        self.call(async |c, q| Ok(c.query_typed(&q.give_back, &[(&token, Type::INT8)]).await?[0].get(0))).await
    }

    /// One pass of the reaper.
    pub async fn reap(&self) -> Result<Reaped> {
        self.call(async |c, q| {
            let row = c.query_typed(&q.reap, &[]).await?;
            Ok(Reaped { ended: row[0].get(0), moved: row[0].get(1), stuck: row[0].get(2) })
        })
        .await
    }

    /// Take jobs out of the line.
    pub async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed> {
        let lanes: Vec<i16> = claim.marks.iter().map(|m| m.priority).collect();
        let marks: Vec<i64> = claim.marks.iter().map(|m| m.pos).collect();
        let kinds: Vec<&str> = claim.kinds.iter().map(|kind| &**kind).collect();
        let rows = self
            .call(async |c, q| {
                c.query_typed(
                    &q.claim,
                    &[
                        (&claim.lease, Type::INT8),
                        (&claim.token, Type::INT8),
                        (&&**claim.queue, Type::TEXT),
                        (&kinds, Type::TEXT_ARRAY),
                        (&(claim.max_jobs as i32), Type::INT4),
                        (&(claim.run_length as i32), Type::INT4),
                        (&lanes, Type::INT2_ARRAY),
                        (&marks, Type::INT8_ARRAY),
                        (&(claim.longest_run as i32), Type::INT4),
                        (&(claim.to_park as i32), Type::INT4),
                        (&MAX_INLINE, Type::INT4),
                    ],
                )
                .await
            })
            .await?;
        Ok(Claimed::read(&rows, claim))
    }

    /// The payload of a job that runs under this token; none if it does not any more.
    pub async fn running_payload(&self, id: i64, token: i64) -> Result<Option<Box<str>>> {
        let params: [(&(dyn ToSql + Sync), Type); 2] = [(&id, Type::INT8), (&token, Type::INT8)];
        let rows = self.call(async |c, q| c.query_typed(&q.running_payload, &params).await).await?;
        Ok(rows.first().and_then(|row| rows::json(row, 0)).map(Box::from))
    }

    /// Record how attempts ended. Returns the places of those that were refused, among the jobs of all runs:
    /// their lease was lost.
    pub async fn settle(&self, ended: &[EndedRun]) -> Result<Vec<usize>> {
        let columns = rows::Columns::of(ended);
        let refused: Vec<i64> =
            self.call(async |c, q| Ok(c.query_typed(&q.settle, &columns.params()).await?[0].get(0))).await?;
        Ok(refused.into_iter().map(|place| place as usize - 1).collect())
    }

    /// Move due jobs into the line: how many, and how long until the next one is due.
    pub async fn promote(&self, max_jobs: i32) -> Result<(i32, Option<Duration>)> {
        self.call(async |c, q| {
            let row = c.query_typed(&q.promote, &[(&max_jobs, Type::INT4)]).await?;
            let due: Option<f64> = row[0].get(1);
            Ok((row[0].get(0), due.map(|ms| Duration::from_secs_f64(ms.clamp(0.0, 1e12) / 1000.0))))
        })
        .await
    }

    /// Move the id below which no insert can appear any more, past which cursors' mailboxes are read, and the
    /// floors from which the line is read.
    pub async fn move_horizon(&self, last: &Horizon) -> Result<Horizon> {
        self.call(async |c, q| {
            let params: [(&(dyn ToSql + Sync), Type); 3] =
                [(&last.seen, Type::INT8), (&last.line_end, Type::INT8), (&last.writers, Type::TEXT_ARRAY)];
            let row = c.query_typed(&q.move_horizon, &params).await?;
            Ok(Horizon { seen: row[0].get(0), line_end: row[0].get(1), writers: row[0].get(2) })
        })
        .await
    }

    /// Make partitions ahead and drop old ones. Returns the days ahead that exist; none if another
    /// node is at it.
    pub async fn tend_history(&self, keep_days: i32) -> Result<Option<i32>> {
        self.call(async |c, q| Ok(c.query_typed(&q.tend_history, &[(&keep_days, Type::INT4)]).await?[0].get(0))).await
    }

    /// Cancel a live job: `cancelled`, `requested` if it runs, none if no such job lives.
    pub async fn cancel(&self, id: i64) -> Result<Option<String>> {
        self.call(async |c, q| Ok(c.query_typed(&q.cancel, &[(&id, Type::INT8)]).await?[0].get(0))).await
    }
}
