//! SIGTERM: a node drains, and its exit code tells whether all jobs had finished.

use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use pgcue::NewJob;
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::pgcue;
use crate::support::database;

/// SIGTERM, and wait for the end.
async fn stop(mut child: Child) -> ExitStatus {
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
}

#[actix::test]
async fn sigterm_drains_and_the_exit_code_tells() {
    let db = database().await;
    let sleep = |ms: u64| db.client.enqueue(NewJob::new("sleep", format!("{{\"ms\":{ms}}}")));
    // Claimed is not yet started, and nobody shows that: so a moment more.
    let started = async |id| {
        db.reaches(id, "running").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let mut command = pgcue(&db.url);
    let child = command.args(["run", "--demo"]).stderr(Stdio::null()).spawn().unwrap();
    let id = sleep(1500).await.unwrap().id;
    started(id).await;
    assert_eq!(stop(child).await.code(), Some(0));
    assert_eq!(db.job(id).await.state, "completed");

    let mut command = pgcue(&db.url);
    let child = command.env("PGCUE_GRACE", "100ms").args(["run", "--demo"]).stderr(Stdio::null()).spawn().unwrap();
    let id = sleep(60_000).await.unwrap().id;
    started(id).await;
    assert_eq!(stop(child).await.code(), Some(1));
    let job = db.job(id).await;
    assert_eq!((job.state.as_str(), job.attempt), ("ready", 0));
}
