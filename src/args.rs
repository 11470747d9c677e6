//! The command line, as people type it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use iii_engine::project::HostLoopback;
use iii_engine::shared_cache::CacheName;
use iii_oci::export::{Compression, Destination};
use iii_oci::{self as oci, Platform};
#[cfg(target_os = "linux")]
use iii_overlay::adapter::vhost_user::Tag;

use super::limits;
use super::quantity::{self, Limit, Room};

/// Runs iii workers in sandboxes made of shared layers.
#[derive(Debug, Parser)]
#[command(
    name = "iii",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Iii {
    #[command(subcommand)]
    pub command: Command,
}

/// The program that the engine's own `iii worker …` hands over to.
#[derive(Debug, Parser)]
#[command(
    name = "iii-worker",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct IiiWorker {
    #[command(subcommand)]
    pub command: WorkerCommand,
}

/// What `iii-worker` does.
#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub enum WorkerCommand {
    #[command(flatten)]
    Worker(Worker),
    #[command(flatten)]
    About(About),
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run and build workers
    #[command(subcommand, arg_required_else_help = true)]
    Worker(Worker),
    /// Bring base images into the store, list and remove them
    #[command(subcommand, arg_required_else_help = true)]
    Image(Image),
    /// Say what is in the store, why, and what it takes
    #[command(subcommand, arg_required_else_help = true)]
    Store(Store),
    #[command(flatten)]
    About(About),
}

/// What a program says of itself.
#[derive(Debug, Subcommand)]
pub enum About {
    /// Print a script by which a shell completes these commands
    #[command(after_help = "Examples:
  iii completions bash >~/.local/share/bash-completion/completions/iii
  iii-worker completions bash >~/.local/share/bash-completion/completions/iii-worker
  iii completions zsh >~/.zfunc/_iii                # with ~/.zfunc in fpath, before compinit
  iii completions fish >~/.config/fish/completions/iii.fish")]
    Completions(Completions),
    /// Print the manual page of a command, or write those of all
    #[command(after_help = "Examples:
  iii man worker snapshot | man -l -
  iii man --out ~/.local/share/man/man1             # then: man iii-worker-snapshot")]
    Man(Manual),
}

