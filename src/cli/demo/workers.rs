//! The worker processes of the demo: started, killed with SIGKILL at random moments, and started again.

use std::hash::{BuildHasher, RandomState};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::world::World;
use super::{CONSUMER, TOPIC};
use crate::Shutdown;

/// Shortest and longest time between two kills, in milliseconds.
const KILL_AFTER_MS: (u64, u64) = (100, 400);

/// Keeps workers running and kills one after the other, until it is asked to stop; answers how often it killed.
pub(super) async fn run_and_kill(world: &World, count: usize, stop: &Shutdown) -> anyhow::Result<u64> {
    let mut workers = (0..count).map(|_| start(world)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut kills = 0;
    loop {
        let wait = Duration::from_millis(random_between(KILL_AFTER_MS.0, KILL_AFTER_MS.1));
        // Both arms only wait.
        tokio::select! {
            biased;
            () = stop.stopping() => break,
            () = tokio::time::sleep(wait) => {}
        }
        let victim = usize::try_from(random_between(0, count as u64 - 1)).expect("an index");
        let worker = &mut workers[victim];
        if let Some(status) = worker.try_wait()? {
            bail!("a worker ended by itself: {status}");
        }
        worker.kill().await.context("cannot kill a worker")?;
        kills += 1;
        *worker = start(world)?;
    }
    for worker in &mut workers {
        end(worker).await?;
    }
    Ok(kills)
}

fn start(world: &World) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("cannot find the own program")?;
    Command::new(program)
        .args(["run", "--schema", world.schema().name(), "--word-count", &format!("{CONSUMER}={TOPIC}")])
        .env("DATABASE_URL", world.url())
        // What is in the environment for daemons is not for these.
        .env_remove("PGONCE_DATABASE_URL_FILE")
        .env_remove("PGONCE_CONFIG")
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start a worker")
}

/// Asks a worker to finish, and waits for it.
async fn end(worker: &mut Child) -> anyhow::Result<()> {
    let pid = worker.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        kill_process(pid, Signal::TERM).context("cannot stop a worker")?;
    }
    let status = worker.wait().await.context("cannot wait for a worker")?;
    // A worker that had no time to listen for the signal ends by it.
    if !status.success() && status.code().is_some() {
        bail!("a worker failed: {status}");
    }
    Ok(())
}

/// A number between two others, from the randomness that seeds a hash map: good enough to surprise a worker.
fn random_between(least: u64, most: u64) -> u64 {
    least + RandomState::new().hash_one(least) % (most - least + 1)
}
