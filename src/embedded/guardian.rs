//! The guardian: the process that ends a server when its program is gone.
//!
//! It is a `/bin/sh` whose standard input is a pipe. The program holds the other end, which is
//! close-on-exec and thus in no other process; so the guardian reads end-of-file when, and only
//! when, the program closes it or ceases to be. It then stops the server and removes the
//! directory. It leads a process group of its own, out of reach of the terminal's Ctrl-C, and
//! ignores the signals that ask a process to go. It runs as the server's user, never as root.
//!
//! The server's programs join that process group. Hence whatever of them is running, even an
//! initdb or a postmaster that has not yet written its pid file, gets the group's signals.
//!
//! Its standard output is the lock file: it never writes there, but keeps the lock as long as it
//! lives, so that a sweep (`directory.rs`) by some other program leaves its work to it.
//!
//! A guardian posted and dismissed at once ends a server left behind by others: there is one
//! script for all ends. For this the script also reads the pid file, and believes it only where
//! the command line of that process names this very directory; `pg_ctl stop` would signal
//! whatever process has inherited the number.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use super::account::Account;

/// The file that says a directory is to be kept.
pub(super) const KEPT: &str = "kept";

/// `$1` is the directory, `$2` the mark of a kept one. After ten seconds (100 rounds) the fast
/// shutdown becomes an immediate one, after twenty the script gives up. Removal is part of the
/// round, as it fails where a dying process still writes a file.
const SCRIPT: &str = r#"# Ends a private PostgreSQL server of pgonce when its program is gone.
trap '' HUP INT QUIT TERM
PATH=/usr/bin:/bin:$PATH
server_runs() {
  pid=
  read -r pid < "$1/data/postmaster.pid" || return 1
  case $pid in '' | *[!0-9]*) return 1 ;; esac
  if [ -r "/proc/$pid/cmdline" ]; then
    command_line=$(tr '\0' ' ' < "/proc/$pid/cmdline")
  else
    command_line=$(ps -o args= -p "$pid")
  fi
  case $command_line in *" -D $1/data "*) return 0 ;; esac
  return 1
}
if read -r order && [ "$order" = keep ] && : > "$1/$2"; then
  exit 0
fi
round=0
while [ "$round" -lt 200 ]; do
  case $round in 0) signal=INT ;; 100) signal=QUIT ;; *) signal=0 ;; esac
  kill -s "$signal" 0
  if server_runs "$1"; then
    kill -s "$signal" "$pid"
  elif rm -rf -- "$1"; then
    exit 0
  fi
  sleep 0.1 || sleep 1
  round=$((round + 1))
done
exit 1
"#;

/// The guardian of one server directory.
#[derive(Debug)]
pub(super) struct Guardian {
    account: Account,
    directory: PathBuf,
    lock: File,
    /// `None` once it has been called off or has done its work.
    process: Option<Child>,
    process_group: i32,
}

impl Guardian {
    /// Posts a guardian for `directory`, whose locked lock file is `lock`.
    ///
    /// # Errors
    /// `/bin/sh` cannot be run.
    pub(super) fn post(account: &Account, directory: &Path, lock: &File) -> io::Result<Self> {
        let lock = lock.try_clone()?;
        let process = spawn(account, directory, &lock)?;
        let process_group = process.id().cast_signed();
        let directory = directory.to_owned();
        Ok(Self { account: *account, directory, lock, process: Some(process), process_group })
    }

    /// The process group for the server's programs.
    pub(super) fn process_group(&self) -> i32 {
        self.process_group
    }

    /// Whether there is still something to end.
    pub(super) fn on_duty(&self) -> bool {
        self.process.is_some()
    }

    /// Lets the guardian do its work now and waits until it is done: in general some tenths of a
    /// second, at most about twenty seconds. Where someone has killed it, another takes its
    /// place. Does nothing the second time.
    ///
    /// # Errors
    /// The server still runs, or something of the directory is still there.
    pub(super) fn end(&mut self) -> io::Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        // Waiting closes the pipe first.
        let mut status = process.wait()?;
        if status.code().is_none() {
            status = spawn(&self.account, &self.directory, &self.lock)?.wait()?;
        }
        if status.success() {
            return Ok(());
        }
        Err(io::Error::other("it could not be stopped, or its directory could not be removed"))
    }

    /// Sends the guardian home; the server stays up, and its directory is marked as kept.
    ///
    /// # Errors
    /// The guardian is gone, or could not set the mark. In the latter case it has ended the
    /// server.
    pub(super) fn call_off(&mut self) -> io::Result<()> {
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        if let Some(pipe) = &mut process.stdin {
            pipe.write_all(b"keep\n")?;
        }
        if process.wait()?.success() && self.directory.join(KEPT).symlink_metadata().is_ok() {
            self.process = None;
            return Ok(());
        }
        Err(io::Error::other("it could not be marked as one to be kept"))
    }
}

fn spawn(account: &Account, directory: &Path, lock: &File) -> io::Result<Child> {
    account
        .command("/bin/sh", Path::new("/"))
        .args(["-c", SCRIPT, "pgonce-guardian"])
        .arg(directory)
        .arg(KEPT)
        .stdin(Stdio::piped())
        .stdout(lock.try_clone()?)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}