#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: ShellKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShellKind {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, Args)]
pub struct Manual {
    /// The command [default: the program itself]
    pub command: Vec<String>,
    /// Write the pages of all commands into this directory, which is made if it is missing
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Worker {
    /// Run a project in a sandbox, in the foreground
    ///
    /// Setup and install run once and are stored as layers; they run again only when something that they looked at has
    /// changed. What the worker itself writes stays from run to run. While it runs, an edit of the project shows inside and runs
    /// the start command again. Ctrl-C ends it.
    #[command(after_help = "Examples:
  iii worker dev ./my-project
  iii worker dev ./my-project --rebuild      # everything from scratch
  iii worker dev ./my-project --fresh        # forget what the worker wrote, keep what is built
  iii worker dev . --name api --port 49200
  iii worker dev . --no-watch                # edits show at the next start
  iii worker dev . --runtime libkrun --allow-host-loopback 5432   # in a microVM, with the database of this machine
  iii worker dev . --cache-from docker://registry.example/team/cache")]
    Dev(Dev),
    /// Build a project's layers and start nothing
    #[command(after_help = "Examples:
  iii worker build ./my-project
  iii worker build ./my-project --json | jq '.layers[] | {kind, status}'
  iii worker build . --cache-from docker://registry.example/team/cache --cache-to docker://registry.example/team/cache

Environment, instead of the options:
  III_CACHE_FROM=docker://HOST/REPOSITORY,...   caches that layers are fetched from: whoever may write there decides
                                                what runs in your sandboxes
  III_CACHE_TO=docker://HOST/REPOSITORY         the cache that layers are put into, with all that scripts wrote")]
    Build(Build),
    /// Make a standard image of a worker, for any container engine or cluster
    ///
    /// A path is built first, as `worker build` does it; a name stands for the layers that the worker last ran on. The image has
    /// the worker's layers, its start command, working directory, user, and its environment without what looks like a
    /// secret. It has all of the project's files but the excluded ones, and nothing that the worker has written. Where the
    /// engine is has to be said where the image is run, as `III_URL`.
    #[command(after_help = "Examples:
  iii worker export ./my-project                        # into the OCI layout ./iii-dev-my-project
  iii worker export ./my-project --to docker://registry.example.com/team/my-worker:1
  iii worker export iii-dev-my-project --to docker-archive:worker.tar
  podman load -i worker.tar
  podman run -e III_URL=ws://HOST:49134 localhost/iii-dev-my-project

Environment:
  SOURCE_DATE_EPOCH      the time at which the image was created, in seconds since 1970
                         [default: that of its newest file]")]
    Export(ExportWorker),
    /// Run one more command in a worker's sandbox
    ///
    /// It runs beside the worker, as its user, with its environment and in its working directory, and ends with it at the latest.
    /// Exits with what the command exits with, or 124 if it had no more time.
    #[command(after_help = "Examples:
  iii worker exec iii-dev-my-project -- ls -la
  iii worker exec iii-dev-my-project -t -- sh          # a shell in a terminal
  iii worker exec api -e DEBUG=1 -w /tmp --timeout 30 -- env")]
    Exec(Exec),
    /// Add projects to the engine's config.yaml as managed workers
    ///
    /// All their layers are built first, equal ones once and different ones at once. Their names are those of their manifests, or
    /// else of their directories. An engine that runs starts them.
    #[command(after_help = "Examples:
  iii worker add ./api ./mailer ../shared/cron
  iii worker add ./api --force                  # forget what it wrote, run setup and install again
  iii worker add api --force --reset-config     # the same, by its name, and drop `config:` of its entry
  iii worker add ./api --runtime libkrun        # in a microVM whenever it is started, or not at all

Environment:
  III_CONFIG_PATH=PATH     the engine's config.yaml, if not ./config.yaml")]
    Add(Add),
    /// Start a worker in the background
    ///
    /// It ends with its start command, with `stop`, or with the engine that started it. --runtime and --allow-host-loopback hold
    /// until it is started with others.
    #[command(after_help = "Examples:
  iii worker start api
  iii worker start api --no-wait --port 49200
  iii worker start api --watch         # edits of its project reload it

Environment:
  III_URL=ws://HOST:PORT   where the engine listens, if not --port and --address say
  III_ENGINE_PID=PID       the engine's process: the worker ends with it
  III_CONFIG_PATH=PATH     the engine's config.yaml, if not ./config.yaml")]
    Start(StartWorker),
    /// Stop workers: SIGTERM, and SIGKILL ten seconds later
    #[command(after_help = "Examples:
  iii worker stop api
  iii worker stop api mailer")]
    Stop(StopWorkers),
    /// Stop a worker, and start it as it was started
    #[command(after_help = "Examples:
  iii worker restart api
  iii worker restart api --port 49200")]
    Restart(StartWorker),
    /// Remove workers from config.yaml, with all that is kept for them
    ///
    /// One that runs is stopped. What it wrote, its snapshots and its log are gone; its layers stay in the store while others need
    /// them, and what was forked from it is not touched. Sandboxes of `worker dev` are removed by their names, too, when they
    /// do not run; `iii store df` shows those that keep anything.
    #[command(after_help = "Examples:
  iii worker remove api
  iii worker remove iii-dev-my-project # what `worker dev` has left of ./my-project
  iii worker remove -y api mailer      # also if they run")]
    Remove(RemoveWorkers),
    /// List the workers
    #[command(after_help = "Examples:
  iii worker list
  iii worker list --json | jq -r '.workers[] | select(.status == \"running\") | .name'")]
    List(ListWorkers),
    /// Say how a worker is
    #[command(after_help = "Examples:
  iii worker status api
  iii worker status api --json | jq .pid")]
    Status(StatusOfWorker),
    /// Show what a worker prints
    #[command(after_help = "Examples:
  iii worker logs api
  iii worker logs api -f -n 20")]
    Logs(Logs),
    /// Forget what workers wrote and printed; they stay workers, with their layers
    ///
    /// Without a name, all of them. One that runs is stopped. Snapshots stay.
    #[command(after_help = "Examples:
  iii worker clear api
  iii worker clear -y")]
    Clear(Clear),
    /// Take a snapshot of what a worker wrote, to go back to or to fork from
    ///
    /// One that runs goes on: the snapshot is of one moment, as if the machine had lost its power then. It takes the space of what
    /// changes afterwards. It is kept until it or its worker is removed, also if the worker is cleared. Sandboxes of `worker dev`
    /// have snapshots, too; a worker in a microVM has to be stopped for it.
    #[command(after_help = "Examples:
  iii worker snapshot api before-upgrade
  iii worker snapshot api                           # called by the time
  iii worker snapshot api before-upgrade --force    # in place of the one of that name
  iii worker snapshot --remove api before-upgrade")]
    Snapshot(TakeSnapshot),
    /// List the snapshots of a worker
    #[command(after_help = "Examples:
  iii worker snapshots api
  iii worker snapshots api --json | jq -r '.snapshots[].tag'")]
    Snapshots(ListSnapshots),
    /// Have a worker be again what it was at a snapshot
    ///
    /// What it wrote since is gone; to keep it, take another snapshot before. A worker that runs is stopped, and started as it was.
    /// What changed in the project since the snapshot stays changed.
    #[command(after_help = "Examples:
  iii worker rollback api before-upgrade
  iii worker snapshot api after && iii worker rollback api before-upgrade")]
    Rollback(Rollback),
    /// Make another worker of the same project that begins with what a worker has written
    ///
    /// It gets an entry in config.yaml with all that the other's has. Both share what is stored, and nothing is built again.
    #[command(after_help = "Examples:
  iii worker fork api api-2
  iii worker fork api@before-upgrade api-old && iii worker start api-old")]
    Fork(Fork),
    /// Make a small project that works
    #[command(after_help = "Examples:
  iii worker init ./hello
  iii worker init ./hello --language python && iii worker dev ./hello")]
    Init(Init),
    /// Live as long as the engine
    #[command(
        name = "worker-manager-daemon",
        hide = true,
        after_help = "Examples:
  III_LIFELINE_FD=3 iii worker worker-manager-daemon"
    )]
    ManagerDaemon,
    /// Say what this machine has of what workers need, and what to do where something is missing
    ///
    /// Exits with 1 if no worker can run here.
    #[command(after_help = "Examples:
  iii worker doctor
  iii worker doctor --json | jq -r .runtime      # what --runtime auto takes")]
    Doctor(Doctor),
}

