//! Finding PostgreSQL's server programs, which most systems keep off the PATH.
//!
//! `PGONCE_POSTGRES_BIN`, where set, decides alone. Otherwise the first usable directory wins of:
//! those on the PATH, that of `pg_config`, and then the usual places of the packages of Debian,
//! Red Hat, PGDG, SUSE, Alpine, Homebrew, `MacPorts` and `Postgres.app`, newest version first.
//! Usable is a directory with `initdb` and with a `postgres` that says it is version 15 or newer.
//! Deliberately absent: downloading one.

use std::cmp::Reverse;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::account::Account;
use super::error::StartError;

/// The environment variable that names the directory of the server programs.
const VARIABLE: &str = "PGONCE_POSTGRES_BIN";
/// The oldest major version that will do.
const OLDEST: u32 = 15;

/// Where each version has its own directory: parent, what the names begin with, what follows.
const VERSIONED_PLACES: [(&str, &str, &str); 8] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/usr/lib", "postgresql", "bin"),
    ("/usr/libexec", "postgresql", ""),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/opt/local/lib", "postgresql", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];
const PLAIN_PLACES: [&str; 4] = ["/usr/bin", "/usr/local/bin", "/opt/homebrew/bin", "/usr/local/pgsql/bin"];

/// A directory with the server programs of one version.
#[derive(Debug)]
pub(super) struct Binaries {
    directory: PathBuf,
    /// The major version.
    pub(super) version: u32,
}

impl Binaries {
    /// Finds the programs; they must be executable for `account`.
    ///
    /// # Errors
    /// None are found, or only ones that are too old.
    pub(super) fn find(account: &Account) -> Result<Self, StartError> {
        if let Some(directory) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            let directory = PathBuf::from(directory);
            let found = Self::examine(directory.clone(), account);
            return new_enough(found).unwrap_or_else(|| {
                Err(StartError::Unfit(format!(
                    "{VARIABLE} is set to {}, which has no initdb and postgres that can be run: \
                     set it to a PostgreSQL bin directory (an absolute path), or unset it",
                    directory.display()
                )))
            });
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let preferred = env::split_paths(&path).chain(bindir_of_pg_config(account));
        let examine = |directory| Self::examine(directory, account);
        let mut usual: Vec<_> = usual_places().filter_map(examine).collect();
        usual.sort_by_key(|binaries| Reverse(binaries.version));
        new_enough(preferred.filter_map(examine).chain(usual)).unwrap_or_else(|| {
            Err(StartError::Unfit(format!(
                "no PostgreSQL server programs (initdb, postgres) were found on this machine: {}, \
                 or set {VARIABLE} to the directory that has them",
                remedy()
            )))
        })
    }

    /// The path of one of the programs.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A relative directory does not count: it would name another place in another directory.
    fn examine(directory: PathBuf, account: &Account) -> Option<Self> {
        let postgres = directory.join("postgres");
        if !directory.is_absolute() || !postgres.is_file() || !directory.join("initdb").is_file() {
            return None;
        }
        let version = major_version(&output(account, &postgres, "--version")?)?;
        Some(Self { directory, version })
    }
}

/// The first of `found` that is new enough; else the complaint about the first that is not; `None`
/// where there is nothing at all.
fn new_enough(found: impl IntoIterator<Item = Binaries>) -> Option<Result<Binaries, StartError>> {
    let mut outdated = None;
    for binaries in found {
        if binaries.version >= OLDEST {
            return Some(Ok(binaries));
        }
        outdated = outdated.or(Some(binaries));
    }
    let Binaries { directory, version } = outdated?;
    Some(Err(StartError::Unfit(format!(
        "the PostgreSQL in {} has version {version}, but {OLDEST} or newer is needed: install a \
         newer one (https://www.postgresql.org/download/), or set {VARIABLE} to its bin directory",
        directory.display()
    ))))
}

