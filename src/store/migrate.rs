//! Bringing a database's schema to this program's version.
//!
//! Steps are numbered and go forward only; functions are applied whole whenever their text differs.
//! One advisory lock makes it safe for many nodes to start at once.

use tokio_postgres::Client;

use super::queries::quote;
use crate::error::{Error, Result};

macro_rules! files {
    ($($path:literal),* $(,)?) => { &[$(include_str!(concat!("../../migrations/", $path))),*] };
}

/// The steps; a database at version n has the first n.
const STEPS: &[&str] = files!("0001_tables.sql");

/// The protocol, re-applied whole.
const FUNCTIONS: &[&str] = files!(
    "functions/01_wake.sql",
    "functions/02_enqueue.sql",
    "functions/03_claim.sql",
    "functions/04_cursors.sql",
    "functions/05_settle.sql",
    "functions/06_lease.sql",
    "functions/07_operate.sql",
    "functions/08_verify.sql",
    "functions/09_pins.sql",
    "functions/10_views.sql",
);

/// The newest schema version that this program knows.
pub const VERSION: i32 = STEPS.len() as i32;

/// What a migration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// The version before; 0 if there was no schema.
    pub from: i32,
    /// The version now.
    pub to: i32,
}

/// The whole schema as a script for psql.
pub fn script(schema: &str) -> String {
    let mut text = format!("begin;\ncreate schema if not exists {};\n{}", quote(schema), enter(schema));
    for part in STEPS.iter().chain(FUNCTIONS) {
        text += part;
        text.push('\n');
    }
    text + META + &record() + "commit;\n"
}

const META: &str = "\
create table if not exists meta (version int not null, functions text not null, migrated_at timestamptz not null);\n";

/// Steps and functions name everything unqualified; the session's search path places it.
fn enter(schema: &str) -> String {
    format!("set local search_path = {}, pg_temp;\nset local check_function_bodies = off;\n", quote(schema))
}

/// A fingerprint of the functions' text, kept in the database (FNV-1a, 64 bits).
fn fingerprint() -> String {
    let hash = FUNCTIONS
        .iter()
        .flat_map(|text| text.bytes())
        .fold(0xcbf29ce484222325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3));
    format!("{hash:016x}")
}

fn record() -> String {
    format!("delete from meta;\ninsert into meta values ({VERSION}, '{}', now());\n", fingerprint())
}

/// What a schema's `meta` says; none if there is no such schema or table.
pub async fn version(client: &Client, schema: &str) -> Result<Option<(i32, String)>> {
    let there = client
        .query_typed(
            "select to_regclass($1) is not null",
            &[(&format!("{}.meta", quote(schema)), tokio_postgres::types::Type::TEXT)],
        )
        .await?[0]
        .get::<_, bool>(0);
    if !there {
        return Ok(None);
    }
    let rows = client.query_typed(&format!("select version, functions from {}.meta", quote(schema)), &[]).await?;
    Ok(rows.first().map(|row| (row.get(0), row.get(1))))
}

/// Refuse a schema that this program cannot work with: newer than it knows, or older than the one before.
pub fn check(schema: &str, found: Option<(i32, String)>) -> Result<()> {
    match found {
        Some((version, _)) if version > VERSION => {
            Err(Error::SchemaNewer { schema: schema.into(), found: version, known: VERSION })
        }
        Some((version, _)) if version >= (VERSION - 1).max(1) => Ok(()),
        _ => Err(Error::SchemaMissing(schema.into())),
    }
}

/// Create or upgrade the schema. Does nothing to one that is up to date.
pub async fn migrate(client: &mut Client, schema: &str) -> Result<Migrated> {
    let tx = client.transaction().await?;
    tx.query_typed(
        "select pg_advisory_xact_lock(hashtext('pgcue.' || $1), 65)",
        &[(&schema, tokio_postgres::types::Type::TEXT)],
    )
    .await?;
    let found = version(tx.client(), schema).await?;
    let from = found.as_ref().map_or(0, |(version, _)| *version);
    if from > VERSION {
        check(schema, found)?;
    } else if found != Some((VERSION, fingerprint())) {
        let mut script = format!("create schema if not exists {};\n{}{META}", quote(schema), enter(schema));
        for part in STEPS[from as usize..].iter().chain(FUNCTIONS) {
            script += part;
            script.push('\n');
        }
        tx.batch_execute(&(script + &record())).await?;
        tx.query_typed(&format!("select {}.tend_history(0)", quote(schema)), &[]).await?;
    }
    tx.commit().await?;
    Ok(Migrated { from, to: VERSION })
}
