//! Tries each requirement of sandboxes on this machine, and explains the result.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use iii_engine::firmware::{self, FirmwareError, Package, Source};
use iii_engine::home::Home;
use iii_engine::worker::engine::Engine;
use iii_sandbox::kvm::{self, Unusable};
use iii_sandbox::{self as sandbox, SandboxError, Warning};
use iii_store::Store;
use serde::Serialize;

use crate::output::human_bytes;

/// Free space below which images and installs are likely to fail.
const LITTLE_SPACE: u64 = 2 << 30;

/// How good a thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// Works, or is not needed yet.
    Fair,
    /// Does not work.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the requirement.
    pub what: &'static str,
    /// How good it is.
    pub state: State,
    /// The result, in words.
    pub found: String,
    /// The consequence, unless it is good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub means: Option<String>,
    /// The remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            state: State::Good,
            found: found.into(),
            means: None,
            advice: None,
        }
    }

    fn but(mut self, state: State, means: impl Into<String>) -> Self {
        (self.state, self.means) = (state, Some(means.into()));
        self
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// The choice of `--runtime auto`; none if no sandbox can start.
    pub runtime: Option<&'static str>,
    /// In the order in which they matter.
    pub findings: Vec<Finding>,
}

/// Tries everything again. Changes only the remembered verdict about `/dev/kvm`, and connects only
/// to the engine.
pub fn examine(home: &Home, engine: &Engine) -> Diagnosis {
    let kvm = kvm::usable_now(&home.kvm());
    let firmware = firmware::Places::new(home).find();
    let can_fetch = Package::of_this_machine().is_some();
    let namespaces = sandbox::probe(&iii_sandbox::process::this_program());
    let has_kernel = firmware
        .as_ref()
        .is_ok_and(|found| found.is_some() || can_fetch);
    let runtime = if kvm.is_ok() && has_kernel {
        Some("libkrun")
    } else {
        namespaces.blocker.is_none().then_some("namespace")
    };
    let mut findings = vec![of_kvm(kvm), of_firmware(firmware, can_fetch)];
    #[cfg(all(feature = "libkrun", target_os = "linux"))]
    findings.push(of_confinement(sandbox::has_landlock()));
    if sandbox::HAS_NAMESPACES {
        findings.push(of_namespaces(namespaces.blocker.as_ref()));
    }
    if namespaces.blocker.is_none() {
        findings.push(of_ids(&namespaces.warnings));
    }
    findings.push(of_disk(home.root()));
    findings.extend(of_store(&home.store()));
    findings.push(of_engine(engine));
    Diagnosis { runtime, findings }
}

fn of_kvm(kvm: Result<(), Unusable>) -> Finding {
    const WHAT: &str = if cfg!(target_os = "macos") {
        "hypervisor"
    } else {
        "kvm"
    };
    let (state, means) = if sandbox::HAS_NAMESPACES {
        let means = "no microVMs here; workers run in namespaces, on this machine's kernel";
        (State::Fair, means)
    } else {
        (
            State::Bad,
            "no microVMs here, and no other sandbox exists on this system",
        )
    };
    match kvm {
        Ok(()) if cfg!(target_os = "macos") => Finding::good(
            WHAT,
            format!("{} creates a VM for this program", kvm::DEVICE),
        ),
        Ok(()) => Finding::good(WHAT, format!("a guest runs on {}", kvm::DEVICE)),
        Err(unusable) => Finding::good(WHAT, unusable.to_string())
            .but(state, means)
            .advise(unusable.advice()),
    }
}

fn of_firmware(
    found: Result<Option<(PathBuf, Source)>, FirmwareError>,
    can_fetch: bool,
) -> Finding {
    const WHAT: &str = "libkrunfw";
    match found {
        Ok(Some((path, source))) => {
            let by = match source {
                Source::Flag | Source::Variable => " (named by III_LIBKRUNFW)",
                Source::Home => " (fetched)",
                Source::System => " (the system's)",
            };
            Finding::good(WHAT, format!("{}{by}", path.display()))
        }
        Ok(None) if can_fetch => Finding::good(WHAT, "not on this machine").but(
            State::Fair,
            "the guest's kernel; the first microVM fetches it from npm, 33 MB",
        ),
        Ok(None) => Finding::good(WHAT, "not on this machine")
            .but(
                State::Fair,
                "the guest's kernel; no microVM can start without it",
            )
            .advise(format!(
                "install libkrunfw 5, or set {} to its path",
                firmware::VARIABLE
            )),
        Err(error) => Finding::good(WHAT, error.to_string())
            .but(State::Bad, "no microVM can start")
            .advise(format!("correct {} or unset it", firmware::VARIABLE)),
    }
}

/// The confinement of a microVM's process, in case its guest takes it over.
#[cfg(all(feature = "libkrun", target_os = "linux"))]
fn of_confinement(has_landlock: bool) -> Finding {
    const WHAT: &str = "confinement";
    if has_landlock {
        return Finding::good(WHAT, "landlock and seccomp hold the process of a microVM");
    }
    Finding::good(WHAT, "seccomp alone holds the process of a microVM")
        .but(
            State::Fair,
            "a guest that takes the process over may open this user's files",
        )
        .advise("use a kernel from 5.19 on, with landlock in `lsm=` of its command line")
}

