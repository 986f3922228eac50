//! `pgcue jobs`: look at jobs.

use clap::{Args, Subcommand};

use super::{Common, print_json, print_table};
use crate::error::{Error, Result, shorten};
use crate::store::{Filter, JobRow};

#[derive(Args)]
pub(super) struct Jobs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Jobs, newest first
    List {
        /// Only of this queue
        #[arg(long, value_name = "NAME")]
        queue: Option<String>,
        /// Only of this kind
        #[arg(long, value_name = "KIND")]
        kind: Option<String>,
        /// Only in this state
        #[arg(long, value_name = "STATE", value_parser = ["scheduled", "ready", "blocked", "running", "completed", "failed", "cancelled", "lost"])]
        state: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// One job with all that is known of it
    Show {
        /// Its id
        id: i64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Jobs {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let store = common.checked_client().await?.store().clone();
        match self.verb {
            Verb::List { queue, kind, state, limit, json } => {
                let jobs = store.jobs(&Filter { queue, kind, state, limit }).await?;
                if json {
                    return print_json(&jobs);
                }
                let cell = |job: &JobRow| {
                    let payload = job.payload.as_ref().map_or("", |p| p.get());
                    vec![
                        job.id.to_string(),
                        job.state.clone(),
                        shorten(&job.queue, 40),
                        shorten(&job.kind, 40),
                        format!("{}/{}", job.attempt, job.max_attempts),
                        shorten(job.cursor_key.as_deref().unwrap_or_default(), 40),
                        shorten(payload, 60),
                    ]
                };
                let rows: Vec<_> = jobs.iter().map(cell).collect();
                print_table(&["ID", "STATE", "QUEUE", "KIND", "ATTEMPT", "CURSOR", "PAYLOAD"], &rows);
                Ok(())
            }
            Verb::Show { id, json } => {
                let job = store.job(id).await?;
                let job =
                    job.ok_or_else(|| Error::Setup(format!("there is no job {id} in schema {}", store.schema())))?;
                if json {
                    return print_json(&job);
                }
                super::print_fields(&job)
            }
        }
    }
}
