//! `pgcue enqueue`: one job, or a file of them.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Common, text};
use crate::cursor::{Collapse, OnFailure, OnRetry};
use crate::error::{Error, Fault, Result};
use crate::job::{NewJob, parse};

#[derive(Args)]
pub(super) struct Enqueue {
    /// The kind of the job
    #[arg(required_unless_present = "file")]
    kind: Option<String>,
    /// Its payload, JSON; - reads it from standard input
    payload: Option<String>,
    /// Enqueue a file instead, a JSON object a line: {"kind": .., "payload": .., "queue": .., "priority": ..,
    /// "expected_at": .., "run_at": .., "delay": "5m", "max_attempts": .., "timeout": "30s", "cursor": ..,
    /// "on_retry": "pass", "on_failure": "halt", "headers": {..}}. All of it or nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kind", "payload"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// What can be said of a job; the same on the command line and in a file.
#[derive(Args, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    /// Only in a file: on the command line it is an argument.
    #[arg(skip)]
    kind: String,
    /// The same.
    #[arg(skip)]
    payload: Option<Box<RawValue>>,
    /// The queue
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,
    /// Greater goes first
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i16>,
    /// When the result is wanted; earlier goes first
    #[arg(long, value_name = "TIME", value_parser = text::<Timestamp>)]
    expected_at: Option<Timestamp>,
    /// Not before this time
    #[arg(long, value_name = "TIME", value_parser = text::<Timestamp>, conflicts_with = "delay")]
    run_at: Option<Timestamp>,
    /// Not before this much time has passed: 250ms, 30s, 5m, 1h 30m
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    delay: Option<String>,
    /// How many attempts it gets
    #[arg(long, value_name = "N")]
    max_attempts: Option<u16>,
    /// How long one attempt may take
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    timeout: Option<String>,
    /// The cursor: jobs of one cursor run one at a time, in order
    #[arg(long, value_name = "KEY")]
    cursor: Option<String>,
    /// What the jobs behind it in its cursor do while it waits for its next attempt
    #[arg(long, value_name = "WHAT")]
    on_retry: Option<OnRetry>,
    /// What its cursor does after it failed for good
    #[arg(long, value_name = "WHAT")]
    on_failure: Option<OnFailure>,
    /// Unless a job of this queue, kind and collapse key (by default the cursor) waits: then print that
    /// one's id, and keep, replace or merge its payload
    #[arg(long, value_name = "HOW")]
    collapse: Option<Collapse>,
    /// What to collapse on instead of the cursor
    #[arg(long, value_name = "KEY", requires = "collapse")]
    collapse_key: Option<String>,
    /// A JSON object that travels along
    #[arg(long, value_name = "JSON", value_parser = text::<serde_json::Value>)]
    headers: Option<serde_json::Value>,
}

impl Options {
    fn set(self, mut job: NewJob) -> Result<NewJob> {
        let time = |field: &str, text: &str| {
            crate::config::duration(text)
                .filter(|time| field == "delay" || !time.is_zero())
                .ok_or_else(|| Fault::new(field, format!("{text:?}"), "give a time such as 250ms, 30s, 5m or 1h 30m"))
        };
        if let Some(queue) = self.queue {
            job = job.queue(queue);
        }
        if let Some(priority) = self.priority {
            job = job.priority(priority);
        }
        if let Some(at) = self.expected_at {
            job = job.expected_at(at);
        }
        if let Some(at) = self.run_at {
            job = job.run_at(at);
        }
        if let Some(delay) = self.delay {
            job = job.delay(time("delay", &delay)?);
        }
        if let Some(max) = self.max_attempts {
            job = job.max_attempts(max);
        }
        if let Some(timeout) = self.timeout {
            job = job.timeout(time("timeout", &timeout)?);
        }
        if let Some(key) = self.cursor {
            job = job.cursor(key);
        }
        if let Some(on_retry) = self.on_retry {
            job = job.on_retry(on_retry);
        }
        if let Some(on_failure) = self.on_failure {
            job = job.on_failure(on_failure);
        }
        if let Some(collapse) = self.collapse {
            job = job.collapse(collapse);
        }
        if let Some(key) = self.collapse_key {
            job = job.collapse_key(key);
        }
        if let Some(headers) = &self.headers {
            job = job.headers(headers);
        }
        Ok(job)
    }
}

