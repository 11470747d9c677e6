//! Which of the host's ids stand behind the sandbox's.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{SandboxError, Warning};

/// Ids 0 to 65535 exist in a full sandbox, as they do in container engines: `nobody` is 65534.
const IDS: u32 = 65_536;

/// Most extents of a map that a kernel takes.
const MAX_EXTENTS: usize = 340;

/// Ids above those belong to no account, but archives name them as owners. Root's sandboxes have
/// them where the host has no accounts either: above 2^31, which systemd documents as the ids that
/// programs with signed numbers get wrong, and the last ones (-2 is `nobody` on other systems)
/// behind the range at [`ROOT_BASE`]. All but the 2^31 ids below the last ones are there.
const FAR: [Extent; 2] = [
    Extent {
        inside: IDS,
        outside: 1 << 31,
        count: (1 << 31) - 1,
    },
    Extent {
        inside: u32::MAX - (IDS - 1),
        outside: ROOT_BASE + IDS,
        count: IDS - 1,
    },
];

/// Where the ids of a sandbox lie that the host's root runs without a range in `/etc/subuid`.
/// In the part of the id space that systemd documents as unused (1879048192 to 2147352575), away
/// from its start, where others would begin as well.
const ROOT_BASE: u32 = 0x7069_0000;

/// `count` ids from `inside` on are the host's from `outside` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

impl Extent {
    /// Whether both have an id of the host's.
    fn overlaps(&self, other: &Self) -> bool {
        let end = |extent: &Self| u64::from(extent.outside) + u64::from(extent.count);
        u64::from(self.outside) < end(other) && u64::from(other.outside) < end(self)
    }
}

/// How the maps get written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// By us, with the privilege to map any id of our own namespace.
    Root,
    /// By the setuid helpers `newuidmap` and `newgidmap`.
    Helpers,
    /// By us, without privilege: one id, and no `setgroups` inside.
    Oneself,
}

/// The id maps of a sandbox.
///
/// Root inside is never root outside: files below `/proc/sys` belong to the host's root and would
/// be writable. Run by root, a sandbox gets a range of its own; run by another user, root inside
/// is that user and the other ids come from `/etc/subuid` and `/etc/subgid`. (In a container that
/// has a single id itself, there is no other to be.)
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdMaps {
    uid: Vec<Extent>,
    gid: Vec<Extent>,
    writer: Writer,
}

/// The source of the maps.
struct Account {
    uid: u32,
    gid: u32,
    /// Names for `uid`, the first being the one to show.
    names: Vec<String>,
    subuid: String,
    subgid: String,
    uid_map: String,
    gid_map: String,
}

