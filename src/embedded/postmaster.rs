//! The server process: how its data come to be, how it starts, how it is made to crash.
//!
//! PostgreSQL's programs run as the server's user, in the guardian's process group, and complain
//! into the log of the directory. The postmaster is a direct child: its exit is noticed at once,
//! and until it has been waited for its id belongs to nobody else, so it can be signalled safely.
//! Deliberately absent: an orderly stop, which is the guardian's alone.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::account::Account;
use super::binaries::Binaries;
use super::directory::{self, ServerDirectory};
use super::error::StartError;

/// How long a crash may take before the postmaster is killed outright.
const CRASH_LIMIT: Duration = Duration::from_secs(10);
/// How often the state of a child process is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The settings of every private server; those of the caller come after and win.
const SETTINGS: [(&str, &str); 7] = [
    ("listen_addresses", ""),
    ("port", directory::PORT),
    ("unix_socket_permissions", "0700"),
    ("max_connections", "200"),
    ("autovacuum", "on"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
];

const INITDB: [&str; 7] = [
    // Relative on purpose: an initdb that outlives its directory by a moment must not be able to
    // make that directory anew.
    "--pgdata=data",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
    "--no-instructions",
    "--username=pgonce",
];
/// Single-user mode, which needs neither a client program nor a connection.
const SINGLE: [&str; 7] = ["--single", "-F", "-D", "data", "-c", "exit_on_error=on", "template1"];

/// A server's data, and the process that serves them, if it is up.
#[derive(Debug)]
pub(super) struct Postmaster {
    pub(super) directory: ServerDirectory,
    pub(super) binaries: Binaries,
    pub(super) account: Account,
    pub(super) settings: Vec<(String, String)>,
    /// The guardian's.
    pub(super) process_group: i32,
    pub(super) process: Option<Child>,
}

impl Postmaster {
    /// Makes the data directory and the database `pgonce`.
    ///
    /// # Errors
    /// One of the programs fails, or is not done by `deadline`.
    pub(super) fn initialize(&self, deadline: Instant) -> Result<(), StartError> {
        self.run("initdb", &INITDB, "", deadline)?;
        self.run("postgres", &SINGLE, "create database pgonce\n", deadline)
    }

    /// Starts the server and waits until it accepts connections.
    ///
    /// # Errors
    /// It ends instead, or is not ready by `deadline`.
    pub(super) fn launch(&mut self, deadline: Instant) -> Result<(), StartError> {
        let data = self.directory.path().join("data");
        let mut command = self.command("postgres")?;
        // The guardian's script knows the postmaster by these two arguments.
        command.arg("-D").arg(&data);
        command.arg("-c").arg(socket_setting(self.directory.path()));
        let extra = self.settings.iter().map(|(name, value)| (&**name, &**value));
        for (name, value) in SETTINGS.into_iter().chain(extra) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let failed_to_run = StartError::io(&self.binaries.program("postgres"));
        let process = self.process.insert(command.spawn().map_err(&failed_to_run)?);
        let pid_file = data.join("postmaster.pid");
        let outcome = loop {
            let ended = process.try_wait().map_err(&failed_to_run)?;
            if ended.is_some() || Instant::now() >= deadline {
                break ended;
            }
            if accepts_connections(&pid_file, process.id()) {
                return Ok(());
            }
            thread::sleep(POLL_INTERVAL);
        };
        Err(self.failed("postgres", outcome))
    }

    /// Ends the server without a checkpoint, every connection cut.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn crash(&mut self) -> io::Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        if process.try_wait()?.is_none() {
            kill_process(Pid::from_child(&process), Signal::QUIT)?;
        }
        if wait_until(&mut process, Instant::now() + CRASH_LIMIT)?.is_none() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Runs one of PostgreSQL's programs to its end, with `input` to read.
    fn run(&self, program: &str, arguments: &[&str], input: &str, deadline: Instant) -> Result<(), StartError> {
        let failed_to_run = StartError::io(&self.binaries.program(program));
        let mut command = self.command(program)?;
        command.args(arguments).stdin(Stdio::piped());
        let mut child = command.spawn().map_err(&failed_to_run)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ended without reading its input says why by its status.
            let _ = stdin.write_all(input.as_bytes());
        }
        match wait_until(&mut child, deadline).map_err(&failed_to_run)? {
            Some(status) if status.success() => Ok(()),
            outcome => Err(self.failed(program, outcome)),
        }
    }

    /// On the programs' standard output there is only chatter.
    fn command(&self, program: &str) -> Result<Command, StartError> {
        let directory = self.directory.path();
        let log = self.directory.log().try_clone().map_err(StartError::io(directory))?;
        let mut command = self.account.command(self.binaries.program(program), directory);
        command.process_group(self.process_group).stdout(Stdio::null()).stderr(log);
        Ok(command)
    }

    /// What is known of a program that ended (`Some`) or took too long (`None`).
    fn failed(&self, program: &str, outcome: Option<ExitStatus>) -> StartError {
        StartError::Failed {
            program: self.binaries.program(program),
            outcome: outcome.map_or("out of time".to_owned(), |status| status.to_string()),
            log: self.directory.log_tail(),
        }
    }
}

/// The exit status of `child`, or `None` where it still runs at `deadline`.
fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Whether the postmaster `pid` has written "ready" into the eighth line of its file, which is
/// what `pg_ctl --wait` looks at too. The first line guards against the file of a dead one.
fn accepts_connections(pid_file: &Path, pid: u32) -> bool {
    let Ok(text) = fs::read_to_string(pid_file) else {
        return false;
    };
    let mut lines = text.lines().map(str::trim);
    lines.next() == Some(&pid.to_string()) && lines.nth(6) == Some("ready")
}

/// The setting is a list, whose members may be quoted; unquoted, a space would end the path.
fn socket_setting(directory: &Path) -> OsString {
    let mut setting = OsString::from("unix_socket_directories=\"");
    setting.push(directory);
    setting.push("\"");
    setting
}
