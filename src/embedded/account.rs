//! The user as whom a server runs: the caller, or an unprivileged one where the caller is root.
//!
//! The change of user is made by the child itself between fork and exec (which also drops the
//! supplementary groups), so neither `sudo` nor `su` is needed. Deliberately absent: users that
//! are known to the machine by other means than `/etc/passwd`; the two that are looked for always
//! stand there.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{getegid, geteuid};

use super::error::StartError;

/// Whom root's servers run as, the first that exists; Apple's names begin with an underscore.
const UNPRIVILEGED: [&str; 3] = ["postgres", "_postgres", "nobody"];

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Whether this is another user than the caller, who then is root.
    pub(super) foreign: bool,
}

impl Account {
    /// The user for the servers of this program.
    ///
    /// # Errors
    /// Root, on a machine without any of the unprivileged users.
    pub(super) fn for_servers() -> Result<Self, StartError> {
        if !geteuid().is_root() {
            let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
            return Ok(Self { uid, gid, foreign: false });
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        UNPRIVILEGED.iter().find_map(|name| entry(&passwd, name)).ok_or_else(|| {
            let text = "PostgreSQL does not run as root, and /etc/passwd has neither a user \
                        postgres nor a user nobody to run it as: start this program as an \
                        ordinary user";
            StartError::Unfit(text.to_owned())
        })
    }

    /// A command that runs `program` as this user in `directory`, without input, and without
    /// those variables of the environment by which PostgreSQL's programs would be misled.
    pub(super) fn command(&self, program: impl AsRef<OsStr>, directory: &Path) -> Command {
        let mut command = Command::new(program);
        // The caller's current directory may be closed to this user.
        command.current_dir(directory).stdin(Stdio::null()).env("LC_ALL", "C");
        for (name, _) in env::vars_os() {
            if name.as_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        if self.foreign {
            command.uid(self.uid).gid(self.gid);
        }
        command
    }
}

/// The entry of `name` in the text of `/etc/passwd`. Root's own numbers are not accepted.
fn entry(passwd: &str, name: &str) -> Option<Account> {
    let mut fields = passwd
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?
        .skip(1);
    let (uid, gid) = (number(fields.next()?)?, number(fields.next()?)?);
    (uid != 0).then_some(Account { uid, gid, foreign: true })
}

/// A user or group id; macOS writes that of `nobody` as -2.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().or_else(|| text.parse().ok().map(i32::cast_unsigned))
}

#[cfg(test)]
mod tests {
    use super::{Account, entry};

    #[test]
    fn an_account_is_read_from_the_password_file() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# nobody:1\nnobody:*:-2:-2:No One:/:/x\n";
        let nobody = Account { uid: 4_294_967_294, gid: 4_294_967_294, foreign: true };
        assert_eq!(entry(passwd, "nobody"), Some(nobody));
        assert_eq!(entry(passwd, "postgres"), None);
        assert_eq!(entry(passwd, "root"), None);
    }
}