impl Account {
    fn of_this_process() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let uid = rustix::process::geteuid().as_raw();
        let mut names: Vec<String> = read("/etc/passwd")
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
            })
            .collect();
        // Accounts of a directory service are not in the file. A wrong name gains nothing: the
        // helpers check for themselves.
        #[expect(
            clippy::disallowed_methods,
            reason = "the account is this process's, as its uid is"
        )]
        names.extend(std::env::var("USER"));
        Self {
            uid,
            gid: rustix::process::getegid().as_raw(),
            names,
            subuid: read("/etc/subuid"),
            subgid: read("/etc/subgid"),
            uid_map: read("/proc/self/uid_map"),
            gid_map: read("/proc/self/gid_map"),
        }
    }

    /// The (start, count) ranges that a file like `/etc/subuid` grants to this account.
    fn ranges(&self, granted: &str) -> Vec<(u32, u32)> {
        let own = self.uid.to_string();
        granted
            .lines()
            .filter_map(|line| {
                let mut fields = line.trim().split(':');
                let owner = fields.next()?;
                let range = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
                (owner == own || self.names.iter().any(|name| name == owner)).then_some(range)
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

impl IdMaps {
    /// The maps that this process can give to a sandbox, and what they lack.
    pub(super) fn for_this_process() -> (Self, Option<Warning>) {
        let account = Account::of_this_process();
        let helpers = HELPERS.iter().all(|helper| in_path(helper));
        Self::plan(&account, helpers)
    }

    fn plan(account: &Account, helpers: bool) -> (Self, Option<Warning>) {
        let (uids, gids) = (
            account.ranges(&account.subuid),
            account.ranges(&account.subgid),
        );
        let reason = if account.uid == 0 {
            let uid = root_extents(&uids, &account.uid_map);
            let gid = root_extents(&gids, &account.gid_map);
            if let (Some(uid), Some(gid)) = (uid, gid) {
                let writer = Writer::Root;
                return (Self { uid, gid, writer }, None);
            }
            "this container has no second id either"
        } else if uids.is_empty() || gids.is_empty() {
            "no ids are granted to you in /etc/subuid and /etc/subgid"
        } else if !helpers {
            "newuidmap and newgidmap are not installed"
        } else {
            let maps = Self {
                uid: own_and(account.uid, &uids),
                gid: own_and(account.gid, &gids),
                writer: Writer::Helpers,
            };
            return (maps, None);
        };
        (
            Self::single(account.uid, account.gid),
            Some(single_id_warning(account, reason.into())),
        )
    }

    fn single(uid: u32, gid: u32) -> Self {
        let one = |outside| {
            vec![Extent {
                inside: 0,
                outside,
                count: 1,
            }]
        };
        Self {
            uid: one(uid),
            gid: one(gid),
            writer: Writer::Oneself,
        }
    }

    /// The host's uid and gid behind the sandbox's root.
    pub(super) fn root(&self) -> (u32, u32) {
        let outside = |extents: &[Extent]| extents.first().map_or(0, |extent| extent.outside);
        (outside(&self.uid), outside(&self.gid))
    }

    /// As [`root`](Self::root), where they are not this process's own: it has to change the owner
    /// of directories that the sandbox writes to.
    pub(super) fn foreign_root(&self) -> Option<(u32, u32)> {
        (self.writer == Writer::Root).then(|| self.root())
    }

    /// Writes the maps of process `pid`, which has just made its user namespace. Where the helpers
    /// refuse, one id is mapped instead and the warning says why.
    pub(super) fn write(&self, pid: u32) -> Result<Option<Warning>, SandboxError> {
        if self.writer == Writer::Helpers {
            let refused = match run_helpers(pid, [&self.uid, &self.gid])? {
                [None, None] => return Ok(None),
                [Some(message), Some(_)] => message,
                // Half a map cannot be taken back.
                [Some(message), None] => {
                    let helper = HELPERS[0];
                    return Err(SandboxError::IdHelper { helper, message });
                }
                [None, Some(message)] => {
                    let helper = HELPERS[1];
                    return Err(SandboxError::IdHelper { helper, message });
                }
            };
            let account = Account::of_this_process();
            Self::single(account.uid, account.gid).write_directly(pid)?;
            return Ok(Some(single_id_warning(&account, refused)));
        }
        self.write_directly(pid)?;
        Ok(None)
    }

    fn write_directly(&self, pid: u32) -> Result<(), SandboxError> {
        let write = |file: &str, contents: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/{file}"));
            fs::write(&path, contents).map_err(|source| SandboxError::Host {
                operation: "write",
                path,
                source,
            })
        };
        if self.writer != Writer::Root {
            write("setgroups", "deny")?;
        }
        write("uid_map", &render(&self.uid))?;
        write("gid_map", &render(&self.gid))
    }
}

/// The ranges for root's sandboxes: the one that `/etc/subuid` grants to root, else the fixed one,
/// and [`FAR`]. Within a user namespace that lacks the first, as in a rootless container, the
/// largest range that spares id 0.
fn root_extents(granted: &[(u32, u32)], own_map: &str) -> Option<Vec<Extent>> {
    let available: Vec<(u32, u32)> = own_map
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let start = fields.next()?.parse().ok()?;
            Some((start, fields.nth(1)?.parse().ok()?))
        })
        .collect();
    let covered = |&(start, count): &(u32, u32)| {
        available.iter().any(|&(from, length)| {
            from <= start
                && u64::from(start) + u64::from(count) <= u64::from(from) + u64::from(length)
        })
    };
    let spared = available.iter().map(|&(start, count)| match start {
        0 => (1, count.saturating_sub(1)),
        _ => (start, count),
    });
    let (outside, count) = granted
        .iter()
        .copied()
        .filter(|&(start, count)| start > 0 && count >= IDS)
        .chain([(ROOT_BASE, IDS)])
        .find(covered)
        .or_else(|| spared.max_by_key(|&(_, count)| count))?;
    let first = Extent {
        inside: 0,
        outside,
        count: count.min(IDS),
    };
    let far = FAR.into_iter().filter(|far| {
        covered(&(far.outside, far.count)) && !far.overlaps(&first) && first.count == IDS
    });
    (count > 0).then(|| iter::once(first).chain(far).collect())
}

/// Root inside is `own`; all granted ranges follow.
fn own_and(own: u32, granted: &[(u32, u32)]) -> Vec<Extent> {
    let mut extents = vec![Extent {
        inside: 0,
        outside: own,
        count: 1,
    }];
    let mut inside: u32 = 1;
    for &(outside, count) in granted.iter().take(MAX_EXTENTS - 1) {
        // The last id is no id.
        let count = count.min(u32::MAX - inside);
        if count == 0 {
            break;
        }
        extents.push(Extent {
            inside,
            outside,
            count,
        });
        inside += count;
    }
    extents
}

fn render(extents: &[Extent]) -> String {
    let mut lines = String::new();
    for Extent {
        inside,
        outside,
        count,
    } in extents
    {
        let _ = writeln!(lines, "{inside} {outside} {count}");
    }
    lines
}

const HELPERS: [&str; 2] = ["newuidmap", "newgidmap"];

