//! The smallest complete program: it migrates, enqueues, runs and drains.
//!
//! `DATABASE_URL=postgres://.. cargo run --example minimal`

use pgcue::{Job, JobResult, Node, Outcome, Task};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct SendEmail {
    to: String,
}
impl Task for SendEmail {
    const KIND: &'static str = "send_email";
}

async fn send_email(job: Job<SendEmail>) -> JobResult {
    println!("to {}", job.args.to);
    Ok(Outcome::Complete)
}

#[actix::main]
async fn main() -> pgcue::Result<()> {
    let node = Node::from_env().await?.handle_fn(send_email);
    node.client().enqueue(SendEmail { to: "a@b.c".into() }).await?;
    node.run().await
}
