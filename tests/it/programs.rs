//! Programs that tests run: `pgonce` itself, and those of PostgreSQL.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::probe::WAIT_MAX;

/// How often a process is asked whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The program, without a database from the environment.
pub(crate) fn pgonce(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgonce"));
    command.args(arguments).env_remove("DATABASE_URL").env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs the program to its end. Blocks.
pub(crate) fn outcome(arguments: &[&str]) -> Output {
    pgonce(arguments).output().expect("the program can be started")
}

/// The program while it runs; killed when dropped.
#[derive(Debug)]
pub(crate) struct Running(Child);

impl Running {
    /// Starts the program; what it says goes nowhere unless it is asked for.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("the program can be started"))
    }

    /// The next line on its standard output, which was piped, that begins so; the rest of it. Blocks.
    pub(crate) fn line_after(&mut self, start: &str) -> String {
        let output = self.0.stdout.as_mut().expect("standard output is piped");
        for line in BufReader::new(output).lines() {
            if let Some(rest) = line.expect("text").strip_prefix(start) {
                return rest.to_owned();
            }
        }
        panic!("the program ended without a line that begins {start:?}");
    }

    /// Waits until its standard error, which was piped, says a word; the line. Blocks.
    pub(crate) fn until_logged(&mut self, word: &str) -> String {
        let log = self.0.stderr.as_mut().expect("standard error is piped");
        let mut said = String::new();
        for line in BufReader::new(log).lines() {
            let line = line.expect("text");
            if line.contains(word) {
                return line;
            }
            said.push_str(&line);
            said.push('\n');
        }
        panic!("the program ended without saying {word:?}:\n{said}");
    }

    /// Takes the reader of its standard error away.
    pub(crate) fn close_log(&mut self) {
        drop(self.0.stderr.take());
    }

    /// Closes its standard input, which was piped, and waits for its end. Blocks.
    pub(crate) fn release(&mut self) {
        // Waiting closes it first.
        let _ = self.0.wait();
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        self.0.kill().expect("a child can be killed");
        self.0.wait().expect("a child can be waited for");
    }

    /// Asks it to finish.
    pub(crate) fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).expect("a child can be signalled");
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a process id")
    }

    /// Waits for its end. Blocks.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            if let Some(status) = self.0.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "the program does not end");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Asks it to finish, waits, and checks that it ended well.
    pub(crate) fn finish(mut self) {
        self.terminate();
        let status = self.end();
        let mut said = String::new();
        if let Some(log) = &mut self.0.stderr {
            log.read_to_string(&mut said).expect("text");
        }
        assert!(status.success(), "{status}\n{said}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client program of PostgreSQL, as new as there is: next to the server programs, or in the PATH.
pub(crate) fn postgresql(name: &str) -> Option<PathBuf> {
    let mut directories: Vec<PathBuf> = Vec::new();
    if let Some(directory) = std::env::var_os("PGONCE_POSTGRES_BIN") {
        directories.push(directory.into());
    }
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        directories.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        let mut versions: Vec<PathBuf> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
        versions.sort();
        directories.extend(versions.into_iter().rev());
    }
    if let Some(path) = std::env::var_os("PATH") {
        directories.extend(std::env::split_paths(&path));
    }
    directories.into_iter().map(|directory| directory.join(name)).find(|program| program.is_file())
}
