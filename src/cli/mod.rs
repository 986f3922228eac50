//! The command line. One file a subcommand; this one parses, finds the database and prints errors.

mod bench;
mod cursors;
mod dev;
mod enqueue;
mod jobs;
mod log;
mod run;
mod status;
mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde_json::value::RawValue;

use crate::client::Client;
use crate::config::Config;
use crate::dev::Ready;
use crate::error::{Error, Result};
use crate::store::{Store, Target};

/// A PostgreSQL job queue with durable cursors.
#[derive(Parser)]
#[command(name = "pgcue", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// Options of every subcommand.
#[derive(Args, Clone)]
struct Common {
    /// The database [env: PGCUE_DATABASE_URL or DATABASE_URL; else that of a running `pgcue dev`]
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// The schema that holds pgcue's tables [env: PGCUE_SCHEMA; default: pgcue]
    #[arg(long, global = true, value_name = "NAME")]
    schema: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Try pgcue: a private PostgreSQL, a node with the demo kinds, and what to do next
    Dev(dev::Dev),
    /// Run a node
    Run(run::Run),
    /// Create or upgrade the schema
    Migrate,
    /// Print the schema as a script for psql
    Schema,
    /// Enqueue jobs
    Enqueue(Box<enqueue::Enqueue>),
    /// Look at jobs
    Jobs(jobs::Jobs),
    /// Look at cursors, and mend what holds them up
    Cursors(cursors::Cursors),
    /// Say in one sentence why a job is not running
    Why {
        /// Its id
        job: i64,
    },
    /// Queues, nodes and what finished lately
    Status(status::Status),
    /// Measure what pgcue does on this machine, beside the bare limit of the database
    Bench(Box<bench::Bench>),
    /// Look for broken promises in the tables, and repair them
    Verify(verify::Verify),
}

impl Common {
    fn flags(&self) -> Vec<(String, String)> {
        let flag = |key: &str, value: &Option<String>| value.clone().map(|value| (key.to_owned(), value));
        [flag("database_url", &self.database_url), flag("schema", &self.schema)].into_iter().flatten().collect()
    }

    /// File, environment and flags, with the fallbacks for the database.
    fn config(&self, file: Option<&PathBuf>, mut flags: Vec<(String, String)>) -> Result<Config> {
        flags.extend(self.flags());
        let mut config = Config::load(file.map(PathBuf::as_path), std::env::vars(), flags)?;
        config.database_url = config.database_url.or_else(|| std::env::var("DATABASE_URL").ok());
        Ok(config)
    }

    /// For commands that look or enqueue: also the database of a running `pgcue dev`.
    fn client(&self) -> Result<Client> {
        let mut config = self.config(None, Vec::new())?;
        config.database_url = config.database_url.or_else(|| Ready::read().map(|ready| ready.database_url));
        let target = Target::parse(config.database_url()?)?;
        Ok(Client::new(Store::new(target, &config.schema, 2), config.max_payload))
    }

    /// The same, with a schema that this program can work with.
    async fn checked_client(&self) -> Result<Client> {
        let client = self.client()?;
        client.store().check_schema().await?;
        Ok(client)
    }
}

/// Parse, run, and turn errors into exit codes: 0 done, 1 failed, 64 usage or configuration.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { 64.into() } else { 0.into() };
        }
    };
    match actix_rt::System::new().block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("pgcue: {line}");
            }
            error.exit_code().into()
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let common = cli.common;
    match cli.command {
        Command::Dev(dev) => dev.run(&common).await,
        Command::Run(run) => run.run(&common).await,
        Command::Migrate => {
            let store = common.client()?.store().clone();
            let done = store.migrate().await?;
            println!("schema {} is at version {} (was {})", store.schema(), done.to, done.from);
            Ok(())
        }
        Command::Schema => {
            print!("{}", crate::store::script(&common.config(None, Vec::new())?.schema));
            Ok(())
        }
        Command::Enqueue(enqueue) => enqueue.run(&common).await,
        Command::Jobs(jobs) => jobs.run(&common).await,
        Command::Cursors(cursors) => cursors.run(&common).await,
        Command::Why { job } => {
            println!("{}", common.checked_client().await?.store().why(job).await?);
            Ok(())
        }
        Command::Status(status) => status.run(&common).await,
        Command::Bench(bench) => bench.run(&common).await,
        Command::Verify(verify) => verify.run(&common).await,
    }
}

/// Print a value as indented JSON.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Print the fields of a value that are set, a line each.
fn print_fields(value: &impl serde::Serialize) -> Result<()> {
    // Payloads stay the texts they are: not every JSON text has a value.
    let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&serde_json::to_string(value)?)?;
    for (name, value) in fields.iter().filter(|(_, value)| value.get() != "null") {
        println!("{name:16} {}", serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned()));
    }
    Ok(())
}

/// Print rows in columns as wide as their contents, under headings. What would move a terminal's cursor is
/// a space.
fn print_table(headings: &[&str], rows: &[Vec<String>]) {
    let plain = |cell: &String| cell.replace(char::is_control, " ");
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(plain).collect()).collect();
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells: Vec<String> = cells.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    };
    line(headings.to_vec());
    rows.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}

/// Why a value was refused, as clap wants it.
fn text<T: std::str::FromStr<Err: std::fmt::Display>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|e: T::Err| e.to_string())
}

impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        Error::io("standard input or output", source)
    }
}
