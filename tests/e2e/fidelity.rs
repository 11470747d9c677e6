//! Images made of Debian packages by umoci and buildah, pulled from a registry, compared entry by
//! entry with umoci's unpacked tree.
//!
//! Compared are names, types, modes, owners, device numbers, sizes, contents, targets, all xattrs,
//! hardlinks and mtimes. The metadata of directories without an entry in any layer, which
//! umoci makes up, is not compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::merge::Merged;
use iii_store::tree::{Content, DirKind, Mtime, Rdev, Xattrs};
use iii_store::{Kind, ObjectId, Store};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use tempfile::TempDir;

use crate::harness::{Home, Project, busybox_base, debian_base, is_root, skip};
use crate::registry::{Door, Registry, arch, has, run};

/// How many differences are shown.
const SHOWN: usize = 20;

/// Everything about an entry that can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    what: What,
    mode: u16,
    owner: (u32, u32),
    xattrs: Xattrs,
    mtime: Mtime,
    /// The first path of the same file; none for a file with one name.
    same_as: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Dir,
    /// A directory that no layer has an entry of.
    ImplicitDir,
    Leaf(Content),
}

type Tree = BTreeMap<Vec<u8>, Entry>;

/// The files that have several names, by whatever they have in common, to be told by the first of
/// their paths.
struct Links<K>(HashMap<K, Vec<Vec<u8>>>);

impl<K: std::hash::Hash + Eq> Links<K> {
    fn resolve(self, tree: &mut Tree) {
        for paths in self.0.into_values().filter(|paths| paths.len() > 1) {
            let first = paths.iter().min().cloned();
            for path in &paths {
                tree.get_mut(path).unwrap().same_as.clone_from(&first);
            }
        }
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    [dir, name].join(&b'/')
}

/// A sandbox's view of these layers.
fn merged(layers: &Merged) -> Tree {
    let mut tree = Tree::new();
    let mut links = Links(HashMap::<Ino, _>::new());
    let mut todo = vec![(Vec::new(), ROOT)];
    while let Some((path, ino)) = todo.pop() {
        let lower = layers.get(ino).unwrap();
        let node = layers.meta(lower);
        let meta = node.meta();
        let what = match lower.node.content() {
            Some(content) => What::Leaf(content),
            None if node.dir_kind() == DirKind::Implicit => What::ImplicitDir,
            None => What::Dir,
        };
        if what == What::Dir || what == What::ImplicitDir {
            let children = layers.children(ino, 0);
            todo.extend(children.map(|(_, name, child)| (join(&path, name), child.ino)));
        } else {
            links.0.entry(ino).or_default().push(path.clone());
        }
        let entry = Entry {
            what,
            mode: meta.mode,
            owner: (meta.uid, meta.gid),
            xattrs: meta.xattrs,
            mtime: meta.mtime,
            same_as: None,
        };
        assert!(tree.insert(path, entry).is_none());
    }
    links.resolve(&mut tree);
    tree
}

/// The tree on the disk.
fn on_disk(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut links = Links(HashMap::new());
    let mut todo = vec![(Vec::new(), root.to_owned())];
    while let Some((path, file)) = todo.pop() {
        let stat = file.symlink_metadata().unwrap();
        let kind = stat.file_type();
        let rdev = || Rdev {
            major: rustix::fs::major(stat.rdev()),
            minor: rustix::fs::minor(stat.rdev()),
        };
        let what = if kind.is_dir() {
            What::Dir
        } else {
            What::Leaf(if kind.is_file() {
                let bytes = fs::read(&file).unwrap();
                Content::File {
                    object: ObjectId::of(&bytes),
                    size: stat.len(),
                }
            } else if kind.is_symlink() {
                let target = fs::read_link(&file).unwrap();
                Content::Symlink {
                    target: target.into_os_string().into_vec().into(),
                }
            } else if kind.is_fifo() {
                Content::Fifo
            } else if kind.is_socket() {
                Content::Socket
            } else if kind.is_char_device() {
                Content::Char(rdev())
            } else {
                Content::Block(rdev())
            })
        };
        if what == What::Dir {
            for entry in fs::read_dir(&file).unwrap() {
                let entry = entry.unwrap();
                let path = join(&path, entry.file_name().as_bytes());
                todo.push((path, entry.path()));
            }
        } else {
            let paths = links.0.entry((stat.dev(), stat.ino())).or_insert(vec![]);
            paths.push(path.clone());
        }
        let entry = Entry {
            what,
            mode: (stat.mode() & 0o7777) as u16,
            owner: (stat.uid(), stat.gid()),
            xattrs: xattrs(&file),
            mtime: Mtime {
                sec: stat.mtime(),
                nsec: stat.mtime_nsec() as u32,
            },
            same_as: None,
        };
        tree.insert(path, entry);
    }
    links.resolve(&mut tree);
    tree
}

fn xattrs(file: &Path) -> Xattrs {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(file, &mut names).unwrap();
    let names = names[..length].split(|&byte| byte == 0);
    names
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(file, name, &mut value[..]).unwrap();
            (name.into(), value[..length].into())
        })
        .collect()
}

