//! A PostgreSQL server in a container, where `PGONCE_TEST_IMAGE` names an image and a Docker engine answers.
//!
//! A container has to go however the run ends: with a test that fails, by Ctrl-C or by SIGKILL; and a static, such as the
//! server of the run, is never dropped. So this program starts itself once more, as the *owner* of the container. The
//! owner starts it, says where it is, and reads its own standard input, whose other end this process holds. The kernel
//! closes that end when this process ceases to be, whatever the reason; the owner then removes the container. It is in
//! a process group of its own, out of reach of the terminal's Ctrl-C. (The guardian of the private server works alike.)
//!
//! Invariant: a container's address outlives restarts and cuts. An engine gives a port of its own choice anew at every
//! start, so the owner chooses it; and not among those that a system gives to outgoing connections, one of which might
//! take it while the server is down (also one that a client makes to this very port, and which then meets itself).

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use testcontainers::bollard::Docker;
use testcontainers::bollard::models::{NetworkConnectRequest, NetworkDisconnectRequest};
use testcontainers::bollard::query_parameters::KillContainerOptions;
use testcontainers::core::IntoContainerPort;
use testcontainers::core::client::docker_client_instance;
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt};
use tokio_postgres::NoTls;
use uuid::Uuid;

use crate::probe::eventually;
use crate::programs::Running;

/// Names the image: PostgreSQL's official one, or one that takes the same variables and arguments.
const IMAGE: &str = "PGONCE_TEST_IMAGE";
/// Set for the owner only; anybody else who runs that "test" starts nothing.
const IS_OWNER: &str = "PGONCE_TEST_CONTAINER_OWNER";
/// As long as the container's processes die and the machine does not, `fsync` protects nothing.
const ARGUMENTS: [&str; 5] = ["postgres", "-c", "fsync=off", "-c", "max_connections=200"];
/// Below what Linux and others give to outgoing connections.
const PORTS: Range<u128> = 20_000..32_000;
/// How many ports are tried, as somebody may listen there.
const PORTS_MAX: usize = 100;
/// The network in which an engine puts containers.
const NETWORK: &str = "bridge";
const ANNOUNCEMENT: &str = "container: ";

/// A PostgreSQL server in a container. The container is removed with this value, or with the process.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    /// Its database `postgres`, as a superuser.
    pub(crate) url: String,
    owner: Running,
}

impl Container {
    /// Starts one; nothing where no image is named, or no engine answers, which is then said.
    pub(crate) async fn start() -> Option<Self> {
        std::env::var_os(IMAGE)?;
        if let Err(error) = ping().await {
            say(&format!("{IMAGE} is set, but no Docker engine answers: {error}"));
            return None;
        }
        let container = tokio::task::spawn_blocking(|| {
            let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
            command.args(["--exact", "docker::owner", "--ignored", "--nocapture"]).env(IS_OWNER, "1");
            let mut owner = Running::start(command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()));
            let announced = owner.line_after(ANNOUNCEMENT);
            let (id, url) = announced.split_once(' ').expect("an id and a URL");
            Self { id: id.to_owned(), url: url.to_owned(), owner }
        });
        let container = container.await.expect("the owner starts a container");
        container.until_it_accepts().await;
        Some(container)
    }

    /// Starts one, or says that a test is left out.
    pub(crate) async fn or_left_out(test: &str) -> Option<Self> {
        let container = Self::start().await;
        if container.is_none() {
            say(&format!("left out, since it needs a container ({IMAGE}): {test}"));
        }
        container
    }

    /// Sends the server a signal that ends it, and starts the container again. `INT` is how an operator restarts a server;
    /// `KILL` ends all processes of the container in the same moment.
    pub(crate) async fn end_and_start(&self, signal: &str) {
        let engine = engine().await;
        let options = KillContainerOptions { signal: signal.to_owned() };
        engine.kill_container(&self.id, Some(options)).await.expect("the container is signalled");
        eventually("the container is down", async || {
            let state = engine.inspect_container(&self.id, None).await.expect("the container is known").state;
            (state.and_then(|state| state.running) == Some(false)).then_some(())
        })
        .await;
        engine.start_container(&self.id, None).await.expect("the container starts");
    }

    /// Takes it off the network, while the server goes on.
    pub(crate) async fn cut_off(&self) {
        let cut = NetworkDisconnectRequest { container: self.id.clone(), force: None };
        engine().await.disconnect_network(NETWORK, cut).await.expect("the container is taken off the network");
    }

    /// Puts it on the network again.
    pub(crate) async fn reconnect(&self) {
        let connect = NetworkConnectRequest { container: self.id.clone(), ..NetworkConnectRequest::default() };
        engine().await.connect_network(NETWORK, connect).await.expect("the container is put on the network");
    }

    /// Waits until the server accepts connections. (What listens on the port before is the engine.)
    async fn until_it_accepts(&self) {
        eventually("the server in the container accepts connections", async || {
            tokio_postgres::connect(&self.url, NoTls).await.ok().map(drop)
        })
        .await;
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.owner.release();
    }
}

async fn engine() -> Docker {
    docker_client_instance().await.expect("the engine answered before")
}

async fn ping() -> Result<(), Box<dyn std::error::Error>> {
    docker_client_instance().await?.ping().await?;
    Ok(())
}

/// Says something on standard error also where the harness captures what tests print.
fn say(text: &str) {
    // Nobody is harmed where it cannot be said.
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[tokio::test]
async fn a_container_is_gone_when_the_owners_input_ends() {
    let Some(container) = Container::or_left_out("the end of a container").await else { return };
    let id = container.id.clone();
    let engine = engine().await;
    engine.inspect_container(&id, None).await.expect("the container is known");
    drop(container);
    engine.inspect_container(&id, None).await.expect_err("the container is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the process that owns a container, and no test"]
async fn owner() {
    if std::env::var_os(IS_OWNER).is_none() {
        return;
    }
    let image = std::env::var(IMAGE).expect("an image is named");
    let password = Uuid::now_v7().simple().to_string();
    let (container, port) = start(&image, &password).await;
    let host = container.get_host().await.expect("the engine has an address");
    // A line of its own: the harness has begun one.
    println!("\n{ANNOUNCEMENT}{} postgresql://postgres:{password}@{host}:{port}/postgres", container.id());
    let until_the_end = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    tokio::task::spawn_blocking(until_the_end).await.expect("no panic").expect("the end of the input");
    container.rm().await.expect("the container is removed");
    // The harness would report to nobody.
    std::process::exit(0);
}

/// Starts a container on a port where nobody listens.
async fn start(image: &str, password: &str) -> (ContainerAsync<GenericImage>, u16) {
    let some_port = || {
        let some = PORTS.start + Uuid::now_v7().as_u128() % (PORTS.end - PORTS.start);
        u16::try_from(some).expect("ports are small")
    };
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    let port = std::iter::repeat_with(some_port).take(PORTS_MAX).find(is_free).expect("a free port");
    let (name, tag) = image.rsplit_once(':').unwrap_or((image, "latest"));
    let request = GenericImage::new(name, tag)
        .with_cmd(ARGUMENTS)
        .with_env_var("POSTGRES_PASSWORD", password)
        .with_mapped_port(port, 5432.tcp());
    (request.start().await.expect("the engine starts a container of the image"), port)
}
