//! The arguments of every command, and their help.

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

/// Runs iii workers in sandboxes made of shared layers, under the name that an engine calls.
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

/// The commands of `iii-worker`.
#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "only one value exists")]
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
    /// Pull, import, export, list and remove base images
    #[command(subcommand, arg_required_else_help = true)]
    Image(Image),
    /// Inspect, collect, check and serve the store
    #[command(subcommand, arg_required_else_help = true)]
    Store(Store),
    #[command(flatten)]
    About(About),
}

/// Commands about the program itself.
#[derive(Debug, Subcommand)]
pub enum About {
    /// Print a completion script for a shell
    #[command(after_help = "Examples:
  iii completions bash >~/.local/share/bash-completion/completions/iii
  iii-worker completions bash >~/.local/share/bash-completion/completions/iii-worker
  iii completions zsh >~/.zfunc/_iii                # with ~/.zfunc in fpath, before compinit
  iii completions fish >~/.config/fish/completions/iii.fish")]
    Completions(Completions),
    /// Print the manual page of a command, or write all pages
    #[command(after_help = "Examples:
  iii man worker snapshot | man -l -
  iii man --out ~/.local/share/man/man1             # then: man iii-worker-snapshot")]
    Man(Manual),
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to write the script for
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
    /// Command to describe [default: the program itself]
    pub command: Vec<String>,
    /// Write the pages of all commands into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Worker {
    /// Run a project in a sandbox, in the foreground
    ///
    /// Setup and install run once and are stored as layers; they run again only when an input
    /// changed. The worker's own files stay from run to run. An edit of the project restarts the
    /// start command. Ctrl-C stops the worker.
    #[command(after_help = "Examples:
  iii worker dev ./my-project
  iii worker dev ./my-project --rebuild      # run setup and install again
  iii worker dev ./my-project --fresh        # drop the worker's files, keep the layers
  iii worker dev . --name api --port 49200
  iii worker dev . --no-watch                # edits take effect at the next start
  iii worker dev . --runtime libkrun --allow-host-loopback 5432
  iii worker dev . --cache-from docker://registry.example/team/cache")]
    Dev(Dev),
    /// Build a project's layers and start nothing
    #[command(after_help = "Examples:
  iii worker build ./my-project
  iii worker build ./my-project --json | jq '.layers[] | {kind, status}'
  iii worker build . --cache-from docker://registry.example/team/cache --cache-to docker://registry.example/team/cache

Environment, instead of the options:
  III_CACHE_FROM=docker://HOST/REPOSITORY,...   caches to fetch layers from; their writers decide
                                                about the programs in your sandboxes
  III_CACHE_TO=docker://HOST/REPOSITORY         cache to upload layers to, with all files of scripts")]
    Build(Build),
    /// Show the record that each step of a project would reuse, or the facts that differ
    ///
    /// The project is looked at as by `worker build`, but nothing runs and nothing is built. A
    /// step without a record that holds has its nearest records: the project's own last one, then
    /// up to three with the fewest differing facts.
    #[command(after_help = "Examples:
  iii worker explain ./my-project
  iii worker explain api --json | jq '.steps[] | {kind, verdict, reason}'")]
    Explain(Explain),
    /// Make a standard image of a worker, for any container engine or cluster
    ///
    /// A path is built first, as by `worker build`; a name stands for the layers that the worker
    /// last ran on. The image has the worker's layers, start command, working directory, user, and
    /// its environment without likely secrets. It has no file that the worker wrote. Set `III_URL`
    /// where the image runs.
    #[command(after_help = "Examples:
  iii worker export ./my-project                        # into the OCI layout ./iii-dev-my-project
  iii worker export ./my-project --to docker://registry.example.com/team/my-worker:1
  iii worker export iii-dev-my-project --to docker-archive:worker.tar
  podman load -i worker.tar
  podman run -e III_URL=ws://HOST:49134 localhost/iii-dev-my-project

Environment:
  SOURCE_DATE_EPOCH      creation time of the image, in seconds since 1970
                         [default: time of its newest file]")]
    Export(ExportWorker),
    /// Run a command in the sandbox of a running worker
    ///
    /// The command has the worker's user, environment and working directory, and ends with the
    /// worker at the latest. The exit code is the command's, or 124 after a timeout.
    #[command(after_help = "Examples:
  iii worker exec iii-dev-my-project -- ls -la
  iii worker exec iii-dev-my-project -t -- sh          # a shell in a terminal
  iii worker exec api -e DEBUG=1 -w /tmp --timeout 30 -- env")]
    Exec(Exec),
    /// Add projects to the engine's config.yaml as managed workers
    ///
    /// All layers are built first, equal ones once. A worker has the name of its manifest, or else
    /// of its directory. A running engine starts the workers.
    #[command(after_help = "Examples:
  iii worker add ./api ./mailer ../shared/cron
  iii worker add ./api --force                  # drop its files, run setup and install again
  iii worker add api --force --reset-config     # also drop `config:` of its entry
  iii worker add ./api --runtime libkrun        # always in a microVM

Environment:
  III_CONFIG_PATH=PATH     the engine's config.yaml [default: ./config.yaml]")]
    Add(Add),
    /// Start a worker in the background
    ///
    /// The worker ends with its start command, with `stop`, or with the engine that started it.
    /// --runtime and --allow-host-loopback hold until a start with other values.
    #[command(after_help = "Examples:
  iii worker start api
  iii worker start api --no-wait --port 49200
  iii worker start api --watch         # reload it after edits

Environment:
  III_URL=ws://HOST:PORT   address of the engine, unless --port or --address is given
  III_ENGINE_PID=PID       process of the engine; the worker ends with it
  III_CONFIG_PATH=PATH     the engine's config.yaml [default: ./config.yaml]")]
    Start(StartWorker),
    /// Stop workers with SIGTERM, and with SIGKILL ten seconds later
    #[command(after_help = "Examples:
  iii worker stop api
  iii worker stop api mailer")]
    Stop(StopWorkers),
    /// Stop a worker and start it with the same options
    #[command(after_help = "Examples:
  iii worker restart api
  iii worker restart api --port 49200")]
    Restart(StartWorker),
    /// Remove workers from config.yaml, with their files, snapshots and logs
    ///
    /// A running worker is stopped. Layers stay in the store while others need them, and forks stay
    /// whole. Sandboxes of `worker dev` are removed by name too, unless they run; `iii store df`
    /// lists them.
    #[command(after_help = "Examples:
  iii worker remove api
  iii worker remove iii-dev-my-project # the sandbox of `worker dev ./my-project`
  iii worker remove -y api mailer      # even if they run")]
    Remove(RemoveWorkers),
    /// List workers
    #[command(after_help = "Examples:
  iii worker list
  iii worker list --json | jq -r '.workers[] | select(.status == \"running\") | .name'")]
    List(ListWorkers),
    /// Print the status of a worker
    #[command(after_help = "Examples:
  iii worker status api
  iii worker status api --json | jq .pid")]
    Status(StatusOfWorker),
    /// Print the log of a worker
    #[command(after_help = "Examples:
  iii worker logs api
  iii worker logs api -f -n 20")]
    Logs(Logs),
    /// Drop the files and logs of workers, and keep their layers
    ///
    /// Without a name, clears all workers. A running worker is stopped. Snapshots stay.
    #[command(after_help = "Examples:
  iii worker clear api
  iii worker clear -y")]
    Clear(Clear),
    /// Take a snapshot of a worker's files
    ///
    /// A running worker runs on: the snapshot has the state of one moment, as after a power cut. It
    /// stays until it or its worker is removed, even if the worker is cleared. Sandboxes of `worker
    /// dev` have snapshots too. A worker in a microVM has to be stopped first.
    #[command(after_help = "Examples:
  iii worker snapshot api before-upgrade
  iii worker snapshot api                           # named by the time
  iii worker snapshot api before-upgrade --force    # replace the one of that name
  iii worker snapshot --remove api before-upgrade")]
    Snapshot(TakeSnapshot),
    /// List the snapshots of a worker
    #[command(after_help = "Examples:
  iii worker snapshots api
  iii worker snapshots api --json | jq -r '.snapshots[].tag'")]
    Snapshots(ListSnapshots),
    /// Roll a worker's files back to a snapshot
    ///
    /// Later files are dropped; take another snapshot first to keep them. A running worker is
    /// stopped and started again. The project stays as it is.
    #[command(after_help = "Examples:
  iii worker rollback api before-upgrade
  iii worker snapshot api after && iii worker rollback api before-upgrade")]
    Rollback(Rollback),
    /// Add a worker of the same project that begins with the files of an existing one
    ///
    /// Its entry in config.yaml is a copy of the first one's. Both share the store, and nothing is
    /// built again.
    #[command(after_help = "Examples:
  iii worker fork api api-2
  iii worker fork api@before-upgrade api-old && iii worker start api-old")]
    Fork(Fork),
    /// Make a small project that works
    #[command(after_help = "Examples:
  iii worker init ./hello
  iii worker init ./hello --language python && iii worker dev ./hello")]
    Init(Init),
    /// Stay alive as long as the engine
    #[command(
        name = "worker-manager-daemon",
        hide = true,
        after_help = "Examples:
  III_LIFELINE_FD=3 iii worker worker-manager-daemon"
    )]
    ManagerDaemon,
    /// Check this machine's support for workers, and print remedies
    ///
    /// Exits with 1 if no worker can run here.
    #[command(after_help = "Examples:
  iii worker doctor
  iii worker doctor --json | jq -r .runtime      # the choice of --runtime auto")]
    Doctor(Doctor),
}