/// The first differences, in words.
fn differences(ours: &Tree, theirs: &Tree) -> Vec<String> {
    let mut paths: Vec<_> = ours.keys().chain(theirs.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    let differ = paths.into_iter().filter_map(|path| {
        let (ours, theirs) = (ours.get(path), theirs.get(path));
        let same = match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours.what == What::ImplicitDir => {
                theirs.what == What::Dir
            }
            (ours, theirs) => ours == theirs,
        };
        (!same).then(|| {
            format!(
                "{}\n    ours {ours:?}\n  theirs {theirs:?}",
                path.escape_ascii()
            )
        })
    });
    differ.take(SHOWN).collect()
}

/// A place to make images in, and umoci's OCI layout with the image `t`.
struct Workshop {
    dir: TempDir,
}

impl Workshop {
    fn new() -> Self {
        let dir = TempDir::with_prefix("fidelity-").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn umoci(&self, args: &[&str]) {
        run(self.dir.path(), "umoci", args);
    }

    /// An image whose first layer is this archive.
    fn start_from(&self, archive: &Path) {
        self.umoci(&["init", "--layout", "layout"]);
        self.umoci(&["new", "--image", "layout:t"]);
        let config = [
            "config",
            "--image",
            "layout:t",
            "--os",
            "linux",
            "--architecture",
        ];
        self.umoci(&[&config[..], &[arch()]].concat());
        let add = ["raw", "add-layer", "--image", "layout:t"];
        self.umoci(&[&add[..], &[archive.to_str().unwrap()]].concat());
    }

    /// A directory with a few files.
    fn some_files(&self, name: &str) -> String {
        let dir = self.path(name);
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("file"), name).unwrap();
        fs::hard_link(dir.join("file"), dir.join("sub/same")).unwrap();
        symlink("../file", dir.join("sub/link")).unwrap();
        dir.to_str().unwrap().to_owned()
    }

    /// Layers on top that remove, replace and add.
    fn add_layers(&self) {
        let files = self.some_files("files");
        let insert = |args: &[&str]| {
            self.umoci(&[&["insert", "--image", "layout:t"], args].concat());
        };
        insert(&["--opaque", &files, "/usr/share/doc"]);
        insert(&["--whiteout", "/usr/share/misc"]);
        insert(&["--whiteout", "/etc/passwd-"]);
        insert(&[&files, "/opt/files"]);
        insert(&[&files, "/usr/share/misc"]);
    }

    /// Pushes the image, compressed anew, pulls it, and compares what is pulled with what umoci
    /// unpacks.
    fn compare(&self, compressions: &[&str]) {
        let unpacked = self.path("unpacked");
        let unpack = ["raw", "unpack", "--image", "layout:t"];
        self.umoci(&[&unpack[..], &[unpacked.to_str().unwrap()]].concat());
        let theirs = on_disk(&unpacked);
        for compression in compressions {
            let registry = Registry::start(Door::Open);
            let name = format!("{}/some/box:{compression}", registry.host);
            let copy = [
                "--insecure-policy",
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
            ];
            let format = ["--dest-compress-format", compression, "oci:layout:t"];
            let to = format!("docker://{name}");
            run(
                self.dir.path(),
                "skopeo",
                &[&copy[..], &format, &[&to]].concat(),
            );
            let home = Home::new();
            home.run(&["image", "pull", &name]).ok();
            let store = Store::open(home.state().join("store/v1")).unwrap();
            let image = iii_oci::resolve(&store, &name).unwrap().unwrap();
            let layers = image.layers.iter().map(|id| store.layer(id).unwrap());
            let layers = Merged::new(layers.collect()).unwrap();
            assert!(layers.layers().len() >= 3);
            let has = |wanted: &dyn Fn(iii_store::NodeRef<'_>) -> bool| {
                layers.layers().iter().any(|layer| {
                    (0..layer.node_count()).any(|ix| layer.node(ix).is_some_and(wanted))
                })
            };
            assert!(has(&|node| node.kind() == Kind::Whiteout));
            assert!(has(
                &|node| node.kind() == Kind::Dir && node.dir_kind() == DirKind::Opaque
            ));
            let ours = merged(&layers);
            let differ = differences(&ours, &theirs);
            assert!(
                differ.is_empty(),
                "{} and {} entries, {compression}:\n{}",
                ours.len(),
                theirs.len(),
                differ.join("\n")
            );
            // The contents match their ids.
            home.run(&["store", "verify", "--data"]).ok();
        }
    }
}

