//! The jobs of a bench, and what stands beside them.

use std::io::IsTerminal;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio_postgres::types::{ToSql, Type};

use super::place::Place;
use crate::error::Result;

/// So many rows an INSERT.
const CHUNK: i64 = 20_000;

/// Jobs that are in the tables beside the measured ones.
#[derive(Args, Serialize)]
pub(super) struct Backdrop {
    /// So many more ready jobs stand in the line, in the same lane
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    pub(super) backlog: i64,
    /// So many jobs are parked behind halted cursors, a hundred each
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    blocked: i64,
    /// So many jobs are due in an hour
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    scheduled: i64,
}

/// What the measured jobs are like.
#[derive(Args, Serialize)]
pub(super) struct Shape {
    /// Jobs of so many cursors, in turn; 0: of none
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..))]
    pub(super) cursors: i64,
    /// Each job rewrites its cursor's state, of so many bytes
    #[arg(long, value_name = "BYTES", default_value_t = 0, requires = "cursors",
        value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(super) state: u32,
}

impl Shape {
    /// The kind that does it.
    pub(super) fn kind(&self, stamps: bool) -> &'static str {
        match (self.state > 0 && self.cursors > 0, stamps) {
            (true, true) => "state_stamp",
            (true, false) => "state",
            (false, true) => "stamp",
            (false, false) => "noop",
        }
    }
}

/// Rows for `jobs`, or for a table of its shape.
pub(super) struct Rows<'a> {
    pub(super) table: &'a str,
    pub(super) kind: &'a str,
    pub(super) count: i64,
    pub(super) cursors: i64,
    pub(super) payload: u32,
}

impl Rows<'_> {
    pub(super) async fn load(&self, place: &Place) -> Result<()> {
        let statement = include_str!("fill.sql").replace(":table", self.table);
        let bar = bar(self.count as u64, "loading");
        for first in (1..=self.count).step_by(CHUNK as usize) {
            let last = self.count.min(first + CHUNK - 1);
            let payload = self.payload as i32;
            let params: [(&(dyn ToSql + Sync), Type); 5] = [
                (&self.kind, Type::TEXT),
                (&first, Type::INT8),
                (&last, Type::INT8),
                (&self.cursors, Type::INT8),
                (&payload, Type::INT4),
            ];
            place.sql.query_typed(&statement, &params).await?;
            bar.set_position(last as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }
}

impl Backdrop {
    /// Load it. The backlog is of a kind that the nodes handle and do not count, or of one that they do not handle.
    pub(super) async fn load(&self, place: &Place, backlog: &str) -> Result<()> {
        Rows { table: "jobs", kind: backlog, count: self.backlog, cursors: 0, payload: 2 }.load(place).await?;
        let cursors = (self.blocked / 100).max(1);
        if self.blocked > 0 {
            place.sql.query_typed(include_str!("halted.sql"), &[(&cursors, Type::INT8)]).await?;
            let blocked = "insert into jobs (kind, cursor_key, stage) \
                select 'backlog', 'halted ' || n % $1, 'blocked' from generate_series(1, $2) n";
            place.sql.query_typed(blocked, &[(&cursors, Type::INT8), (&self.blocked, Type::INT8)]).await?;
        }
        let scheduled = "insert into jobs (kind, run_at) \
            select 'backlog', now() + interval '1 hour' from generate_series(1, $1)";
        if self.scheduled > 0 {
            place.sql.query_typed(scheduled, &[(&self.scheduled, Type::INT8)]).await?;
        }
        Ok(())
    }
}

/// A progress bar, on a terminal.
pub(super) fn bar(length: u64, what: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(length) } else { ProgressBar::hidden() };
    let style = "{msg:12} {human_pos}/{human_len} {wide_bar} {per_sec} {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("the template is valid"));
    bar.set_message(what.to_owned());
    bar
}
