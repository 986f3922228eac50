//! `pgcue status`: queues, nodes and what finished lately.

use clap::Args;
use serde::Serialize;

use super::{Common, print_json, print_table};
use crate::error::Result;
use crate::store::{LiveCount, NodeRow};

#[derive(Args)]
pub(super) struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    live: Vec<LiveCount>,
    finished_last_hour: Vec<Finished>,
    nodes: Vec<NodeRow>,
}

#[derive(Serialize)]
struct Finished {
    queue: String,
    state: String,
    jobs: i64,
}

impl Status {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let store = common.checked_client().await?.store().clone();
        let finished = store.finished().await?.into_iter().map(|(queue, state, jobs)| Finished { queue, state, jobs });
        let report =
            Report { live: store.counts().await?, finished_last_hour: finished.collect(), nodes: store.nodes().await? };
        if self.json {
            return print_json(&report);
        }
        let live = |c: &LiveCount| {
            vec![c.queue.clone(), c.state.clone(), c.jobs.to_string(), format!("{:.1} s", c.oldest_seconds)]
        };
        println!("Live jobs");
        print_table(&["QUEUE", "STATE", "JOBS", "OLDEST"], &report.live.iter().map(live).collect::<Vec<_>>());
        let finished = |f: &Finished| vec![f.queue.clone(), f.state.clone(), f.jobs.to_string()];
        println!("\nFinished within the last hour");
        print_table(&["QUEUE", "STATE", "JOBS"], &report.finished_last_hour.iter().map(finished).collect::<Vec<_>>());
        let node = |n: &NodeRow| {
            let alive = if n.alive { "alive" } else { "dead" };
            vec![n.node.clone(), alive.into(), n.claimed.to_string(), n.seen_at.strftime("%F %T UTC").to_string()]
        };
        println!("\nNodes");
        print_table(&["NODE", "LEASE", "JOBS", "SEEN"], &report.nodes.iter().map(node).collect::<Vec<_>>());
        Ok(())
    }
}
