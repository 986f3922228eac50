//! One error type for the whole library: what went wrong, with which value, and what to do about it.

use std::fmt;

use tokio_postgres::error::{DbError, Severity};

/// The result of pgcue's fallible calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that a call of pgcue can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration has faults; all of them are listed.
    #[error("{}", list(.0))]
    Config(Vec<Fault>),
    /// A value given to a call is not allowed. Nothing was changed.
    #[error("{0}")]
    Invalid(Fault),
    /// A line of an import cannot be read. Nothing was enqueued.
    #[error("line {line}: {reason}")]
    Import {
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The database cannot be reached or refuses the connection.
    #[error("cannot connect to {target}: {reason}")]
    Connect {
        /// Host, port and database, without the password.
        target: String,
        /// What the driver or the server said.
        reason: String,
    },
    /// The database answered a statement with an error, or the connection broke.
    #[error("database: {}", describe(.0))]
    Database(#[from] tokio_postgres::Error),
    /// A call was not answered in time; its connection was closed and its effect is unknown.
    #[error("database: no answer within {0:?}; the connection was closed")]
    Deadline(std::time::Duration),
    /// The schema has not been migrated.
    #[error("schema {0:?} is not there; run `pgcue migrate`")]
    SchemaMissing(String),
    /// The schema is newer than this program.
    #[error("schema {schema:?} is at version {found}, newer than this pgcue knows ({known}); upgrade pgcue")]
    SchemaNewer {
        /// The schema's name.
        schema: String,
        /// The version that the database has.
        found: i32,
        /// The newest version that this program knows.
        known: i32,
    },
    /// The server is a standby or set to read only.
    #[error("the server is read only (a standby, or default_transaction_read_only); connect to the primary")]
    ReadOnly,
    /// The node stopped before all its jobs had finished; so many were given back while they ran.
    #[error("stopped before all jobs had finished: {0} were given back while they ran")]
    Unfinished(usize),
    /// The node was built in a way that cannot run.
    #[error("{0}")]
    Setup(String),
    /// Input or output failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path or address.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// One faulty value: where, what, and what would be allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The field's full name.
    pub field: String,
    /// The value as it was given.
    pub value: String,
    /// What is allowed, or what to do.
    pub fix: String,
}

impl Fault {
    /// A fault of `field`, whose `value` should be as `fix` says.
    pub fn new(field: impl Into<String>, value: impl fmt::Display, fix: impl Into<String>) -> Self {
        Fault { field: field.into(), value: shorten(&value.to_string(), 80), fix: fix.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}: {}", self.field, self.value, self.fix)
    }
}

impl Error {
    /// Something in the environment failed.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }

    /// True if the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Connect { .. } | Error::Deadline(_) | Error::ReadOnly => true,
            _ if self.is_read_only() => true,
            Error::Database(e) => {
                let ended = |db: &DbError| matches!(db.parsed_severity(), Some(Severity::Fatal | Severity::Panic));
                e.is_closed()
                    || e.as_db_error().is_some_and(ended)
                    || e.code().is_none_or(|code| {
                        // serialization, deadlock, lock timeout; connection, resources, operator, system.
                        ["40001", "40P01", "55P03"].contains(&code.code())
                            || ["08", "53", "57", "58"].iter().any(|class| code.code().starts_with(class))
                    })
            }
            _ => false,
        }
    }

    /// True if the database cannot take what it was given, whoever tries and whenever.
    pub(crate) fn is_of_data(&self) -> bool {
        // data exception, constraint, too large, raised by a trigger
        matches!(self, Error::Database(e) if e.code().is_some_and(|code|
            ["22", "23", "54", "P0"].iter().any(|class| code.code().starts_with(class))))
    }

    /// True if the database said that the lease of the call has ended.
    pub fn is_lease_ended(&self) -> bool {
        self.has_code("PQ001")
    }

    /// True if the call needs another isolation level.
    pub(crate) fn is_isolation(&self) -> bool {
        self.has_code("PQ002")
    }

    /// True if the server takes no writes: it was demoted while this session was open.
    pub(crate) fn is_read_only(&self) -> bool {
        self.has_code("25006")
    }

    fn has_code(&self, code: &str) -> bool {
        matches!(self, Error::Database(e) if e.code().is_some_and(|c| c.code() == code))
    }

    /// The exit code of the command line: 64 for usage and configuration, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config(_) | Error::Invalid(_) | Error::Import { .. } => 64,
            _ => 1,
        }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Invalid(fault)
    }
}

/// At most `max` bytes of `text`, cut at a character, with an ellipsis if something was cut.
pub(crate) fn shorten(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(max)])
}

/// The server's own words where there are any, else the driver's with their cause.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => {
            let mut text = db.message().to_owned();
            for more in [db.detail(), db.hint()].into_iter().flatten() {
                text += &format!(" ({})", shorten(more, 300));
            }
            text
        }
        None => with_causes(error),
    }
}

/// An error's message followed by those of its causes.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.ends_with(&more) {
            text += &format!(": {more}");
        }
        cause = e.source();
    }
    text
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n")
}