/// The engine of managed workers.
#[derive(Debug, Args)]
pub struct ItsEngine {
    /// Port of the engine [default: that of `III_URL`, or 49134]
    #[arg(long)]
    pub port: Option<u16>,
    /// Host name or address of the engine [default: that of `III_URL`, or localhost]
    #[arg(long)]
    pub address: Option<String>,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct ItsConfig {
    /// The engine's config.yaml [default: `III_CONFIG_PATH`, or ./config.yaml]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

/// Whether a managed worker follows its project.
#[derive(Debug, Args)]
pub struct Follow {
    /// Reload the worker when its project changes, now and whenever it is started
    #[arg(long, overrides_with = "no_watch")]
    pub watch: bool,
    /// Leave the worker as it was started, as it is unless --watch was given once
    #[arg(long, overrides_with = "watch")]
    pub no_watch: bool,
}

impl Follow {
    /// What was said, if anything.
    pub fn asked(&self) -> Option<bool> {
        (self.watch || self.no_watch).then_some(self.watch)
    }
}

#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of its own"
)]
pub struct Add {
    /// Directories of projects, which begin with `.`, `/` or `~`, or names of workers that were added before
    #[arg(value_name = "PATH|NAME", required = true)]
    pub workers: Vec<String>,
    /// Stop the worker, delete all that is kept for it, and run setup and install again
    #[arg(short, long)]
    pub force: bool,
    /// Drop `config:` of its entry, too
    #[arg(long, requires = "force")]
    pub reset_config: bool,
    /// Do not wait until the engine has started it
    #[arg(long)]
    pub no_wait: bool,
    /// Accepted for scripts; nothing is asked
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub follow: Follow,
    #[command(flatten)]
    pub engine: ItsEngine,
    #[command(flatten)]
    pub sandbox: Sandbox,
}

#[derive(Debug, Args)]
pub struct StartWorker {
    /// The worker's name
    pub name: String,
    /// Return before it runs; what goes wrong then is in its log
    #[arg(long)]
    pub no_wait: bool,
    #[command(flatten)]
    pub follow: Follow,
    #[command(flatten)]
    pub engine: ItsEngine,
    #[command(flatten)]
    pub sandbox: Sandbox,
}