/// Debian packages with setuid programs, odd owners and many symlinks.
const PACKAGES: [&str; 6] = [
    "dbus-daemon",
    "iputils-ping",
    "man-db",
    "passwd",
    "sudo",
    "util-linux",
];

/// Unpacks packages over busybox, and adds one of everything that they lack.
fn make_root(workshop: &Workshop) -> Result<(), String> {
    let packages = workshop.path("packages");
    fs::create_dir(&packages).unwrap();
    let output = Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
        .args(PACKAGES)
        .current_dir(&packages)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(stderr.lines().last().unwrap_or("apt-get failed").to_owned());
    }
    let root = workshop.path("root");
    let base = busybox_base().to_str().unwrap();
    run(workshop.dir.path(), "cp", &["-a", base, "root"]);
    for package in fs::read_dir(&packages).unwrap() {
        let package = package.unwrap().path();
        let package = package.to_str().unwrap();
        run(workshop.dir.path(), "dpkg-deb", &["-x", package, "root"]);
    }
    add_oddities(&root);
    Ok(())
}

fn add_oddities(root: &Path) {
    let odd = root.join("odd");
    fs::create_dir(&odd).unwrap();
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
    };
    // cap_net_raw+ep, as Debian's postinst of ping sets it.
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    set(&root.join("bin/ping"), "security.capability", capability);
    let sparse = fs::File::create(odd.join("sparse")).unwrap();
    for at in (0..20).map(|ix| ix * 300_000) {
        sparse.write_all_at(b"data", at).unwrap();
    }
    sparse.set_len(7_000_000).unwrap();
    fs::write(odd.join(OsStr::from_bytes(b"\xff\n\x01 odd")), "odd").unwrap();
    fs::write(odd.join("n".repeat(255)), "long").unwrap();
    fs::write(odd.join("empty"), "").unwrap();
    symlink("t".repeat(300), odd.join("long target")).unwrap();
    fs::hard_link(odd.join("empty"), root.join("usr/empty")).unwrap();
    set(&odd.join("empty"), "user.note", b"a\nb=c\0d");
    set(&odd, "user.dir", b"1");
    let node = |name: &str, kind, dev| {
        let mode = Mode::from(0o640);
        rustix::fs::mknodat(CWD, odd.join(name), kind, mode, dev).unwrap();
    };
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("disk", FileType::BlockDevice, rustix::fs::makedev(259, 300));
    node("pipe", FileType::Fifo, 0);
    let own = |name: &str, uid, gid| {
        std::os::unix::fs::lchown(odd.join(name), Some(uid), Some(gid)).unwrap();
    };
    own("empty", 4_000_000_000, 65534);
    own("long target", 3, 4);
    own("pipe", 70_000, 6);
    let time = |name: &str, tv_sec, tv_nsec| {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(CWD, odd.join(name), &times, flags).unwrap();
    };
    time("empty", -86_400, 250_000_000);
    time("long target", 1_000_000_000, 1);
    time("sparse", 1, 999_999_999);
}

/// Makes an image of three layers from `root` with buildah, as the image `t` of the layout, in a
/// mount namespace of its own: its storage leaves mounts behind.
const BUILDAH: &str = r#"
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$PWD" "$PWD" >storage.conf
export CONTAINERS_STORAGE_CONF=$PWD/storage.conf
one=$(buildah from scratch)
buildah copy --quiet $one root /
buildah config --env MADE_BY=buildah --user 1234:567 --workingdir /srv --entrypoint '["/bin/env", "WRAPPED=yes"]' $one
buildah commit --quiet $one one
two=$(buildah from localhost/one)
buildah run --user 0 --isolation chroot $two -- /bin/sh -ec '
    rm -r /usr/share/man /usr/share/bug /usr/bin/last
    rm -r /usr/share/doc && mkdir /usr/share/doc && echo new >/usr/share/doc/new
    chmod 4711 /usr/bin/sudo && chown 7:8 /etc/sudoers
    rm /odd/pipe && mkdir /odd/pipe && echo x >/odd/pipe/x
    mv /usr/lib/tmpfiles.d /usr/lib/moved
