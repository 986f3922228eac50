//! Jobs: as they are enqueued ([`NewJob`]) and as a handler meets them ([`Job`]).

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::cursor::{Collapse, OnFailure, OnRetry};
use crate::error::{Error, Fault, Result};
use crate::lifecycle::MAX_DELAY;
use crate::outcome::{JobError, JobResult, Outcome};
use crate::task::{CursorTask, Task};

/// The database's calendar begins on Julian day 0, in seconds since 1970.
const FIRST_SECOND: i64 = -2_440_588 * 86_400;

/// A job to be enqueued, with its options.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    pub(crate) kind: String,
    pub(crate) queue: String,
    pub(crate) payload: String,
    pub(crate) priority: i16,
    pub(crate) expected_at: Option<Timestamp>,
    pub(crate) run_at: Option<Timestamp>,
    pub(crate) delay: Option<Duration>,
    pub(crate) max_attempts: u16,
    pub(crate) timeout: Option<Duration>,
    pub(crate) cursor_key: Option<String>,
    pub(crate) on_retry: Option<OnRetry>,
    pub(crate) on_failure: Option<OnFailure>,
    pub(crate) collapse: Option<Collapse>,
    pub(crate) collapse_key: Option<String>,
    pub(crate) headers: Option<String>,
    fault: Option<Fault>,
}

impl NewJob {
    /// A job of this kind with a payload that is JSON text, kept as it is given.
    pub fn new(kind: impl Into<String>, payload: impl Into<String>) -> Self {
        let payload = payload.into();
        let fault = serde_json::from_str::<serde::de::IgnoredAny>(&payload)
            .err()
            .map(|e| Fault::new("payload", &payload, format!("malformed JSON: {e}")));
        NewJob { fault, ..Self::with_payload(kind.into(), payload) }
    }

    fn with_payload(kind: String, payload: String) -> Self {
        NewJob {
            kind,
            queue: "default".into(),
            payload,
            priority: 0,
            expected_at: None,
            run_at: None,
            delay: None,
            max_attempts: 25,
            timeout: None,
            cursor_key: None,
            on_retry: None,
            on_failure: None,
            collapse: None,
            collapse_key: None,
            headers: None,
            fault: None,
        }
    }

    /// The queue to go to, 1 to 512 bytes.
    pub fn queue(self, queue: impl Into<String>) -> Self {
        NewJob { queue: queue.into(), ..self }
    }

    /// Greater goes first; the default is 0.
    pub fn priority(self, priority: i16) -> Self {
        NewJob { priority, ..self }
    }

    /// When the result is wanted: within a priority, earlier goes first, and jobs without it last.
    pub fn expected_at(self, at: Timestamp) -> Self {
        NewJob { expected_at: Some(at), ..self }
    }

    /// Not before this moment of the database's clock.
    pub fn run_at(self, at: Timestamp) -> Self {
        NewJob { run_at: Some(at), delay: None, ..self }
    }

    /// Not before this much time has passed on the database's clock.
    pub fn delay(self, delay: Duration) -> Self {
        NewJob { delay: Some(delay), run_at: None, ..self }
    }

    /// How many attempts it gets, 1 to 32767.
    pub fn max_attempts(self, max_attempts: u16) -> Self {
        NewJob { max_attempts, ..self }
    }

    /// How long one attempt may take.
    pub fn timeout(self, timeout: Duration) -> Self {
        NewJob { timeout: Some(timeout), ..self }
    }

    /// The cursor it belongs to, 1 to 1024 bytes: jobs of one cursor run one at a time, in order.
    pub fn cursor(self, key: impl Into<String>) -> Self {
        NewJob { cursor_key: Some(key.into()), ..self }
    }

    /// What the jobs behind it in its cursor do while it waits for its next attempt.
    pub fn on_retry(self, on_retry: OnRetry) -> Self {
        NewJob { on_retry: Some(on_retry), ..self }
    }

    /// What its cursor does after it failed for good.
    pub fn on_failure(self, on_failure: OnFailure) -> Self {
        NewJob { on_failure: Some(on_failure), ..self }
    }

    /// Unless a job of this queue and kind with the same collapse key (by default the cursor's) waits for
    /// its first start: then that one's id is returned, and of the two times the earlier `run_at` wins.
    /// With a delay this debounces and throttles: many calls, one run.
    pub fn collapse(self, collapse: Collapse) -> Self {
        NewJob { collapse: Some(collapse), ..self }
    }