fn bindir_of_pg_config(account: &Account) -> Option<PathBuf> {
    let output = output(account, Path::new("pg_config"), "--bindir")?;
    Some(PathBuf::from(output.trim_end()))
}

fn usual_places() -> impl Iterator<Item = PathBuf> {
    let versioned = VERSIONED_PLACES.into_iter().flat_map(|(parent, prefix, suffix)| {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        entries
            .filter(move |entry| entry.file_name().to_string_lossy().starts_with(prefix))
            .map(move |entry| entry.path().join(suffix))
    });
    versioned.chain(PLAIN_PLACES.map(PathBuf::from))
}

/// What `program` prints, given one argument, if it can be run and succeeds.
fn output(account: &Account, program: &Path, argument: &str) -> Option<String> {
    let mut command = account.command(program, Path::new("/"));
    let output = command.arg(argument).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).ok())?
}

/// The major version in `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`.
fn major_version(text: &str) -> Option<u32> {
    let version = text.strip_prefix("postgres (PostgreSQL) ")?;
    let digits = version.split(|character: char| !character.is_ascii_digit()).next()?;
    digits.parse().ok()
}

fn remedy() -> String {
    if cfg!(target_os = "macos") {
        return "install one by `brew install postgresql@17`".to_owned();
    }
    // The first is the administrator's, the second the distribution's.
    let os_release = ["/etc/os-release", "/usr/lib/os-release"]
        .into_iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .unwrap_or_default();
    match install_command(&os_release) {
        Some(command) => format!("install one, as root, by `{command}`"),
        None => "install your system's package of the PostgreSQL server".to_owned(),
    }
}

/// The command for the system that the text of an os-release file describes: for itself, else for
/// the nearest of those it resembles.
fn install_command(os_release: &str) -> Option<&'static str> {
    let value = |key: &str| {
        let mut lines = os_release.lines();
        let value = lines.find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_default().trim_matches(['"', '\''])
    };
    let (id, like) = (value("ID"), value("ID_LIKE"));
    [id].into_iter().chain(like.split_whitespace()).find_map(|id| match id {
        "debian" | "ubuntu" => Some("apt-get install postgresql"),
        "fedora" | "rhel" | "centos" => Some("dnf install postgresql-server"),
        "arch" => Some("pacman -S postgresql"),
        "alpine" => Some("apk add postgresql"),
        "suse" | "opensuse" => Some("zypper install postgresql-server"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::{Binaries, StartError, install_command, major_version, new_enough};

    #[test]
    fn the_major_version_is_read_from_what_postgres_says() {
        let debian = "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n";
        assert_eq!(major_version(debian), Some(15));
        assert_eq!(major_version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_version("postgres (PostgreSQL) 9.6.24"), Some(9));
        assert_eq!(major_version("postgres (Other) 15"), None);
        assert_eq!(major_version("postgres (PostgreSQL) devel"), None);
    }

    #[test]
    fn an_outdated_version_is_refused_only_where_there_is_no_other() {
        let binaries = |version| Binaries { directory: "/x".into(), version };
        let mixed = new_enough([binaries(13), binaries(15), binaries(16)]);
        assert!(matches!(mixed, Some(Ok(Binaries { version: 15, .. }))));
        let old = new_enough([binaries(13)]);
        assert!(matches!(old, Some(Err(StartError::Unfit(_)))));
        assert!(new_enough(None).is_none());
    }

    #[test]
    fn the_remedy_fits_the_system() {
        let command = |text| install_command(text);
        assert_eq!(command("NAME=x\nID=debian\n"), Some("apt-get install postgresql"));
        assert_eq!(command("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\""), Some("dnf install postgresql-server"));
        assert_eq!(
            command("ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\""),
            Some("zypper install postgresql-server")
        );
        assert_eq!(command("ID=alpine"), Some("apk add postgresql"));
        assert_eq!(command("ID=nixos"), None);
    }
}
