//! `pgcue cursors`: look at cursors, and mend what holds them up.

use clap::{Args, Subcommand};

use super::{Common, print_json, print_table};
use crate::error::{Error, Fault, Result, shorten};
use crate::store::{CursorFilter, CursorRow, CursorVerb};

#[derive(Args)]
pub(super) struct Cursors {
    /// The cursors of this queue
    #[arg(long, global = true, value_name = "NAME", default_value = "default")]
    queue: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Cursors, those with the most waiting jobs first
    List {
        /// Only in this status
        #[arg(long, value_name = "STATUS", value_parser = ["idle", "owned", "held", "halted"])]
        status: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// One cursor with all that is known of it
    Show {
        /// Its key
        key: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take it away from the node that owns it: the running jobs go back, uncounted
    Release {
        /// Its key
        key: String,
    },
    /// Cancel the job that would run next
    Skip {
        /// Its key
        key: String,
    },
    /// Start no more of its jobs until it is resumed
    Halt {
        /// Its key
        key: String,
    },
    /// Let a halted cursor go on
    Resume {
        /// Its key
        key: String,
    },
    /// Replace its state
    SetState {
        /// Its key
        key: String,
        /// The new state, JSON; without, it has none
        state: Option<String>,
    },
    /// Forget it with its state; refused while jobs wait for it
    Delete {
        /// Its key
        key: String,
    },
}

impl Cursors {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let client = common.checked_client().await?;
        let (store, queue) = (client.store(), self.queue);
        let act = async |verb: CursorVerb, key: &str| store.cursor(verb, &queue, key).await;
        match self.verb {
            Verb::List { status, limit, json } => {
                list(store.cursors(&CursorFilter { queue, key: None, status, limit }).await?, json)
            }
            Verb::Show { key, json } => {
                let filter = CursorFilter { queue: queue.clone(), key: Some(key.clone()), status: None, limit: 1 };
                let cursor = store.cursors(&filter).await?.pop();
                show(cursor.ok_or_else(|| Error::Setup(format!("there is no cursor {key} in queue {queue}")))?, json)
            }
            Verb::Release { key } => {
                let jobs = act(CursorVerb::Release, &key).await?.unwrap_or_default();
                println!("cursor {key} is released; {jobs} jobs went back");
                Ok(())
            }
            Verb::Skip { key } => {
                match act(CursorVerb::Skip, &key).await? {
                    Some(job) => println!("job {job} of cursor {key} is cancelled"),
                    None => println!("no job of cursor {key} waits"),
                }
                Ok(())
            }
            Verb::Halt { key } => {
                act(CursorVerb::Halt, &key).await?;
                println!("cursor {key} is halted");
                Ok(())
            }
            Verb::Resume { key } => {
                act(CursorVerb::Resume, &key).await?;
                println!("cursor {key} goes on");
                Ok(())
            }
            Verb::SetState { key, state } => {
                if let Some(Err(error)) = state.as_deref().map(serde_json::from_str::<serde::de::IgnoredAny>) {
                    let state = state.unwrap_or_default();
                    return Err(Fault::new("state", state, format!("malformed JSON: {error}")).into());
                }
                let max = common.config(None, Vec::new())?.max_state;
                if let Some(size) = state.as_ref().map(String::len).filter(|size| *size > max) {
                    let fix = format!("the limit is {max} bytes (max_state)");
                    return Err(Fault::new("state", format!("{size} bytes long"), fix).into());
                }
                store.set_cursor_state(&queue, &key, state.as_deref()).await?;
                println!("the state of cursor {key} is set");
                Ok(())
            }
            Verb::Delete { key } => {
                act(CursorVerb::Delete, &key).await?;
                println!("cursor {key} is deleted");
                Ok(())
            }
        }
    }
}

fn list(cursors: Vec<CursorRow>, json: bool) -> Result<()> {
    if json {
        return print_json(&cursors);
    }
    let cells = |cursor: &CursorRow| {
        let since = cursor.waiting_since.map(|t| t.strftime("%F %T UTC").to_string());
        let state = cursor.state.as_ref().map_or("", |state| state.get());
        vec![
            shorten(&cursor.key, 40),
            cursor.status_text(),
            cursor.version.to_string(),
            cursor.waiting.to_string(),
            since.unwrap_or_default(),
            shorten(state, 40),
        ]
    };
    let rows: Vec<_> = cursors.iter().map(cells).collect();
    print_table(&["KEY", "STATUS", "VERSION", "WAITING", "SINCE", "STATE"], &rows);
    Ok(())
}

fn show(cursor: CursorRow, json: bool) -> Result<()> {
    if json {
        return print_json(&cursor);
    }
    super::print_fields(&cursor)
}
