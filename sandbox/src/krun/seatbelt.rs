//! Limits of the process of a microVM on macOS: a profile of the system's own sandbox, which
//! `sandbox-exec` puts on before it runs the program. Compiled, and not run yet.
//!
//! Files: it writes the upper, the shared directories, the console's log and devices, and in
//! users' homes it reads only those, the store and the guest's kernel. Network: it connects as
//! [`Reach`] has it, as far as `localhost` is a word for the loopback; whether it covers the
//! unspecified address, too, is not known. A name server on the loopback has no address inside, and
//! what the guest listens on is not narrowed. Processes: it starts none, runs no other program and
//! signals no process. Unlike Linux's confinement, it permits these: make symlinks and other
//! kinds of files in the upper, which the tool opens without following them, and ask the system's
//! services.
//!
//! The language is documented by its examples in `/System/Library/Sandbox/Profiles` alone; later
//! rules win. Nearly all that is written here is in the profiles of Bazel
//! (`DarwinSandboxedSpawnRunner`) and Chromium (`sandbox/policy/mac`) as well; a port behind
//! `localhost` is in neither.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::reach::Reach;
use super::vm::VmPlan;

const SANDBOX_EXEC: &str = "/usr/bin/sandbox-exec";

/// Directories of users' files, beside the system's.
const PRIVATE: [&str; 3] = ["/Users", "/Volumes", "/private/var/root"];

/// How `program` is to be run for `plan`, up to its own arguments.
#[cfg_attr(not(target_os = "macos"), expect(dead_code, reason = "it is macOS's"))]
pub(super) fn confined(program: &Path, plan: &VmPlan, reach: &Reach) -> Command {
    let (profile, paths) = profile(program, plan, reach);
    let mut command = Command::new(SANDBOX_EXEC);
    for (name, path) in paths {
        let mut definition = OsString::from(format!("-D{name}="));
        definition.push(path);
        command.arg(definition);
    }
    command.arg("-p").arg(profile).arg(program);
    command
}

/// The profile, and the paths that it calls by names, so that none of them can be taken for a part
/// of it.
fn profile(program: &Path, plan: &VmPlan, reach: &Reach) -> (String, Vec<(String, PathBuf)>) {
    let mut paths = Vec::new();
    let mut name = |path: &Path| {
        let name = format!("PATH{}", paths.len());
        // The kernel sees no symlinks; a path that does not exist yet has a parent that does.
        let real = fs::canonicalize(path).or_else(|_| {
            let parent = fs::canonicalize(path.parent().unwrap_or(path))?;
            Ok::<_, std::io::Error>(parent.join(path.file_name().unwrap_or_default()))
        });
        paths.push((name.clone(), real.unwrap_or_else(|_| path.to_owned())));
        format!("(param \"{name}\")")
    };
    let own = format!("(literal {})", name(program));
    let read = [
        format!("(subpath {})", name(&plan.store)),
        format!("(literal {})", name(&plan.libkrunfw)),
        own.clone(),
    ];
    let mut write = vec![
        format!("(subpath {})", name(&plan.upper)),
        format!("(literal {})", name(&plan.console)),
    ];
    for volume in &plan.volumes {
        write.push(format!("(subpath {})", name(&volume.host)));
    }
    let (read, write) = (read.join(" "), write.join(" "));
    let private = PRIVATE.map(|path| format!("(subpath \"{path}\")"));
    let mut rules = vec![
        "(version 1)".into(),
        "(allow default)".into(),
        "(deny file-write*)".into(),
        format!("(allow file-write* (subpath \"/dev\") {write})"),
        // A path is followed from its beginning.
        format!("(deny file-read-data {})", private.join(" ")),
        format!("(allow file-read-data {read} {write})"),
        "(deny process-exec*)".into(),
        format!("(allow process-exec* {own})"),
        "(deny process-fork)".into(),
        "(deny signal)".into(),
        "(allow signal (target self))".into(),
        "(deny network-outbound (remote unix-socket))".into(),
    ];
    if !reach.loopback {
        rules.push("(deny network-outbound (remote ip \"localhost:*\"))".into());
        let port = |port| format!("(remote ip \"localhost:{port}\")");
        let ports: Vec<_> = reach.ports.iter().map(port).collect();
        let ports = ports.join(" ");
        if !ports.is_empty() {
            rules.push(format!("(allow network-outbound {ports})"));
        }
    }
    (rules.join("\n"), paths)
}

#[cfg(test)]
mod tests {
    use iii_overlay::OverlayOptions;
    use iii_overlay::adapter::Mode;
    use tempfile::TempDir;

    use super::super::Machine;
    use super::super::vm::VmVolume;
    use super::*;

    #[test]
    fn a_profile_names_what_is_the_machine_s_own() {
        let dir = TempDir::new().unwrap();
        let real = dir.path().canonicalize().unwrap();
        fs::create_dir(real.join("store")).unwrap();
        std::os::unix::fs::symlink("store", real.join("link")).unwrap();
        let machine = Machine {
            store: dir.path().join("link"),
            layers: Vec::new(),
            upper: dir.path().join("up\" (subpath \""),
            overlay: OverlayOptions::default(),
            mode: Mode::Quiet,
            cpus: 1,
            memory_mib: 64,
            libkrunfw: "/lib/fw".into(),
            console: dir.path().join("console.log"),
        };
        let volume = VmVolume {
            tag: "volume0".into(),
            host: dir.path().join("npm"),
        };
        let plan = VmPlan::new(&machine, vec![volume]);
        let reach = Reach::of_loopback([49134, 5432], false);
        let (profile, paths) = profile("/bin/iii".as_ref(), &plan, &reach);
        let expected = "\
(version 1)
(allow default)
(deny file-write*)
(allow file-write* (subpath \"/dev\") (subpath (param \"PATH3\")) (literal (param \"PATH4\")) (subpath (param \"PATH5\")))
(deny file-read-data (subpath \"/Users\") (subpath \"/Volumes\") (subpath \"/private/var/root\"))
(allow file-read-data (subpath (param \"PATH1\")) (literal (param \"PATH2\")) (literal (param \"PATH0\")) \
(subpath (param \"PATH3\")) (literal (param \"PATH4\")) (subpath (param \"PATH5\")))
(deny process-exec*)
(allow process-exec* (literal (param \"PATH0\")))
(deny process-fork)
(deny signal)
(allow signal (target self))
(deny network-outbound (remote unix-socket))
(deny network-outbound (remote ip \"localhost:*\"))
(allow network-outbound (remote ip \"localhost:49134\") (remote ip \"localhost:5432\"))";
        assert_eq!(profile, expected);
        let paths: Vec<_> = paths.iter().map(|(_, path)| path.as_path()).collect();
        let of = |name: &str| real.join(name);
        assert_eq!(paths[1], of("store"));
        assert_eq!(paths[3], of("up\" (subpath \""));
        assert_eq!(paths[4..6], [of("console.log"), of("npm")]);

        let all = Reach::of_loopback([], true);
        let (profile, _) = super::profile("/bin/iii".as_ref(), &plan, &all);
        assert!(profile.ends_with("(remote unix-socket))"), "{profile}");
        let none = Reach::of_loopback([], false);
        let (profile, _) = super::profile("/bin/iii".as_ref(), &plan, &none);
        assert!(
            profile.ends_with("(deny network-outbound (remote ip \"localhost:*\"))"),
            "{profile}"
        );
    }
}
