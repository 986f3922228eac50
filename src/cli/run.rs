//! `pgcue run`: a node.

use std::path::PathBuf;

use clap::Args;

use super::Common;
use crate::error::Result;
use crate::node::Node;

#[derive(Args)]
pub(super) struct Run {
    /// A TOML file; the environment (PGCUE_*) and flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say whether the configuration is valid, and stop
    #[arg(long)]
    check_config: bool,
    /// Serve this queue (repeatable)
    #[arg(long, value_name = "NAME")]
    queue: Vec<String>,
    /// How many jobs of each --queue run at once
    #[arg(long, value_name = "N", requires = "queue")]
    slots: Option<String>,
    /// Serve /metrics, /healthz and /readyz here
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Poll instead of listening for notifications
    #[arg(long)]
    poll_only: bool,
    /// Handle the demo kinds
    #[arg(long)]
    demo: bool,
}

impl Run {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let mut flags = Vec::new();
        for queue in &self.queue {
            flags.push((format!("queues.{queue}.slots"), self.slots.clone().unwrap_or_else(|| "16".into())));
        }
        flags.extend(self.http.map(|http| ("http".to_owned(), http)));
        flags.extend(self.demo.then(|| ("demo".to_owned(), "true".to_owned())));
        flags.extend(self.poll_only.then(|| ("listen".to_owned(), "false".to_owned())));
        let config = common.config(self.config.as_ref(), flags)?;
        if self.check_config {
            config.database_url()?;
            println!("the configuration is valid");
            return Ok(());
        }
        super::log::start(&config, std::io::stderr);
        Node::new(config).await?.run().await
    }
}
