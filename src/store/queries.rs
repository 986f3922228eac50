//! The statements, one file each, with the schema's name filled in.

/// Quote an SQL identifier.
pub(crate) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

macro_rules! queries {
    ($($name:ident),* $(,)?) => {
        /// Every statement that the store sends, for one schema.
        #[derive(Debug)]
        #[allow(missing_docs)]
        pub struct Queries {
            $(pub $name: String,)*
        }

        impl Queries {
            /// The files say `pgcue.`; this says the configured schema.
            pub fn new(schema: &str) -> Self {
                let prefix = format!("{}.", quote(schema));
                Queries {
                    $($name: include_str!(concat!("queries/", stringify!($name), ".sql"))
                        .trim_end()
                        .replace("pgcue.", &prefix),)*
                }
            }
        }
    };
}

queries!(
    begin_lease,
    cancel,
    claim,
    collapse,
    copy,
    counts,
    cursor_ends,
    cursors,
    delete_cursor,
    end_lease,
    enqueue,
    extend,
    finished,
    finished_jobs,
    give_back,
    halt_cursor,
    job,
    jobs,
    leave_sentry,
    move_horizon,
    nodes,
    payload,
    promote,
    reap,
    release_cursor,
    repair,
    resume_cursor,
    running_payload,
    set_cursor_state,
    set_payload,
    settle,
    skip_cursor,
    stand_sentry,
    tend_history,
    unrest,
    verify,
    why,
);
