//! `pgcue dev`: everything in one command, for trying things out.

use std::path::PathBuf;

use clap::Args;

use super::Common;
use crate::config::Config;
use crate::dev::{PrivateServer, Ready};
use crate::error::{Error, Result};
use crate::node::{Node, stop_signal};

#[derive(Args)]
pub(super) struct Dev {
    /// Keep the data here [default: ~/.local/share/pgcue, as root /var/lib/pgcue]
    #[arg(long, value_name = "DIR", conflicts_with = "ephemeral")]
    data_dir: Option<PathBuf>,
    /// Keep nothing
    #[arg(long)]
    ephemeral: bool,
    /// Serve /metrics, /healthz and /readyz here
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9187")]
    http: String,
    /// When ready, write {"database_url": .., "http": ..} here
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Serve this queue too (repeatable)
    #[arg(long, value_name = "NAME")]
    queue: Vec<String>,
}

impl Dev {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let home = match self.ephemeral {
            true => None,
            false => Some(self.data_dir.clone().map_or_else(default_home, Ok)?),
        };
        let mut flags = vec![("http".to_owned(), self.http.clone()), ("demo".into(), "true".into())];
        for queue in ["default".to_owned()].iter().chain(&self.queue) {
            flags.push((format!("queues.{queue}.slots"), "16".into()));
        }
        // Only the schema of the common options: the database is our own.
        let config = Common { database_url: None, schema: common.schema.clone() }.config(None, flags)?;
        super::log::start(&config, std::io::stderr);
        eprintln!(
            "starting a private PostgreSQL ({})",
            home.as_ref().map_or("nothing is kept".into(), |h| h.display().to_string())
        );
        let server = PrivateServer::start(home.as_deref(), &[])?;
        let config = Config { database_url: Some(server.url("postgres")), ..config };
        let database_url = config.database_url()?.to_owned();
        let running = Node::new(config).await?.start().await?;
        let http = running.http().map(|address| format!("http://{address}")).unwrap_or_default();
        let ready = Ready { database_url: database_url.clone(), http: http.clone() };
        ready.write(&Ready::place())?;
        if let Some(file) = &self.ready_file {
            ready.write(file)?;
        }
        println!(
            "\npgcue is ready. In another terminal (this line lets psql and your programs find it):\n\
             \n    export DATABASE_URL={database_url}\n\
             \nEnqueue a job and look at it:\n\
             \n    pgcue enqueue echo '{{\"hello\":\"world\"}}'\n    pgcue jobs show 1 --json\n    pgcue status\n\
             \nAny language can enqueue:\n\
             \n    psql \"$DATABASE_URL\" -c \"insert into pgcue.jobs (kind, payload) values ('echo', '[1, 2]')\"\n\
             \nA cursor's jobs run one at a time, in order, and leave a state:\n\
             \n    for n in 1 2 3; do pgcue enqueue append \"{{\\\"n\\\": $n}}\" --cursor books; done\n    pgcue cursors show books\n\
             \nDemo kinds: noop, echo, sleep {{\"ms\":N}}, fail {{\"times\":N}}, panic, count {{\"n\":N}}, append {{\"n\":X}}.\n\
             Metrics: {http}/metrics. Ctrl-C stops everything.\n"
        );
        stop_signal().await;
        let drained = running.drain().await;
        let _ = std::fs::remove_file(Ready::place());
        drop(server);
        drained
    }
}

fn default_home() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/pgcue".into()); // root's own home is closed to the server's user
    }
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    set("XDG_DATA_HOME")
        .or_else(|| Some(set("HOME")?.join(".local/share")))
        .map(|dir| dir.join("pgcue"))
        .ok_or_else(|| Error::Setup("HOME is not set; give --data-dir or --ephemeral".into()))
}
