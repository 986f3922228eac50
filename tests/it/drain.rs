//! SIGTERM: a node drains, and its exit code tells whether all jobs had finished.

use std::time::Duration;

use pgcue::NewJob;

use crate::support::{NodeProcess, database};

#[actix::test]
async fn sigterm_drains_and_the_exit_code_tells() {
    let db = database().await;
    let sleep = |ms: u64| db.client.enqueue(NewJob::new("sleep", format!("{{\"ms\":{ms}}}")));
    // Claimed is not yet started, and nobody shows that: so a moment more.
    let started = async |id| {
        db.reaches(id, "running").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let node = NodeProcess::start(&db, &[]);
    let id = sleep(1500).await.unwrap().id;
    started(id).await;
    assert_eq!(node.stop().await.code(), Some(0));
    assert_eq!(db.job(id).await.state, "completed");

    let node = NodeProcess::start(&db, &[("PGCUE_GRACE", "100ms")]);
    let id = sleep(60_000).await.unwrap().id;
    started(id).await;
    assert_eq!(node.stop().await.code(), Some(1));
    let job = db.job(id).await;
    assert_eq!((job.state.as_str(), job.attempt), ("ready", 0));
}