/// The job of a line; errors say what is wrong with it.
fn read_line(line: &str, max_payload: usize) -> Result<NewJob, String> {
    let mut options: Options = parse(line)?;
    let payload = options.payload.take();
    let job = NewJob::new(std::mem::take(&mut options.kind), payload.as_ref().map_or("null", |raw| raw.get()));
    let job = options.set(job).map_err(|e| e.to_string())?;
    job.check(max_payload).map_err(|e| e.to_string())?;
    Ok(job)
}

impl Enqueue {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        if let Some(file) = &self.file {
            let count = self.copy(file, common).await?;
            println!("{count}");
            return Ok(());
        }
        let job = self.job()?;
        let client = common.checked_client().await?;
        let enqueued = client.enqueue(job).await?;
        if enqueued.collapsed {
            eprintln!("collapsed into a job that waits already");
        }
        println!("{}", enqueued.id);
        Ok(())
    }

    /// The job that the options describe.
    fn job(self) -> Result<NewJob> {
        let payload = match self.payload.as_deref() {
            Some("-") => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                text
            }
            Some(text) => text.to_owned(),
            None => "null".into(),
        };
        let job = NewJob::new(self.kind.unwrap_or_default(), payload);
        self.options.set(job)
    }

    /// Enqueue a file by COPY, in one transaction, with a progress bar on a terminal.
    async fn copy(&self, path: &Path, common: &Common) -> Result<u64> {
        let io = |e| Error::io(path.display().to_string(), e);
        let file = std::fs::File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let client = common.checked_client().await?;
        let bar = if std::io::stderr().is_terminal() {
            indicatif::ProgressBar::new(size)
        } else {
            indicatif::ProgressBar::hidden()
        };
        bar.set_style(
            indicatif::ProgressStyle::with_template("{bytes}/{total_bytes} {wide_bar} {eta}")
                .expect("the template is valid"),
        );
        let lines = BufReader::with_capacity(1 << 16, file).lines().enumerate();
        let jobs = lines.filter_map(|(n, line)| {
            let at = |reason: String| Error::Import { line: n + 1, reason };
            let line = match line {
                Ok(line) => line,
                Err(e) => return Some(Err(at(e.to_string()))),
            };
            bar.inc(line.len() as u64 + 1);
            if line.trim().is_empty() {
                return None;
            }
            Some(read_line(&line, client.max_payload()).map_err(at))
        });
        let count = client.copy(jobs).await;
        bar.finish_and_clear();
        count
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field() -> impl Strategy<Value = String> {
        let name =
            "kind|payload|queue|priority|expected_at|run_at|delay|max_attempts|timeout|cursor|headers|collapse|odd";
        let text = any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap());
        let value = prop_oneof![
            text,
            "null|true|\\{\\}|\\[1\\]|-?[0-9]{1,22}|\"[0-9]{1,12}(ms|h)\"",
            "\"-?[0-9]{4,6}-01-01T00:00:00Z\"",
            "\\PC{0,8}"
        ];
        (name, value).prop_map(|(name, value)| format!("\"{name}\":{value}"))
    }

    proptest! {
        #[test]
        fn any_line_is_a_job_or_an_error(
            text in prop_oneof![
                any::<String>(),
                prop::collection::vec(field(), 0..5).prop_map(|fields| format!("{{\"kind\":\"k\",{}}}", fields.join(","))),
            ],
        ) {
            match read_line(&text, 1 << 20) {
                Ok(job) => job.check(1 << 20).unwrap(),
                Err(why) => prop_assert!(!why.is_empty()),
            }
        }

        #[test]
        fn what_a_line_says_is_in_the_job(payload in "[a-z]{0,9}", priority: i16, key in "\\PC{1,20}") {
            let payload = format!("{{ \"a\":  {payload:?}}}");
            let key_text = serde_json::to_string(&key).unwrap();
            let line = format!("{{\"payload\":{payload},\"kind\":\"k\",\"priority\":{priority},\"cursor\":{key_text}}}");
            let expected = NewJob::new("k", payload).priority(priority).cursor(key);
            prop_assert_eq!(read_line(&line, 1 << 20).unwrap(), expected);
        }
    }
}
