//! A handler that is an actix actor: each slot has one, so it can keep what is costly to make.
//!
//! `DATABASE_URL=postgres://.. cargo run --example actor`

use actix::{Actor, Context, Handler};
use pgcue::{Job, JobResult, Node, Outcome, Task};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Greet {
    name: String,
}
impl Task for Greet {
    const KIND: &'static str = "greet";
}

struct Greeter {
    greeted: u32,
}
impl Actor for Greeter {
    type Context = Context<Self>;
}
impl Handler<Job<Greet>> for Greeter {
    type Result = JobResult;

    fn handle(&mut self, job: Job<Greet>, _: &mut Context<Self>) -> JobResult {
        self.greeted += 1;
        println!("hello {}, my number {}", job.args.name, self.greeted);
        Outcome::result(&self.greeted)
    }
}

#[actix::main]
async fn main() -> pgcue::Result<()> {
    let node = Node::from_env().await?.handle_actor::<Greet, _>(|| Greeter { greeted: 0 });
    node.client().enqueue(Greet { name: "world".into() }).await?;
    node.run().await
}