#[expect(
    clippy::disallowed_methods,
    reason = "the helpers are started from the same `PATH`"
)]
fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Runs both helpers side by side; what each had to say against it.
fn run_helpers(pid: u32, maps: [&Vec<Extent>; 2]) -> Result<[Option<String>; 2], SandboxError> {
    let failed = |helper: &str, source: io::Error| SandboxError::Host {
        operation: "run",
        path: Path::new(helper).to_owned(),
        source,
    };
    let start = |helper: &str, extents: &[Extent]| {
        Command::new(helper)
            .arg(pid.to_string())
            .args(render(extents).split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| failed(helper, source))
    };
    let uids = start(HELPERS[0], maps[0])?;
    let gids = start(HELPERS[1], maps[1]);
    let finish = |helper: &str, child: std::process::Child| -> Result<_, SandboxError> {
        let output = child
            .wait_with_output()
            .map_err(|source| failed(helper, source))?;
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((!output.status.success()).then_some(message))
    };
    let uids = finish(HELPERS[0], uids);
    Ok([uids?, finish(HELPERS[1], gids?)?])
}

fn single_id_warning(account: &Account, reason: String) -> Warning {
    if account.uid == 0 {
        let remedy = "give this container a range of ids (podman: --userns=auto)".into();
        return Warning::SingleId { reason, remedy };
    }
    let first_free = [&account.subuid, &account.subgid]
        .into_iter()
        .flat_map(|granted| granted.lines())
        .filter_map(|line| {
            let mut fields = line.trim().split(':').skip(1);
            let start: u32 = fields.next()?.parse().ok()?;
            start.checked_add(fields.next()?.parse().ok()?)
        })
        .fold(100_000, u32::max);
    let last = first_free.saturating_add(IDS - 1);
    let name = match account.names.first() {
        Some(name) => name,
        None => &account.uid.to_string(),
    };
    let remedy = format!(
        "as root: apt install uidmap && usermod --add-subuids {first_free}-{last} --add-subgids {first_free}-{last} {name}"
    );
    Warning::SingleId { reason, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";

    fn account(uid: u32, subids: &str, own_map: &str) -> Account {
        Account {
            uid,
            gid: uid,
            names: vec!["ann".into()],
            subuid: subids.into(),
            subgid: subids.into(),
            uid_map: own_map.into(),
            gid_map: own_map.into(),
        }
    }

    /// Case; uid; grants; own map; helpers; expected extents and their writer.
    const CASES: &str = "\
        root; 0; ; whole; yes; 0 1885929472 65536 far; Root
        root with a grant; 0; 0:500000:70000; whole; yes; 0 500000 65536 far; Root
        root with a far grant; 0; 0:2147483600:65536; whole; yes; 0 2147483600 65536 4294901760 1885995008 65535; Root
        root with a small grant; 0; 0:500000:7; whole; yes; 0 1885929472 65536 far; Root
        root in a rootless container; 0; ; 0 1000 1,1 100000 65536; yes; 0 1 65536; Root
        root in a container; 0; ; 0 100000 65536; yes; 0 1 65535; Root
        root and nobody else; 0; ; 0 1000 1; yes; 0 0 1; Oneself
        user; 7; bob:1:5,ann:100000:65536; whole; yes; 0 7 1 1 100000 65536; Helpers
        user by number; 7; 7:20:10; whole; yes; 0 7 1 1 20 10; Helpers
        two grants; 7; ann:1:9,ann:90:100000; whole; yes; 0 7 1 1 1 9 10 90 100000; Helpers
        no helpers; 7; ann:100000:65536; whole; no; 0 7 1; Oneself
        no grant; 7; bob:100000:65536; whole; yes; 0 7 1; Oneself
        garbage; 7; ann,ann:x:1,ann:5:0,::; whole; yes; 0 7 1; Oneself";

    #[test]
    fn maps() {
        for line in CASES.lines() {
            let columns: Vec<&str> = line.split(';').map(str::trim).collect();
            let [_, uid, grants, own_map, helpers, extents, writer] = columns[..] else {
                panic!("{line}");
            };
            let own_map = if own_map == "whole" {
                WHOLE
            } else {
                &own_map.replace(',', "\n")
            };
            let uid = uid.parse().expect("a number");
            let account = account(uid, &grants.replace(',', "\n"), own_map);
            let (maps, warning) = IdMaps::plan(&account, helpers == "yes");
            let rendered = render(&maps.uid)
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ");
            let far = "65536 2147483648 2147483647 4294901760 1885995008 65535";
            let extents = extents.replace("far", far);
            assert_eq!(
                (rendered.as_str(), format!("{:?}", maps.writer).as_str()),
                (extents.as_str(), writer),
                "{line}"
            );
            assert_eq!(maps.uid, maps.gid, "{line}");
            assert_eq!(warning.is_some(), writer == "Oneself", "{line}");
        }
    }

    #[test]
    fn the_warning_proposes_a_free_range() {
        let (_, warning) = IdMaps::plan(&account(1000, "bob:100000:65536", WHOLE), true);
        let text = warning.expect("a warning").to_string();
        assert!(
            text.contains("--add-subuids 165536-231071 --add-subgids 165536-231071 ann"),
            "{text}"
        );
    }
}
