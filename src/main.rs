//! The `pgonce` program: parses, dispatches, and maps the outcome to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgonce::cli::main()
}
