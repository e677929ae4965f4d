//! The directories of the servers: where they may lie, how one is made, how those left behind go.
//!
//! A server directory is `pgonce-pg-XXXXXX` in the temporary directory, open to its owner alone:
//!
//! - `lock`: locked (flock) by the program and by its guardian for as long as they live;
//! - `log`: what the server says;
//! - `data`, and the socket `.s.PGSQL.5432`;
//! - `kept`: only if the server is to outlive its program.
//!
//! Invariant: a directory of that name has a lock file, and was locked when it got the name. It
//! is made under another name (`pgonce-new-…`) and renamed, so a sweep never meets a half-made
//! one. What a program leaves that is killed within these few system calls goes by its age.
//!
//! Invariant: nothing is done to a directory of another user, nor through a symbolic link. The
//! temporary directory may be writable for everyone, but must then be sticky, so that nobody else
//! can exchange a directory after its owner has been looked at; and what happens inside happens
//! as that owner.

use std::env;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::process::geteuid;

use super::account::Account;
use super::error::StartError;
use super::guardian::{Guardian, KEPT};

/// The port of every private server: only a part of the socket's name.
pub(super) const PORT: &str = "5432";

const PREFIX: &str = "pgonce-pg-";
const PREFIX_UNFINISHED: &str = "pgonce-new-";
/// What follows the temporary directory in a socket's path.
const SOCKET_SUFFIX: &str = "/pgonce-pg-XXXXXX/.s.PGSQL.5432";
/// What fits into a socket address on every system: macOS has 104 bytes with the final zero,
/// Linux four more.
const SOCKET_PATH_BYTES_MAX: usize = 103;
/// How long the making of a directory, a matter of microseconds, is believed to be under way.
const UNFINISHED_AGE_MAX: Duration = Duration::from_secs(60);
const LOG_TAIL_BYTES: usize = 4096;
const LOG_TAIL_LINES: usize = 12;

/// The directory of a server of this program, with its lock held.
#[derive(Debug)]
pub(super) struct ServerDirectory {
    path: PathBuf,
    lock: File,
    log: File,
}

/// The directory for the directories: the temporary one, or `/tmp` where that is not fit.
///
/// # Errors
/// Neither is fit.
pub(super) fn parent(account: &Account) -> Result<PathBuf, StartError> {
    let temporary = env::temp_dir();
    let candidates = [path::absolute(&temporary).ok(), Some(PathBuf::from("/tmp"))];
    let fit = candidates.into_iter().flatten().find(|candidate| is_fit(candidate, account));
    fit.ok_or_else(|| {
        StartError::Unfit(format!(
            "neither {} nor /tmp is fit for a private PostgreSQL server: set TMPDIR to a directory \
             with a short path that only you can write to, or that is sticky as /tmp should be \
             (chmod 1777)",
            temporary.display()
        ))
    })
}

/// Ends and removes the servers in `parent` whose programs, and guardians, are gone, and removes
/// what is half-made and old. A server that cannot be removed is logged and left: it must not keep
/// the caller from its own.
pub(super) fn sweep(parent: &Path, account: &Account) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    let mut guardians = Vec::new();
    for entry in entries.flatten() {
        let (name, directory) = (entry.file_name(), entry.path());
        if name.as_bytes().starts_with(PREFIX_UNFINISHED.as_bytes()) {
            remove_unfinished(&directory);
        } else if name.as_bytes().starts_with(PREFIX.as_bytes())
            && let Some(lock) = lock_left_behind(&directory, account)
        {
            guardians.push((Guardian::post(account, &directory, &lock), directory));
        }
    }
    // Only now, as all of them are at work, is the first waited for.
    for (guardian, directory) in guardians {
        let directory = directory.display();
        match guardian.and_then(|mut guardian| guardian.end()) {
            Ok(()) => tracing::info!(%directory, "removed a private server left behind"),
            Err(error) => {
                tracing::warn!(%directory, %error, "a private server left behind stays");
            }
        }
    }
}

impl ServerDirectory {
    /// Makes a directory in `parent`, locks it and hands it to `account`.
    ///
    /// # Errors
    /// Any of this fails.
    pub(super) fn create(parent: &Path, account: &Account) -> Result<Self, StartError> {
        Self::make(parent, account).map_err(StartError::io(parent))
    }

