//! The `pgcue` command: a thin binary over the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    pgcue::cli::main()
}
