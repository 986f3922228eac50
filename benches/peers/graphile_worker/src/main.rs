//! graphile_worker (the Rust crate). See ../run.py for what the three commands have to do.
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use graphile_worker::{IntoTaskHandlerResult, JobSpec, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions};
use serde::{Deserialize, Serialize};

static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);
static LATENCIES: Mutex<Vec<i64>> = Mutex::new(Vec::new());

#[derive(Serialize, Deserialize)]
struct Noop {
    n: i64,
}
impl TaskHandler for Noop {
    const IDENTIFIER: &'static str = "noop";
    async fn run(self, _: WorkerContext) -> impl IntoTaskHandlerResult {
        if LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
            say("handled");
        }
        Ok::<(), String>(())
    }
}

#[derive(Serialize, Deserialize)]
struct Stamp {
    us: i64,
}
impl TaskHandler for Stamp {
    const IDENTIFIER: &'static str = "stamp";
    async fn run(self, _: WorkerContext) -> impl IntoTaskHandlerResult {
        LATENCIES.lock().unwrap().push(now() - self.us);
        Ok::<(), String>(())
    }
}

fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as i64
}

fn say(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

async fn hear() {
    let read = || std::io::stdin().lock().read_line(&mut String::new()).unwrap();
    tokio::task::spawn_blocking(read).await.unwrap();
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize| args[i].parse::<i64>().unwrap();
    let pool = sqlx::postgres::PgPoolOptions::new()
        .min_connections(10)
        .max_connections(20)
        .connect(&std::env::var("DATABASE_URL").unwrap())
        .await
        .unwrap();
    let options = WorkerOptions::default()
        .schema("graphile_worker")
        .define_job::<Noop>()
        .define_job::<Stamp>()
        .pg_pool(pool.clone());
    match args[1].as_str() {
        "burn" => {
            // Its guide's local queue and batched completion. Tried: local queues of 500, 2,000 (a little slower)
            // and 4 of 2,000; 24, 100 and 200 at once; batches after 0 and 5 ms. A refetch delay matters only
            // when the queue is empty.
            let worker = options
                .concurrency(setting("CONCURRENCY", 48))
                .local_queue(LocalQueueConfig::default().with_size(setting("LOCAL", 5000)))
                .complete_job_batch_delay(Duration::from_millis(setting("BATCH_MS", 1) as u64))
                .init()
                .await
                .unwrap();
            LEFT.store(number(2) as usize, Ordering::Relaxed);
            // The bulk call of its SQL interface, fed on the server.
            sqlx::query(
                "select count(*) from graphile_worker.add_jobs(array(select json_populate_record(
                 null::graphile_worker.job_spec, json_build_object('identifier', 'noop', 'payload',
                 json_build_object('n', n))) from generate_series(1, $1) n))",
            )
            .bind(number(2))
            .execute(&pool)
            .await
            .unwrap();
            say("ready");
            hear().await;
            tokio::spawn(async move { worker.run().await.unwrap() });
            hear().await;
        }
        "work" => {
            // No local queue and no batching: both trade latency for throughput.
            let worker = options.concurrency(setting("CONCURRENCY", 4)).init().await.unwrap();
            tokio::spawn(async move { worker.run().await.unwrap() });
            tokio::time::sleep(Duration::from_secs(1)).await;
            say("ready");
            while LATENCIES.lock().unwrap().len() < number(2) as usize {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            say(&format!("{:?}", LATENCIES.lock().unwrap()));
        }
        "send" => {
            // Each at its time, whether the ones before were answered or not.
            let utils = Arc::new(options.init().await.unwrap().create_utils());
            let mut sent = tokio::task::JoinSet::new();
            let mut tick = tokio::time::interval(Duration::from_micros((1_000_000 / number(2)) as u64));
            for _ in 0..number(2) * number(3) {
                tick.tick().await;
                let utils = utils.clone();
                sent.spawn(async move { utils.add_job(Stamp { us: now() }, JobSpec::default()).await.unwrap() });
            }
            sent.join_all().await;
        }
        other => panic!("{other}?"),
    }
    std::process::exit(0); // without waiting for a shutdown that is not measured
}