/// The engine of managed workers.
#[derive(Debug, Args)]
pub struct ItsEngine {
    /// Port of the engine [default: from `III_URL`, or 49134]
    #[arg(long)]
    pub port: Option<u16>,
    /// Host name or address of the engine [default: from `III_URL`, or localhost]
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
    /// Reload the worker after edits of its project, now and at later starts
    #[arg(long, overrides_with = "no_watch")]
    pub watch: bool,
    /// Do not reload the worker after edits; undoes --watch
    #[arg(long, overrides_with = "watch")]
    pub no_watch: bool,
}

impl Follow {
    /// The choice, if one was made.
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
    /// Project directories, which begin with `.`, `/` or `~`, or names of added workers
    #[arg(value_name = "PATH|NAME", required = true)]
    pub workers: Vec<String>,
    /// Stop the worker, delete its files, and run setup and install again
    #[arg(short, long)]
    pub force: bool,
    /// Also drop `config:` of its entry
    #[arg(long, requires = "force")]
    pub reset_config: bool,
    /// Return without waiting for the engine to start the worker
    #[arg(long)]
    pub no_wait: bool,
    /// Accepted for scripts; without effect
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
    /// Name of the worker
    pub name: String,
    /// Return before the worker runs; errors go to its log
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
    /// Names of the workers
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Accepted for scripts; without effect
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct RemoveWorkers {
    /// Names of the workers
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Stop running workers without asking
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
    /// Name of the worker
    pub name: String,
    #[command(flatten)]
    pub config: ItsConfig,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// Name of the worker
    pub name: String,
    /// Also print new lines, until the worker ends
    #[arg(short, long)]
    pub follow: bool,
    /// Number of lines
    #[arg(short = 'n', long, default_value_t = 100)]
    pub lines: usize,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct Clear {
    /// Name of the worker [default: all workers]
    pub name: Option<String>,
    /// Clear without asking
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct TakeSnapshot {
    /// Name of the worker
    pub name: String,
    /// Name of the snapshot [default: the time, as in 20261122T080149Z]
    #[arg(required_if_eq("remove", "true"))]
    pub tag: Option<String>,
    /// Replace a snapshot of that name
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
    /// Name of the worker
    pub name: String,
    #[command(flatten)]
    pub config: ItsConfig,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Rollback {
    /// Options of the start, if the worker ran.
    #[command(flatten)]
    pub start: StartWorker,
    /// Name of the snapshot
    pub tag: String,
}

#[derive(Debug, Args)]
pub struct Fork {
    /// Worker, and its snapshot [default: its files as they are]
    #[arg(value_name = "NAME[@TAG]")]
    pub from: String,
    /// Name of the new worker
    pub new: String,
    #[command(flatten)]
    pub config: ItsConfig,
}

#[derive(Debug, Args)]
pub struct Init {
    /// Directory of the project; created if missing
    #[arg(default_value = ".")]
    pub dir: PathBuf,
    /// Language of the project
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
    /// Name of a managed worker, or of a sandbox of `worker dev`
    pub name: String,
    /// Set a variable; can be repeated
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// Absolute working directory [default: the worker's]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Give the command a terminal, if this one is
    #[arg(short, long)]
    pub tty: bool,
    /// Kill the command after this time
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Command and its arguments
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

/// Address of the engine.
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
    /// Directory of the project
    pub path: PathBuf,
    /// Run setup and install again, even if their layers are stored
    #[arg(long)]
    pub rebuild: bool,
    /// Name of the sandbox [default: iii-dev-<directory>]
    #[arg(long)]
    pub name: Option<String>,
    /// Use this base image instead of the project's
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<String>,
    /// Fetch the layers of setup and install from this repository; can be repeated
    #[arg(long, value_name = "docker://HOST/REPO")]
    pub cache_from: Vec<CacheName>,
    /// Upload the layers of setup and install to this repository
    #[arg(long, value_name = "docker://HOST/REPO")]
    pub cache_to: Option<CacheName>,
    #[command(flatten)]
    pub sandbox: Sandbox,
}

/// Isolation of workers and their steps.
#[derive(Debug, Args)]
pub struct Sandbox {
    /// Isolate the worker by this runtime [default: `III_RUNTIME`, or auto]
    #[arg(long, value_enum)]
    pub runtime: Option<Runtime>,
    /// Let a microVM reach this port of the host's localhost, or all ports; can be repeated
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
    /// Drop the worker's files and keep the layers
    #[arg(long)]
    pub fresh: bool,
    /// Do not reload the worker after edits of its project
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
pub struct Explain {
    /// Worker's name, or project directory, which begins with `.`, `/` or `~`
    #[arg(value_name = "NAME|PATH")]
    pub worker: String,
    /// Use this base image instead of the project's
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<String>,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ExportWorker {
    /// Worker's name, or project directory, which begins with `.`, `/` or `~`
    #[arg(value_name = "NAME|PATH")]
    pub worker: String,
    /// Write to `oci:DIR[:TAG]`, `docker-archive:FILE[:NAME]` or `docker://HOST/REPO[:TAG]`
    /// [default: oci:NAME]
    #[arg(long, value_name = "DEST")]
    pub to: Option<Destination>,
    /// Include this variable of the manifest, even if it looks like a secret
    #[arg(long, value_name = "NAME")]
    pub env: Vec<String>,
    /// Base image that the worker was built on [default: the project's]
    #[arg(long, value_name = "IMAGE")]
    pub base: Option<String>,
    #[command(flatten)]
    pub place: Where,
}

/// Options of every export.
#[derive(Debug, Args)]
pub struct Where {
    /// Compress the layers with gzip, zstd or none; a docker-archive has plain layers
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
    /// Linux namespaces: own files, processes and users; the host's kernel and network
    Namespace,
    /// A libkrun microVM
    Libkrun,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Pull an image from its registry
    ///
    /// The tag is resolved again, and stands for that image until the next pull. Stored layers are
    /// not downloaded; after an interruption, run the command again. Logins are those of docker and
    /// podman.
    #[command(after_help = "Examples:
  iii image pull node:24-slim
  iii image pull localhost:5000/base@sha256:4f2a...   # exactly this one
  iii image pull node:24-slim --platform linux/arm64

Environment:
  III_INSECURE_REGISTRIES=HOST[:PORT],...     registries without TLS, besides localhost
  III_REGISTRY_MIRRORS=docker.io=HOST[:PORT][/PREFIX],...
  SSL_CERT_FILE, HTTPS_PROXY, NO_PROXY        a private CA, a proxy, hosts without proxy

An error names the limit that an image exceeds. NAME of --limit, and of III_LIMITS=NAME=VALUE,...:
  entries     of one archive                  bytes       of an archive, and of its files
  path        length of a name                ratio       plain bytes per compressed byte
  metadata    names and xattrs of an archive  ratio-from  size below which ratio does not count
  extension   a PAX or GNU extension header   holes       of an archive's sparse files
  document    a manifest, index or config     segments    stretches of data of a sparse file")]
    Pull(Pull),
    /// Import a root filesystem (directory or tar) or an OCI layout
    #[command(after_help = "Examples:
  iii image import ./node.tar --as docker.io/iiidev/node:latest
  iii image import ./oci-layout --as node:24-slim
  iii image import ./huge.tar --as huge --limit bytes=128GiB --limit entries=2000000

An error names the limit that an image exceeds. NAME of --limit, and of III_LIMITS=NAME=VALUE,...:
  entries     of one archive                  bytes       of an archive, and of its files
  path        length of a name                ratio       plain bytes per compressed byte
  metadata    names and xattrs of an archive  ratio-from  size below which ratio does not count
  extension   a PAX or GNU extension header   holes       of an archive's sparse files
  document    a manifest, index or config     segments    stretches of data of a sparse file")]
    Import(Import),
    /// Export an image to an OCI layout, an archive or a registry
    ///
    /// A layer that the destination has is not sent again. Each export of an image has the same
    /// digest, but not the digest of the pull, because layers are compressed again.
    #[command(after_help = "Examples:
  iii image export node:24-slim --to oci:./images:node-24
  iii image export node:24-slim --to docker-archive:node.tar
  iii image export node:24-slim --to docker://localhost:5000/node:24-slim --compression zstd

Environment:
  SOURCE_DATE_EPOCH      creation time of the image, in seconds since 1970
                         [default: time of its newest file]")]
    Export(ExportImage),
    /// List images
    #[command(after_help = "Examples:
  iii image list
  iii image list --json | jq -r '.images[] | select(.origin == \"registry\") | .name'")]
    List(List),
    /// Print the digest, layers and configuration of an image
    #[command(after_help = "Examples:
  iii image inspect node:24-slim
  iii image inspect node:24-slim --json | jq -r .config.env[]")]
    Inspect(InspectImage),
    /// Remove the name of an image
    ///
    /// The next collection removes layers that nothing else keeps.
    #[command(after_help = "Examples:
  iii image remove node:24-slim")]
    Remove(RemoveImage),
}

#[derive(Debug, Args)]
pub struct Pull {
    /// Name of the image, as for docker
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Pull the image for this platform [default: linux on this machine's architecture]
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<Platform>,
    #[command(flatten)]
    pub limits: Raised,
}

#[derive(Debug, Args)]
pub struct Raised {
    /// Raise a limit, as in bytes=128GiB; can be repeated
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = limits::parse)]
    pub limits: Vec<(oci::Limit, u64)>,
}

#[derive(Debug, Args)]
pub struct ExportImage {
    /// Name of the image, as for docker
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Write to `oci:DIR[:TAG]`, `docker-archive:FILE[:NAME]` or `docker://HOST/REPO[:TAG]`
    #[arg(long, value_name = "DEST")]
    pub to: Destination,
    #[command(flatten)]
    pub place: Where,
}

#[derive(Debug, Args)]
pub struct InspectImage {
    /// Name of the image, as for docker
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RemoveImage {
    /// Name of the image, as for docker
    #[arg(value_name = "IMAGE")]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Import {
    /// Root filesystem (directory, or tar: plain, gzip, zstd), OCI layout, or docker archive
    pub path: PathBuf,
    /// Name of the image
    #[arg(long = "as", value_name = "IMAGE")]
    pub name: String,
    #[command(flatten)]
    pub limits: Raised,
}

/// A layer is named by the first 4 or more hex digits of its id, if no other id begins with them.
#[derive(Debug, Subcommand)]
pub enum Store {
    /// Print disk use: in total, by worker and image, by layer
    ///
    /// LOGICAL is the size of the unpacked files. UNIQUE is stored for this one alone, SHARED is
    /// shared with others; both count equal contents once. The sums agree with `du`.
    #[command(after_help = "Examples:
  iii store df
  iii store df --all                         # every layer, not only the largest
  iii store df --json | jq '.refs[] | {name, unique}'")]
    Df(Df),
    /// List layers, the most recently used first
    #[command(after_help = "Examples:
  iii store list
  iii store list --json | jq -r '.layers[] | select(.kept_by == []) | .id'")]
    List(List),
    /// Print the contents, the recipe and the facts of a layer
    ///
    /// For the name of a worker or an image, prints its layers.
    #[command(after_help = "Examples:
  iii store inspect 4f2a91
  iii store inspect 4f2a91 --entries         # its files, as `ls -l` shows them
  iii store inspect iii-dev-my-project       # a worker's layers")]
    Inspect(Inspect),
    /// Print the paths that differ between two layers
    ///
    /// A: only in the second. D: only in the first. M: type, mode, owner, contents, target or
    /// xattrs differ. mtimes do not count. Control characters, invalid UTF-8 and `%` in paths are
    /// written as `%` and two hex digits.
    #[command(after_help = "Examples:
  iii store diff 4f2a91 77c0de
  iii store diff 4f2a91 77c0de --json | jq '[.changes[].new_size] | add'")]
    Diff(Diff),
    /// Print the reasons that keep a layer
    #[command(after_help = "Examples:
  iii store why 4f2a91
  iii store why 4f2a91 --json | jq '.kept_by[].kind'")]
    Why(Why),
    /// Free unneeded disk space
    ///
    /// Layers of workers, images and running processes always stay. Other layers are kept for reuse
    /// within the limits; beyond them, those go first that are large, unused and cheap to build.
    /// Layers go into a trash first, where builds find them again. Sizes have a unit of B, KB, MB,
    /// GB, TB or KiB, MiB, GiB, TiB, times of s, m, h, d, w. A gc with the defaults runs after a
    /// build that exceeds them, unless `III_GC=off`.
    #[command(after_help = "Examples:
  iii store gc --dry-run                     # print the plan and its reasons
  iii store gc --max-size 5GB --keep 2d
  iii store gc --keep 0s --grace 0s          # everything unused, at once")]
    Gc(Gc),
    /// Serve layers as a filesystem to a virtual machine
    ///
    /// QEMU, cloud-hypervisor and others attach the vhost-user-fs socket as a virtiofs device. The
    /// first VMM that connects is served until it disconnects. Guest writes are dropped then,
    /// unless --upper keeps them. A kept upper does not keep the layers below it.
    #[command(after_help = "Examples:
  iii store serve --image node:24-slim --socket /run/user/1000/root.sock
  iii store serve 4f2a91 77c0de --socket ./root.sock --upper ./upper --json
  qemu-system-x86_64 … -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -M q35,memory-backend=mem \\
    -chardev socket,id=c,path=./root.sock -device vhost-user-fs-pci,chardev=c,tag=root,queue-size=1024
  mount -t virtiofs root /mnt                # in the guest")]
    #[cfg(target_os = "linux")]
    Serve(Serve),
    /// Check the store and the uppers of workers for damage
    ///
    /// Checks the structure: every index, layer, key and ref. With --data, also hashes every byte
    /// of every file. Then reads the log of the upper of every worker; --repair leaves uppers as
    /// they are. Runs beside builds and workers. Exit code 1 means problems that are not repaired,
    /// 3 that the machine kept something from being checked and nothing else is wrong.
    #[command(after_help = "Examples:
  iii store verify
  iii store verify --data                    # hash everything
  iii store verify --data --repair           # move damage aside, so that it is built again
  iii store verify --json | jq '.report.problems[], .uppers[]'")]
    Verify(Verify),
    /// Update a store of an earlier version
    ///
    /// Nothing is lost, and an interrupted run can be repeated. No worker and no build may run
    /// meanwhile.
    #[command(after_help = "Examples:
  iii store migrate")]
    Migrate(Migrate),
}

#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
pub struct Serve {
    /// Layers to serve, bottom first
    #[arg(value_name = "LAYER", required_unless_present = "image")]
    pub layers: Vec<String>,
    /// Put the layers of this image below the others
    #[arg(long)]
    pub image: Option<String>,
    /// Listen on this socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Tag by which the guest mounts the filesystem
    #[arg(long, default_value = "root")]
    pub tag: Tag,
    /// Keep the guest's files in this directory
    #[arg(long, value_name = "DIR")]
    pub upper: Option<PathBuf>,
    /// Number of serving threads
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: u8,
    /// Print the number of requests by operation at the end, as one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// Hash the contents of every file
    #[arg(long)]
    pub data: bool,
    /// Move damaged files aside, and drop everything that depends on them
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
    /// Print the plan and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Evict until the store is no larger, or `none` [default: 20GiB]
    #[arg(long, value_name = "SIZE", value_parser = quantity::size_limit)]
    pub max_size: Option<Limit<u64>>,
    /// Evict until this much of the disk is free, or `none` [default: 10%, at most 5GB]
    #[arg(long, value_name = "SHARE|SIZE", value_parser = quantity::room)]
    pub min_free: Option<Limit<Room>>,
    /// Evict layers that were not used for this long [default: 14d]
    #[arg(long, value_name = "TIME", value_parser = quantity::time)]
    pub keep: Option<Duration>,
    /// Keep layers in the trash for this long [default: 10m]
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
    /// Layer's id, or name of a worker or an image
    pub layer: String,
    /// List the entries of the layer
    #[arg(long)]
    pub entries: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Diff {
    /// Id of the old layer
    #[arg(value_name = "LAYER")]
    pub old: String,
    /// Id of the new layer
    #[arg(value_name = "LAYER")]
    pub new: String,
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Why {
    /// Id of the layer
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
