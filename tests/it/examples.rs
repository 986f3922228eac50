//! The examples run, and print what they say.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::empty_database;

/// Start an example on an empty database, read its first line, and stop it.
async fn first_line(name: &str) -> (String, i32) {
    // Cargo puts examples beside the directory of test programs.
    let deps = std::env::current_exe().unwrap();
    let program: PathBuf = deps.parent().unwrap().parent().unwrap().join("examples").join(name);
    let mut command = std::process::Command::new(program);
    command.env("DATABASE_URL", empty_database().await).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::task::spawn_blocking(move || lines.next().unwrap().unwrap()).await.unwrap();
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::TERM).unwrap();
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    (line, status.code().unwrap())
}

#[actix::test]
async fn minimal() {
    assert_eq!(first_line("minimal").await, ("to a@b.c".to_owned(), 0));
}

#[actix::test]
async fn actor() {
    assert_eq!(first_line("actor").await, ("hello world, my number 1".to_owned(), 0));
}