    /// What to collapse on instead of the cursor, 1 to 1024 bytes.
    pub fn collapse_key(self, key: impl Into<String>) -> Self {
        NewJob { collapse_key: Some(key.into()), ..self }
    }

    /// What travels along without being the payload: a JSON object (traces, tenants).
    pub fn headers(mut self, headers: &serde_json::Value) -> Self {
        if !headers.is_object() {
            self.fault = Some(Fault::new("headers", headers, "give a JSON object"));
        }
        NewJob { headers: Some(headers.to_string()), ..self }
    }

    /// Refuse what the database would refuse, in clearer words.
    pub(crate) fn check(&self, max_payload: usize) -> Result<()> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone().into());
        }
        check_name("kind", &self.kind, 512)?;
        check_name("queue", &self.queue, 512)?;
        if let Some(key) = &self.cursor_key {
            check_name("cursor_key", key, 1024)?;
        }
        if let Some(key) = &self.collapse_key {
            check_name("collapse_key", key, 1024)?;
            if self.collapse.is_none() {
                return Err(
                    Fault::new("collapse_key", key, "say what to do on a conflict: keep, replace or merge").into()
                );
            }
        }
        if self.collapse.is_some() && self.collapse_key.is_none() && self.cursor_key.is_none() {
            return Err(Fault::new("collapse", "without a key", "give a cursor or a collapse_key").into());
        }
        for (field, text) in [("payload", Some(&self.payload)), ("headers", self.headers.as_ref())] {
            if let Some(size) = text.map(String::len).filter(|size| *size > max_payload) {
                let fix = format!(
                    "the limit is {max_payload} bytes (max_payload); store it elsewhere and enqueue its address"
                );
                return Err(Fault::new(field, format!("{size} bytes long"), fix).into());
            }
        }
        if !(1..=i16::MAX as u16).contains(&self.max_attempts) {
            return Err(Fault::new("max_attempts", self.max_attempts, "give 1 to 32767").into());
        }
        if let Some(time) = self.timeout.filter(|t| *t < Duration::from_micros(1) || *t > MAX_DELAY) {
            return Err(Fault::new("timeout", format!("{time:?}"), "give a microsecond to 1000 years").into());
        }
        if let Some(time) = self.delay.filter(|t| *t > MAX_DELAY) {
            return Err(Fault::new("delay", format!("{time:?}"), "give up to 1000 years").into());
        }
        for (field, at) in [("expected_at", self.expected_at), ("run_at", self.run_at)] {
            if let Some(at) = at.filter(|at| at.as_second() < FIRST_SECOND) {
                return Err(Fault::new(field, at, "give a time that is not before the year -4712").into());
            }
        }
        Ok(())
    }
}

/// Refuse a name that the database would refuse.
pub(crate) fn check_name(field: &str, name: &str, max: usize) -> Result<(), Fault> {
    let allowed = || format!("give 1 to {max} bytes");
    if name.is_empty() {
        return Err(Fault::new(field, "empty", allowed()));
    }
    if name.len() > max {
        return Err(Fault::new(field, format!("{} bytes long", name.len()), allowed()));
    }
    if name.contains('\0') {
        return Err(Fault::new(field, format!("{name:?}"), "leave out the NUL character"));
    }
    Ok(())
}

impl<T: Task> From<T> for NewJob {
    fn from(task: T) -> Self {
        let (payload, fault) = match serde_json::to_string(&task) {
            Ok(payload) => (payload, None),
            Err(e) => (String::new(), Some(Fault::new("payload", T::KIND, format!("cannot become JSON: {e}")))),
        };
        NewJob {
            queue: T::QUEUE.into(),
            max_attempts: T::MAX_ATTEMPTS,
            timeout: T::TIMEOUT,
            on_retry: (T::ON_RETRY != OnRetry::default()).then_some(T::ON_RETRY),
            on_failure: (T::ON_FAILURE != OnFailure::default()).then_some(T::ON_FAILURE),
            fault,
            ..Self::with_payload(T::KIND.into(), payload)
        }
    }
}

/// A job as its handler meets it. As an actix message it is answered with a [`JobResult`].
#[derive(Debug)]
pub struct Job<T> {
    /// The task: the payload as its Rust type.
    pub args: T,
    /// What is known of the job besides.
    pub meta: Meta,
}