    fn make(parent: &Path, account: &Account) -> io::Result<Self> {
        let unfinished = tempfile::Builder::new()
            .prefix(PREFIX_UNFINISHED)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent)?;
        let file = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).append(true).create_new(true).mode(0o600);
            options.open(unfinished.path().join(name))
        };
        let (lock, log) = (file("lock")?, file("log")?);
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        if account.foreign {
            chown(unfinished.path(), Some(account.uid), Some(account.gid))?;
        }
        let name = unfinished.path().file_name().unwrap_or_default().to_string_lossy();
        let path = parent.join(name.replacen(PREFIX_UNFINISHED, PREFIX, 1));
        fs::rename(unfinished.path(), &path)?;
        // Under the old name there is nothing left to remove.
        let _ = unfinished.keep();
        Ok(Self { path, lock, log })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn lock(&self) -> &File {
        &self.lock
    }

    pub(super) fn log(&self) -> &File {
        &self.log
    }

    /// The last lines of the log, indented.
    pub(super) fn log_tail(&self) -> String {
        let size = self.log.metadata().map_or(0, |metadata| metadata.len());
        let mut bytes = [0; LOG_TAIL_BYTES];
        let offset = size.saturating_sub(LOG_TAIL_BYTES as u64);
        let count = self.log.read_at(&mut bytes, offset).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..count]);
        let lines: Vec<_> = text.lines().collect();
        let tail = lines.iter().skip(lines.len().saturating_sub(LOG_TAIL_LINES));
        tail.map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }
}

/// Whether a server of `account` can live in `parent`, and nobody else can interfere.
fn is_fit(parent: &Path, account: &Account) -> bool {
    let Ok(metadata) = fs::metadata(parent) else {
        return false;
    };
    let (mode, owner) = (metadata.mode(), metadata.uid());
    let path = parent.as_os_str().as_bytes();
    // The server takes its socket directory in quotes, and libpq splits a host at its commas.
    let nameable =
        path.len() + SOCKET_SUFFIX.len() <= SOCKET_PATH_BYTES_MAX && !path.iter().any(|byte| b"\",".contains(byte));
    let trusted = owner == 0 || owner == geteuid().as_raw();
    let safe = mode & 0o022 == 0 || mode & 0o1000 != 0;
    // The other user must be able to get there, and to remove its directory from there.
    let reachable = || {
        mode & 0o003 == 0o003
            && parent
                .ancestors()
                .all(|ancestor| fs::metadata(ancestor).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
    };
    metadata.is_dir() && nameable && trusted && safe && (!account.foreign || reachable())
}

/// Removes a directory that has been half-made for too long. Only ours: it is handed to another
/// user with the last step.
fn remove_unfinished(directory: &Path) {
    let left_behind = fs::symlink_metadata(directory).is_ok_and(|metadata| {
        let age = metadata.modified().map(|modified| modified.elapsed());
        metadata.is_dir()
            && metadata.uid() == geteuid().as_raw()
            && matches!(age, Ok(Ok(age)) if age > UNFINISHED_AGE_MAX)
    });
    if left_behind {
        // What cannot be removed is two empty files; the next start tries again.
        let _ = fs::remove_dir_all(directory);
    }
}

/// The lock of a directory of `account` that no program or guardian holds any more and that is
/// not to be kept; taken.
fn lock_left_behind(directory: &Path, account: &Account) -> Option<File> {
    let metadata = fs::symlink_metadata(directory).ok()?;
    if !metadata.is_dir() || metadata.uid() != account.uid {
        return None;
    }
    // Neither a link nor a pipe in the lock's place may lead astray or make this wait.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let lock = File::from(open(directory.join("lock"), flags, Mode::empty()).ok()?);
    flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
    // Looked at under the lock: the mark is set before the lock of a kept server is given up.
    fs::symlink_metadata(directory.join(KEPT)).is_err().then_some(lock)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Account, is_fit};

    #[test]
    fn only_a_short_and_safe_directory_is_fit() {
        let account = Account { uid: 1, gid: 1, foreign: true };
        assert!(!is_fit(Path::new(&format!("/tmp{}", "/.".repeat(40))), &account), "too long");
        assert!(!is_fit(Path::new("/etc"), &account), "not writable for the server's user");
        assert!(!is_fit(Path::new("/etc/passwd"), &account), "not a directory");
    }
}
