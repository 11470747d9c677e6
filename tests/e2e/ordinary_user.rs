//! The tool run by an ordinary user with subordinate ids.
//!
//! Tests run as root make such a user up in a mount namespace of their own, so that the machine's
//! own files stay as they are.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{FileType, Mode, makedev, mknodat};
use tempfile::TempDir;

use crate::harness::{Home, Project, is_root, skip};

const UID: u32 = 54_321;

/// A home whose runs are the made-up user's; `None` where there can be none.
fn home() -> Option<Home> {
    let dir = TempDir::with_prefix("home-").unwrap();
    if !is_root() {
        return Some(Home::new());
    }
    let path = dir.path();
    let binary = path.join("iii");
    fs::copy(env!("CARGO_BIN_EXE_iii"), &binary).unwrap();
    for (file, line) in [
        (
            "passwd",
            format!("tester:x:{UID}:{UID}::{}:/bin/sh\n", path.display()),
        ),
        ("group", format!("tester:x:{UID}:\n")),
        ("subuid", "tester:1000000:65536\n".to_owned()),
        ("subgid", "tester:1000000:65536\n".to_owned()),
    ] {
        let mut text = fs::read_to_string(format!("/etc/{file}")).unwrap_or_default();
        text.push_str(&line);
        fs::write(path.join(file), text).unwrap();
    }
    // Readable for everyone, as udev makes it on a machine for people.
    let fuse = path.join("fuse");
    mknodat(
        rustix::fs::CWD,
        &fuse,
        FileType::CharacterDevice,
        Mode::empty(),
        makedev(10, 229),
    )
    .unwrap();
    fs::set_permissions(&fuse, fs::Permissions::from_mode(0o666)).unwrap();
    chown(path, Some(UID), Some(UID)).unwrap();
    let script = path.join("as-tester");
    let text = format!(
        "#!/bin/sh\nset -e\ncd {0}\nfor file in passwd group subuid subgid; do\n  [ -e /etc/$file ] || touch /etc/$file\n  \
         mount --bind $file /etc/$file\ndone\nmount --bind fuse /dev/fuse\n\
         exec setpriv --reuid {UID} --regid {UID} --clear-groups \"$@\"\n",
        path.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let wrapper: Vec<PathBuf> = ["unshare", "--mount", "--propagation", "slave"]
        .iter()
        .map(PathBuf::from)
        .chain([script])
        .collect();
    let probe = Command::new(&wrapper[0])
        .args(&wrapper[1..])
        .args(["unshare", "--user", "--map-users=auto", "true"])
        .output();
    match probe {
        Ok(probe) if probe.status.success() => {}
        Ok(probe) => {
            let stderr = String::from_utf8_lossy(&probe.stderr);
            skip(
                "an ordinary user with subuids",
                stderr.lines().last().unwrap_or("no user namespaces"),
            );
            return None;
        }
        Err(error) => {
            skip("an ordinary user with subuids", &error.to_string());
            return None;
        }
    }
    let program = wrapper.into_iter().chain([binary]).collect();
    Some(Home::through(dir, program))
}

fn owned_by_tester(project: Project) -> Project {
    if is_root() {
        fs::set_permissions(project.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }
    project
}

#[test]
fn builds_and_runs_with_many_owners() {
    let Some(home) = home() else { return };
    home.import_busybox();
    let project = owned_by_tester(Project::scripts(
        "touch /theirs; chown 1000:1000 /theirs; chmod 4755 /theirs",
        "id -u >uid.txt",
        "cat uid.txt; stat -c '%u:%g %a' /theirs; mknod /zero c 0 0 && stat -c '%F' /zero; echo started; exec sleep 1000",
    ));
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("0");
    dev.wait_for("1000:1000 4755");
    dev.wait_for("character special file");
    dev.wait_for("started");
    dev.stop();
    assert_eq!(home.build(&project, &[]).built(), "");
}

#[test]
fn an_unreadable_project_file_is_named() {
    let Some(home) = home() else { return };
    home.import_busybox();
    let project = owned_by_tester(Project::scripts("true", "true", "true"));
    project.write("secret.txt", "");
    fs::set_permissions(
        project.path().join("secret.txt"),
        fs::Permissions::from_mode(0o000),
    )
    .unwrap();
    home.run(&["worker", "build", project.arg()])
        .fails()
        .says(&["secret.txt", "permission denied"]);
    project.remove("secret.txt");
    home.build(&project, &[]);
}

#[test]
fn sigkill_leaves_nothing() {
    let Some(home) = home() else { return };
    home.import_busybox();
    let project = owned_by_tester(Project::scripts(
        "true",
        "true",
        "echo started; exec sleep 1000",
    ));
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.signal(rustix::process::Signal::KILL);
    dev.finish(crate::harness::LIMIT);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.stop();
}