/// A job's own facts.
#[derive(Debug, Clone)]
pub struct Meta {
    /// The job's id, unique in its schema.
    pub id: i64,
    /// Its kind.
    pub kind: Arc<str>,
    /// Its queue.
    pub queue: Arc<str>,
    /// Which attempt this is; the first is 1.
    pub attempt: u16,
    /// How many attempts it gets.
    pub max_attempts: u16,
    /// The headers it was enqueued with, as JSON text.
    pub headers: Option<Arc<str>>,
    /// The cursor it belongs to.
    pub cursor_key: Option<Arc<str>>,
    /// The cursor's state that this job begins with, as JSON text.
    pub cursor_state: Option<Arc<str>>,
    /// How many jobs made the cursor what it is.
    pub cursor_version: Option<i64>,
    /// Fires when the attempt should stop: cancelled, timed out, its lease lost, or the node drains.
    pub cancelled: CancellationToken,
}

impl<T: 'static> actix::Message for Job<T> {
    type Result = JobResult;
}

impl<T> Job<T> {
    /// The cursor's state as a type; none if the cursor has none yet. A state that does not fit fails the
    /// job for good, naming the path in the JSON, and stays as it is.
    pub fn state<S: DeserializeOwned>(&self) -> Result<Option<S>, JobError> {
        let state = self.meta.cursor_state.as_deref().map(parse).transpose();
        state.map_err(|e| JobError::fatal(format!("cursor state does not fit: {e}")))
    }
}

impl<T: CursorTask> Job<T> {
    /// [`Job::state`] as the task's own type.
    pub fn cursor(&self) -> Result<Option<T::State>, JobError> {
        self.state()
    }

    /// Complete, and leave this as the cursor's state.
    pub fn leave(&self, state: &T::State) -> JobResult {
        Outcome::state(state)
    }
}

/// JSON text as a type; the error names the path to what does not fit.
pub(crate) fn parse<T: DeserializeOwned>(json: &str) -> Result<T, String> {
    let mut reader = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut reader).map_err(|e| match e.path().to_string().as_str() {
        "." => e.inner().to_string(),
        path => format!("{path}: {}", e.inner()),
    })
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Self {
        Error::Invalid(Fault::new("json", "malformed", e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_field_value_and_fix() {
        let message = |job: NewJob| job.check(100).unwrap_err().to_string();
        assert_eq!(message(NewJob::new("", "{}")), "kind is empty: give 1 to 512 bytes");
        assert_eq!(message(NewJob::new("k", "{}").queue("")), "queue is empty: give 1 to 512 bytes");
        assert!(message(NewJob::new("k", r#"{"a":}"#)).contains("line 1 column 6"));
        assert!(message(NewJob::new("k", format!("{:?}", "x".repeat(200)))).contains("202 bytes long"));
        assert!(message(NewJob::new("k", "1").cursor("k".repeat(10_000))).contains("cursor_key is 10000 bytes long"));
        assert!(message(NewJob::new("k", "1").timeout(Duration::ZERO)).contains("timeout is 0"));
        assert!(message(NewJob::new("k", "1").timeout(Duration::MAX)).ends_with("give a microsecond to 1000 years"));
        assert!(message(NewJob::new("k", "1").delay(Duration::MAX)).ends_with("give up to 1000 years"));
        assert!(message(NewJob::new("k", "1").run_at(Timestamp::MIN)).starts_with("run_at is -009999-01-02"));
        let headers = serde_json::json!({"h": "x".repeat(200)});
        assert!(message(NewJob::new("k", "1").headers(&headers)).starts_with("headers is 208 bytes long"));
        assert!(message(NewJob::new("k", "1").max_attempts(0)).contains("max_attempts is 0"));
        NewJob::new("k", "\"\\u0000\"").queue("q".repeat(200)).check(100).unwrap();
    }

    #[test]
    fn a_payload_that_does_not_fit_names_its_path() {
        #[derive(serde::Deserialize, Debug)]
        #[allow(dead_code)]
        struct Outer {
            list: Vec<u8>,
        }
        let error = parse::<Outer>(r#"{"list":[1,"x"]}"#).unwrap_err();
        assert!(error.starts_with("list[1]: invalid type: string"), "{error}");
    }
}