'
buildah commit --quiet $two two
three=$(buildah from localhost/two)
buildah copy --quiet $three files /opt/files
buildah run --user 0 --isolation chroot $three -- /bin/sh -ec '
    ln /usr/bin/sudo /usr/bin/another && ln -s another /usr/bin/link
    rm -r /odd/pipe && mkfifo /odd/pipe && mkdir /usr/share/man && echo x >/usr/share/man/x
'
buildah commit --quiet $three three
buildah push --quiet localhost/three oci:layout:t
"#;

/// Whether the tools of these tests are installed; reports a skip if not.
fn can_run(what: &str, also: &[&str]) -> bool {
    if !is_root() {
        skip(
            what,
            "needs root: umoci restores owners and devices as root only",
        );
        return false;
    }
    let needed = ["docker-registry", "skopeo", "umoci"];
    let needed = needed.iter().chain(also);
    let missing: Vec<_> = needed.copied().filter(|one| !has(one)).collect();
    if !missing.is_empty() {
        skip(what, &format!("needs {}", missing.join(", ")));
    }
    missing.is_empty()
}

fn debian(kind: &str) {
    let what = format!("{kind} as umoci unpacks it");
    if !can_run(&what, &[]) {
        return;
    }
    let archive = match debian_base(kind) {
        Ok(archive) => archive,
        Err(why) => return skip(&what, &why),
    };
    let workshop = Workshop::new();
    workshop.start_from(&archive);
    workshop.add_layers();
    workshop.compare(&["gzip"]);
}

#[test]
fn what_buildah_makes_is_as_umoci_unpacks_it() {
    let what = "packages in an image of buildah";
    if !can_run(what, &["buildah", "dpkg-deb", "unshare"]) {
        return;
    }
    let workshop = Workshop::new();
    if let Err(why) = make_root(&workshop) {
        return skip(what, &why);
    }
    workshop.some_files("files");
    run(
        workshop.dir.path(),
        "unshare",
        &["--mount", "sh", "-ec", BUILDAH],
    );
    workshop.compare(&["gzip", "zstd"]);
}

#[test]
fn node_is_as_umoci_unpacks_it() {
    debian("node");
}

#[test]
fn python_is_as_umoci_unpacks_it() {
    debian("python");
}

#[test]
#[ignore = "takes a minute, and finds what the others do"]
fn rust_is_as_umoci_unpacks_it() {
    debian("rust");
}

#[test]
fn what_an_image_says_about_running_it_holds_in_the_sandbox() {
    if !has("umoci") {
        return skip("the configuration of an image in a sandbox", "needs umoci");
    }
    let workshop = Workshop::new();
    let files = workshop.dir.path();
    run(
        files,
        "tar",
        &[
            "-C",
            busybox_base().to_str().unwrap(),
            "-cf",
            "base.tar",
            ".",
        ],
    );
    workshop.start_from(&workshop.path("base.tar"));
    let config = ["config", "--image", "layout:t"];
    let says = [
        "--config.env=GREETING=hello world",
        "--config.env=PATH=/opt/own:/bin",
        "--config.user=1234:567",
        "--config.workingdir=/srv",
        "--config.entrypoint=env",
        "--config.entrypoint=WRAPPED=yes",
    ];
    workshop.umoci(&[&config[..], &says].concat());
    let home = Home::new();
    home.import(&workshop.path("layout"), "box:t");
    let line = "echo \"KIND $(id -u):$(id -g) $GREETING $PATH wrapped=$WRAPPED in $(pwd)\"";
    let of = |kind| line.replace("KIND", kind);
    let start = format!("{}; exec sleep 1000", of("start"));
    let project = Project::scripts(&of("setup"), &of("install"), &start);
    let mut worker = home.dev(&project, &["--base", "box:t"]);
    for (kind, wrapped) in [("setup", ""), ("install", ""), ("start", "yes")] {
        let line = worker.wait_for(&format!("{kind} 1234:567 hello world "));
        // The image's own directories, among the usual ones.
        assert!(line.contains(":/opt/own:"), "{line}");
        let end = format!("wrapped={wrapped} in /workspace");
        assert!(line.ends_with(&end), "{line}");
    }
    worker.stop();
}
