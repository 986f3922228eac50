//! The bare limit: the same as plain SQL. Of a burn-down it is the same rows, the same indexes, the same two
//! transactions a batch, as a loop on the server.

use std::ops::AsyncFn;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::load::Rows;
use super::place::Place;
use crate::error::{Error, Result};

/// As pgcue's own plans are pinned: rows by index or ctid, in nested loops.
const PINS: &str = "set enable_seqscan = off; set enable_bitmapscan = off; set enable_sort = off; \
    set enable_hashjoin = off; set enable_mergejoin = off; set enable_material = off; set jit = off; \
    set plan_cache_mode = force_generic_plan";

/// Columns that `bare_jobs` and `bare_history` have in common, in order.
const COLUMNS: &str = "select string_agg(quote_ident(j.attname), ', ' order by j.attnum) from pg_attribute j \
    join pg_attribute h on h.attname = j.attname and h.attrelid = 'bare_history'::regclass and not h.attisdropped \
    where j.attrelid = 'bare_jobs'::regclass and j.attnum > 0 and not j.attisdropped";

/// Rounds in a fresh schema each, with the bare limit and what it is to the round's speed.
pub(super) async fn beside(
    place: &Place,
    rounds: u32,
    bare: impl AsyncFn() -> Result<Map<String, Value>>,
    round: impl AsyncFn() -> Result<Map<String, Value>>,
) -> Result<Vec<Map<String, Value>>> {
    let mut all = Vec::new();
    for n in 1..=rounds {
        eprintln!("round {n} of {rounds}");
        place.fresh().await?;
        // Whoever goes first finds a server that has rested.
        let (bare, mut round) = if n % 2 == 1 {
            let bare = bare().await?;
            (bare, round().await?)
        } else {
            let round = round().await?;
            (bare().await?, round)
        };
        let ratio = round["jobs_per_second"].as_f64().zip(bare["bare_jobs_per_second"].as_f64()).map(|(r, b)| r / b);
        round.extend(bare);
        round.insert("ratio".into(), json!(ratio));
        all.push(round);
    }
    Ok(all)
}

/// Load so many jobs into a table of its own, and work them off. Returns jobs a second and bytes of WAL a job.
pub(super) async fn burn_down(place: &Place, jobs: i64, batch: u32, payload: u32) -> Result<(f64, f64)> {
    tables(place).await?;
    Rows { table: "bare_jobs", kind: "noop", count: jobs, cursors: 0, payload }.load(place).await?;
    place.sql.batch_execute("analyze bare_jobs").await?;
    let columns: String = place.sql.query_typed(COLUMNS, &[]).await?[0].get(0);
    let gone = "delete from bare_jobs j using unnest(tids) t(tid) where j.ctid = t.tid";
    let finish = match place.history {
        true => format!(
            "with gone as ({gone} returning j.*) insert into bare_history ({columns}, state, finished_at) \
             select {columns}, 'completed', clock_timestamp() from gone"
        ),
        false => gone.to_owned(),
    };
    let text = include_str!("bare.sql").replace(":batch", &batch.to_string()).replace(":finish", &finish);
    let session = place.session().await?;
    session.batch_execute(PINS).await?;
    let wal = place.wal().await?;
    let begin = Instant::now();
    session.batch_execute(&text).await?;
    let seconds = begin.elapsed().as_secs_f64();
    let wal = place.wal().await? - wal;
    let left: i64 = place.sql.query_typed("select count(*) from bare_jobs", &[]).await?[0].get(0);
    if left > 0 {
        return Err(Error::Setup(format!("the bare loop left {left} of {jobs} jobs; this is a bug of pgcue")));
    }
    place.sql.batch_execute("drop table bare_jobs, bare_history").await?;
    Ok((jobs as f64 / seconds, wal as f64 / jobs as f64))
}

/// The tables `bare_jobs` and `bare_history`: pgcue's columns, defaults and indexes, and no triggers.
pub(super) async fn tables(place: &Place) -> Result<()> {
    let options = "select array_to_string(reloptions, ', ') from pg_class where oid = 'jobs'::regclass";
    let options: Option<String> = place.sql.query_typed(options, &[]).await?[0].get(0);
    let with = options.map(|options| format!("with ({options})")).unwrap_or_default();
    let create = format!(
        "create table bare_jobs (like jobs including all) {with}; \
         create table bare_history (like finished_jobs including all)"
    );
    Ok(place.sql.batch_execute(&create).await?)
}
