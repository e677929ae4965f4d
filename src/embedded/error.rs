//! Why a private server did not start or stop: the thing that failed, where, and the remedy.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a private server did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum StartError {
    /// The machine lacks something: PostgreSQL's server programs in a version that will do, an
    /// unprivileged user, or a directory that is fit. The text says what, and names the remedy.
    Unfit(String),
    /// A directory could not be made, or a program not be run.
    Io {
        /// The directory or the program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program of PostgreSQL failed, or was not done in time.
    Failed {
        /// The program.
        program: PathBuf,
        /// Its exit status, or that there was none in time.
        outcome: String,
        /// The last lines of the server's log, indented.
        log: String,
    },
}

/// Why a private server could not be stopped and removed, or could not be kept.
#[derive(Debug)]
pub struct StopError {
    pub(super) directory: PathBuf,
    pub(super) source: io::Error,
}

impl StartError {
    /// What becomes of the failure to make or to run `path`.
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path: path.clone(), source }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfit(text) => f.write_str(text),
            Self::Io { path, source } => {
                write!(f, "a private PostgreSQL server cannot be made: {}: {source}", path.display())
            }
            Self::Failed { program, outcome, log } => {
                write!(f, "{} failed ({outcome}); the end of its log:\n{log}", program.display())
            }
        }
    }
}

impl Error for StartError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Unfit(_) | Self::Failed { .. } => None,
        }
    }
}

impl fmt::Display for StopError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the private PostgreSQL server in {}: {}", self.directory.display(), self.source)
    }
}

impl Error for StopError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}