#[derive(Debug, Args)]
pub struct StopWorkers {
    /// The workers' names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Accepted for scripts; nothing is asked
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct RemoveWorkers {
    /// The workers' names
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Stop what runs without asking
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct ListWorkers {
    #[command(flatten)]
    pub config: ItsConfig,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StatusOfWorker {
    /// The worker's name
    pub name: String,
    #[command(flatten)]
    pub config: ItsConfig,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// The worker's name
    pub name: String,
    /// Show what comes, too, until the worker ends
    #[arg(short, long)]
    pub follow: bool,
    /// How many lines
    #[arg(short = 'n', long, default_value_t = 100)]
    pub lines: usize,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct Clear {
    /// The worker's name [default: all workers]
    pub name: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct TakeSnapshot {
    /// The worker's name
    pub name: String,
    /// What the snapshot is called [default: the time, as in 20261122T080149Z]
    #[arg(required_if_eq("remove", "true"))]
    pub tag: Option<String>,
    /// Take it in place of one that is called so
    #[arg(short, long, conflicts_with = "remove")]
    pub force: bool,
    /// Remove the snapshot instead
    #[arg(long)]
    pub remove: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct ListSnapshots {
    /// The worker's name
    pub name: String,
    #[command(flatten)]
    pub config: ItsConfig,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Rollback {
    /// How it is started again, if it ran.
    #[command(flatten)]
    pub start: StartWorker,
    /// The snapshot
    pub tag: String,
}

#[derive(Debug, Args)]
pub struct Fork {
    /// The worker's name, and the snapshot to begin with, if not what it has written by now
    #[arg(value_name = "NAME[@TAG]")]
    pub from: String,
    /// The new worker's name
    pub new: String,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct Init {
    /// Where; made if it is missing
    #[arg(default_value = ".")]
    pub dir: PathBuf,
    /// What it is written in
    #[arg(long, value_enum, default_value_t = ProjectLanguage::Typescript)]
    pub language: ProjectLanguage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProjectLanguage {
    Typescript,
    Javascript,
    Python,
    Rust,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// Name of the worker, as `worker dev` runs it
    pub name: String,
    /// A variable beside the worker's; can be given several times
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// Where to run, absolute [default: the worker's]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Give the command a terminal, if this is run in one
    #[arg(short, long)]
    pub tty: bool,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    pub engine: Engine,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

/// Where the engine listens.
#[derive(Debug, Args)]
pub struct Engine {
    /// Port of the engine
    #[arg(long, default_value_t = 49134)]
    pub port: u16,
    /// Host name or address of the engine
    #[arg(long, default_value = "localhost")]
    pub address: String,
}

#[derive(Debug, Args)]
pub struct Target {
    /// The project's directory
    pub path: PathBuf,
    /// Run setup and install again, whatever is stored
    #[arg(long)]
    pub rebuild: bool,
    /// Name of the sandbox [default: iii-dev-<directory>]
    #[arg(long)]
    pub name: Option<String>,
    /// Base image to use instead of the project's
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<String>,
    /// Fetch the layers of setup and install from this cache, a repository of any registry; can be given several times
    #[arg(long, value_name = "docker://HOST/REPO")]
    pub cache_from: Vec<CacheName>,
    /// Put the layers of setup and install into this cache for others
    #[arg(long, value_name = "docker://HOST/REPO")]
    pub cache_to: Option<CacheName>,
    #[command(flatten)]
    pub sandbox: Sandbox,
}

/// How workers and their steps are isolated.
#[derive(Debug, Args)]
pub struct Sandbox {
    /// How to isolate the worker [default: `III_RUNTIME`, or auto]
    #[arg(long, value_enum)]
    pub runtime: Option<Runtime>,
    /// Let a microVM reach this port of the host's localhost, or all of it; can be given several times. The engine's port is
    /// open, and in namespaces all are
    #[arg(long, value_name = "PORT|all", value_parser = host_loopback)]
    pub allow_host_loopback: Vec<HostLoopback>,
}

fn host_loopback(text: &str) -> Result<HostLoopback, String> {
    HostLoopback::parse(text).ok_or_else(|| "expected a port from 1 to 65535, or all".into())
}

#[derive(Debug, Args)]
pub struct Dev {
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub engine: Engine,
    /// Drop what the sandbox wrote; keep the layers
    #[arg(long)]
    pub fresh: bool,
    /// Leave the worker as it was started, whatever changes in its project
    #[arg(long)]
    pub no_watch: bool,
}

#[derive(Debug, Args)]
pub struct Build {
    #[command(flatten)]
    pub target: Target,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ExportWorker {
    /// The worker's name, or its project's directory, which begins with `.`, `/` or `~`
    #[arg(value_name = "NAME|PATH")]
    pub worker: String,
    /// Where to: `oci:DIR[:TAG]`, `docker-archive:FILE[:NAME]` or `docker://HOST/REPO[:TAG]` [default: oci:NAME]
    #[arg(long, value_name = "DEST")]
    pub to: Option<Destination>,
    /// Take this variable of the manifest in, though it looks like a secret
    #[arg(long, value_name = "NAME")]
    pub env: Vec<String>,
    /// The base image that it was built on, if not the project's
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<String>,
    #[command(flatten)]
    pub place: Where,
}

/// How an image comes to where it is to go.
#[derive(Debug, Args)]
pub struct Where {
    /// How to compress the layers: gzip, which every engine takes, zstd, or none; in a docker-archive they are plain
    #[arg(long, default_value_t)]
    pub compression: Compression,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    /// A microVM where one can run, else namespaces
    Auto,
    /// Linux namespaces: own files, processes and users, the host's kernel and network
    Namespace,
    /// A libkrun microVM
    Libkrun,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Pull an image from its registry
    ///
    /// The tag is resolved anew, and stands for that image until it is pulled again. Layers that are in the store are not
    /// downloaded; after an interruption, run it again to go on. Logins are those of docker and podman.
    #[command(after_help = "Examples:
  iii image pull node:24-slim
  iii image pull localhost:5000/base@sha256:4f2a...   # exactly this one
  iii image pull node:24-slim --platform linux/arm64

Environment:
  III_INSECURE_REGISTRIES=HOST[:PORT],...     registries without TLS, besides localhost
  III_REGISTRY_MIRRORS=docker.io=HOST[:PORT][/PREFIX],...
  SSL_CERT_FILE, HTTPS_PROXY, NO_PROXY        a private CA, a proxy and what it is not for

A limit that an image passes is named in the error. NAME=VALUE of --limit, and of III_LIMITS=NAME=VALUE,...:
  entries     of one archive                  bytes       of an archive, and of its files
  path        length of a name                ratio       plain bytes per compressed byte
  metadata    names and xattrs of an archive  ratio-from  size below which that does not matter
  extension   a PAX or GNU extension header   holes       of an archive's sparse files
  document    a manifest, index or config     segments    stretches of data of a sparse file")]
    Pull(Pull),
    /// Import a root filesystem (directory or tar) or an OCI layout
    #[command(after_help = "Examples:
  iii image import ./node.tar --as docker.io/iiidev/node:latest
  iii image import ./oci-layout --as node:24-slim
  iii image import ./huge.tar --as huge --limit bytes=128GiB --limit entries=2000000

A limit that an image passes is named in the error. NAME=VALUE of --limit, and of III_LIMITS=NAME=VALUE,...:
  entries     of one archive                  bytes       of an archive, and of its files
  path        length of a name                ratio       plain bytes per compressed byte
  metadata    names and xattrs of an archive  ratio-from  size below which that does not matter
  extension   a PAX or GNU extension header   holes       of an archive's sparse files
  document    a manifest, index or config     segments    stretches of data of a sparse file")]
    Import(Import),
    /// Put an image into an OCI layout, an archive or a registry
    ///
    /// Its layers stay what they are; a destination that has one of them is not sent it again. The same image has the same
    /// digest each time, though not the one that it was pulled by: it is compressed anew.
    #[command(after_help = "Examples:
  iii image export node:24-slim --to oci:./images:node-24
  iii image export node:24-slim --to docker-archive:node.tar
  iii image export node:24-slim --to docker://localhost:5000/node:24-slim --compression zstd

Environment:
  SOURCE_DATE_EPOCH      the time at which the image was created, in seconds since 1970
                         [default: that of its newest file]")]
    Export(ExportImage),
    /// List the images in the store
    #[command(after_help = "Examples:
  iii image list
  iii image list --json | jq -r '.images[] | select(.origin == \"registry\") | .name'")]
    List(List),
    /// Say what an image is: its digest, its layers, how it is run
    #[command(after_help = "Examples:
  iii image inspect node:24-slim
  iii image inspect node:24-slim --json | jq -r .config.env[]")]
    Inspect(InspectImage),
    /// Remove the name of an image
    ///
    /// Layers that nothing else keeps are removed by the next collection of garbage.
    #[command(after_help = "Examples:
  iii image remove node:24-slim")]
    Remove(RemoveImage),
}

#[derive(Debug, Args)]
pub struct Pull {
    /// The image's name, as docker takes it
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// What it is to be built for [default: linux on this machine's architecture]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<Platform>,
    #[command(flatten)]
    pub limits: Raised,
}

#[derive(Debug, Args)]
pub struct Raised {
    /// Take in more of something than usual, as in bytes=128GiB; can be given several times
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = limits::parse)]
    pub limits: Vec<(oci::Limit, u64)>,
}

#[derive(Debug, Args)]
pub struct ExportImage {
    /// The image's name, as docker takes it
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Where to: `oci:DIR[:TAG]`, `docker-archive:FILE[:NAME]` or `docker://HOST/REPO[:TAG]`
    #[arg(long, value_name = "DEST")]
    pub to: Destination,
    #[command(flatten)]
    pub place: Where,
}

#[derive(Debug, Args)]
pub struct InspectImage {
    /// The image's name, as docker takes it
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RemoveImage {
    /// The image's name, as docker takes it
    #[arg(value_name = "IMAGE")]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Import {
    /// A rootfs directory, a rootfs tar (plain, gzip, zstd), an OCI layout, or a docker archive
    pub path: PathBuf,
    /// Name of the image that it stands for
    #[arg(long = "as", value_name = "IMAGE")]
    pub name: String,
    #[command(flatten)]
    pub limits: Raised,
}

/// Wherever a layer is named, the beginning of its id will do, from 4 hex digits on, if no other layer's begins so.
#[derive(Debug, Subcommand)]
pub enum Store {
    /// Say where the bytes are: in total, by worker and image, by layer
    ///
    /// LOGICAL is what the files would take if they were unpacked. UNIQUE is what is stored for this one alone, SHARED what it
    /// shares with others; both count equal contents once. The sums agree with `du`.
    #[command(after_help = "Examples:
  iii store df
  iii store df --all                         # every layer, not only the largest
  iii store df --json | jq '.refs[] | {name, unique}'")]
    Df(Df),
    /// List the layers, the most recently used first
    #[command(after_help = "Examples:
  iii store list
  iii store list --json | jq -r '.layers[] | select(.kept_by == []) | .id'")]
    List(List),
    /// Say what a layer holds, what made it, and what that looked at
    ///
    /// Of the name of a worker or an image, says which layers it has.
    #[command(after_help = "Examples:
  iii store inspect 4f2a91
  iii store inspect 4f2a91 --entries         # its files, as `ls -l` shows them
  iii store inspect iii-dev-my-project       # a worker's layers")]
    Inspect(Inspect),
    /// Say which paths differ between two layers
    ///
    /// A: only the second has it. D: only the first has it. M: type, mode, owner, contents, target or xattrs differ. mtimes
    /// are no difference. Control characters, invalid UTF-8 and `%` in paths are written as `%` and two hex digits.
    #[command(after_help = "Examples:
  iii store diff 4f2a91 77c0de
  iii store diff 4f2a91 77c0de --json | jq '[.changes[].new_size] | add'")]
    Diff(Diff),
    /// Say what keeps a layer
    #[command(after_help = "Examples:
  iii store why 4f2a91
  iii store why 4f2a91 --json | jq '.kept_by[].kind'")]
    Why(Why),
    /// Free what nobody needs
    ///
    /// What workers, images and running processes have stays, whatever the limits. What else was built is kept for use again
    /// as long as the limits allow, and goes by how much it would cost to build again, by its size, and by how long it
    /// was not used. Layers go into a trash first, where builds that want them after all find them. Sizes are given in
    /// B, KB, MB, GB, TB or KiB, MiB, GiB, TiB, times in s, m, h, d, w. A gc by these defaults runs after a build when
    /// the store or the disk is fuller than they say; `III_GC=off` keeps it from doing so.
    #[command(after_help = "Examples:
  iii store gc --dry-run                     # what would go, what would stay, and why
  iii store gc --max-size 5GB --keep 2d
  iii store gc --keep 0s --grace 0s          # everything that is in no use at the moment, at once")]
    Gc(Gc),
    /// Serve layers as a filesystem to a virtual machine
    ///
    /// Over vhost-user-fs, which QEMU, cloud-hypervisor and others take as a virtiofs device. The first that connects is served
    /// until it goes, or until this is asked to end. What the guest writes is thrown away then, unless --upper says where to
    /// keep it. A kept upper does not keep the layers below it.
    #[command(after_help = "Examples:
  iii store serve --image node:24-slim --socket /run/user/1000/root.sock
  iii store serve 4f2a91 77c0de --socket ./root.sock --upper ./upper --json
  qemu-system-x86_64 … -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -M q35,memory-backend=mem \\
    -chardev socket,id=c,path=./root.sock -device vhost-user-fs-pci,chardev=c,tag=root,queue-size=1024
  mount -t virtiofs root /mnt                # in the guest")]
    #[cfg(target_os = "linux")]
    Serve(Serve),
    /// Say whether everything in the store is what its name says
    ///
    /// Without --data: the structure, every index, layer, key and ref. With it, every byte of every file is hashed, too. It
    /// runs beside builds and workers. Exit code 1: there are problems, or some that --repair did not mend.
    #[command(after_help = "Examples:
  iii store verify
  iii store verify --data                    # hash everything
  iii store verify --data --repair           # set aside what is damaged, so that it is built again
  iii store verify --json | jq '.report.problems[]'")]
    Verify(Verify),
    /// Bring a store of an earlier version up to date
    ///
    /// Nothing is lost, and it can be cut short and run again. No worker and no build may run meanwhile.
    #[command(after_help = "Examples:
  iii store migrate")]
    Migrate(Migrate),
}

#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
pub struct Serve {
    /// Layers, bottom first
    #[arg(value_name = "LAYER", required_unless_present = "image")]
    pub layers: Vec<String>,
    /// An image, whose layers go below the others
    #[arg(long)]
    pub image: Option<String>,
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// What the guest mounts it as
    #[arg(long, default_value = "root")]
    pub tag: Tag,
    /// Directory for what the guest writes, to be kept
    #[arg(long, value_name = "DIR")]
    pub upper: Option<PathBuf>,
    /// Threads that answer
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: u8,
    /// At the end, print the requests by operation as one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// Hash the contents of every file
    #[arg(long)]
    pub data: bool,
    /// Set aside what is damaged, and drop what depends on it
    #[arg(long)]
    pub repair: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Gc {
    /// Print what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Make the store no larger than this, or `none` [default: 20GiB]
    #[arg(long, value_name = "SIZE", value_parser = quantity::size_limit)]
    pub max_size: Option<Limit<u64>>,
    /// Leave this much of the disk free, or `none` [default: 10%, but no more than 5GB]
    #[arg(long, value_name = "SHARE|SIZE", value_parser = quantity::room)]
    pub min_free: Option<Limit<Room>>,
    /// Drop what was not used for this long [default: 14d]
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    pub keep: Option<Duration>,
    /// How long layers stay in the trash [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    pub grace: Option<Duration>,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Df {
    /// Show every layer
    #[arg(long)]
    pub all: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// The layer's id, or the name of a worker or an image
    pub layer: String,
    /// List what is in it
    #[arg(long)]
    pub entries: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Diff {
    /// The old layer's id
    #[arg(value_name = "LAYER")]
    pub old: String,
    /// The new layer's id
    #[arg(value_name = "LAYER")]
    pub new: String,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Why {
    /// The layer's id
    pub layer: String,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct List {
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn leaves(command: &clap::Command) -> Vec<&clap::Command> {
        if command.has_subcommands() {
            let own = command.get_subcommands();
            own.filter(|command| command.get_name() != "help")
                .flat_map(leaves)
                .collect()
        } else {
            vec![command]
        }
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for mut program in [Iii::command(), IiiWorker::command()] {
            program.build();
            program.clone().debug_assert();
            let commands = leaves(&program);
            for command in commands {
                let name = command.get_name();
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(command.get_about().is_some(), "{name} has no help");
                assert!(help.contains("iii "), "{name} has no example");
            }
        }
    }

    #[test]
    fn both_names_take_the_same_worker_commands() {
        let long = Iii::try_parse_from(["iii", "worker", "dev", "p", "--port", "1", "--fresh"]);
        let short = IiiWorker::try_parse_from(["iii-worker", "dev", "p", "--port", "1", "--fresh"]);
        let (Ok(long), Ok(short)) = (long, short) else {
            panic!("both parse");
        };
        let (Command::Worker(long), WorkerCommand::Worker(short)) = (long.command, short.command)
        else {
            panic!("worker");
        };
        assert_eq!(format!("{long:?}"), format!("{short:?}"));
    }
}