fn of_namespaces(blocker: Option<&SandboxError>) -> Finding {
    const WHAT: &str = "namespaces";
    let Some(error) = blocker else {
        return Finding::good(WHAT, "a sandbox with a FUSE root was made");
    };
    let mut found = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        found = format!("{found}: {error}");
        cause = error.source();
    }
    let finding = Finding::good(WHAT, found).but(State::Bad, "workers cannot run in namespaces");
    match error.hint() {
        Some(hint) => finding.advise(hint),
        None => finding,
    }
}

fn of_ids(warnings: &[Warning]) -> Finding {
    const WHAT: &str = "ids";
    match warnings.first() {
        None => Finding::good(WHAT, "a sandbox has all of its users"),
        Some(Warning::SingleId { reason, remedy }) => Finding::good(
            WHAT,
            format!("a sandbox has only root ({reason})"),
        )
        .but(
            State::Fair,
            "chown to another user, and programs that change user, such as apt, fail inside",
        )
        .advise(remedy.clone()),
    }
}

fn of_disk(home: &Path) -> Finding {
    const WHAT: &str = "disk";
    // It may not be there yet.
    let space = home
        .ancestors()
        .find_map(|dir| rustix::fs::statvfs(dir).ok());
    let Some(space) = space else {
        return Finding::good(
            WHAT,
            format!("the free space at {} is unknown", home.display()),
        )
        .but(State::Fair, "harmless on a network filesystem");
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let found = format!("{} free at {}", human_bytes(free), home.display());
    if free < LITTLE_SPACE {
        return Finding::good(WHAT, found)
            .but(State::Fair, "images and installs may not fit")
            .advise(
                "`iii store gc` removes unneeded layers; `iii store df` shows the use of the disk",
            );
    }
    Finding::good(WHAT, found)
}

fn of_store(path: &Path) -> Option<Finding> {
    const WHAT: &str = "store";
    if !path.exists() {
        return None;
    }
    Some(match Store::open(path) {
        Ok(_) => Finding::good(WHAT, format!("{} opens", path.display())),
        Err(error) => Finding::good(WHAT, error.to_string())
            .but(State::Bad, "no worker can be built or started")
            .advise("`iii store verify` lists the damage, and --repair moves it aside"),
    })
}

fn of_engine(engine: &Engine) -> Finding {
    const WHAT: &str = "engine";
    let url = engine.url();
    if engine.listens() {
        return Finding::good(WHAT, format!("listens at {url}"));
    }
    Finding::good(WHAT, format!("no engine listens at {url}"))
        .but(State::Fair, "workers start and wait for the engine")
        .advise("start it with `iii`, or give --port and --address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_what_to_do() {
        let no_file = FirmwareError::NotThere {
            path: "/x".into(),
            by: firmware::VARIABLE,
        };
        let single = Warning::SingleId {
            reason: "no subuids".into(),
            remedy: "add some".into(),
        };
        for (finding, state, text) in [
            (of_kvm(Ok(())), State::Good, "a guest runs"),
            (
                of_kvm(Err(Unusable::Forbidden)),
                State::Fair,
                "usermod -aG kvm",
            ),
            (
                of_kvm(Err(Unusable::Slow)),
                State::Fair,
                "nested virtualization",
            ),
            (of_firmware(Ok(None), true), State::Fair, "from npm"),
            (of_firmware(Ok(None), false), State::Fair, "III_LIBKRUNFW"),
            (of_firmware(Err(no_file), true), State::Bad, "unset it"),
            #[cfg(all(feature = "libkrun", target_os = "linux"))]
            (of_confinement(true), State::Good, "landlock and seccomp"),
            #[cfg(all(feature = "libkrun", target_os = "linux"))]
            (of_confinement(false), State::Fair, "lsm="),
            (of_namespaces(None), State::Good, "a sandbox"),
            (
                of_namespaces(Some(&SandboxError::Killed)),
                State::Bad,
                "killed before",
            ),
            (of_ids(&[]), State::Good, "all of its users"),
            (of_ids(&[single]), State::Fair, "add some"),
            (of_disk("/".as_ref()), State::Good, "free at /"),
        ] {
            let shown = format!("{finding:?}");
            assert!(shown.contains(text), "{shown}");
            if text == "free at /" {
                continue; // However much is free there.
            }
            assert_eq!(finding.state, state, "{shown}");
            assert_eq!(finding.means.is_some(), state != State::Good, "{shown}");
        }
    }

    #[test]
    fn a_store_that_does_not_open_is_bad() {
        let dir = tempfile::TempDir::new().unwrap();
        assert_eq!(of_store(&dir.path().join("none")), None);
        std::fs::write(dir.path().join("format"), "nonsense").unwrap();
        let finding = of_store(dir.path()).unwrap();
        assert_eq!(finding.state, State::Bad, "{finding:?}");
    }

    #[test]
    fn an_engine_is_asked() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut engine = Engine {
            host: "127.0.0.1".into(),
            port: listener.local_addr().unwrap().port(),
        };
        assert_eq!(of_engine(&engine).state, State::Good);
        drop(listener);
        assert_eq!(of_engine(&engine).state, State::Fair);
        engine.host = "no such host".into();
        assert_eq!(of_engine(&engine).state, State::Fair);
    }
}
