//! Archives that have harmed others, each with its outcome: refused, with the entry named,
//! or contained, with the tree that GNU tar and umoci make of it, where these take it.
//!
//! Archives that are only malformed, or over a limit, are in [`archives`](super::archives).

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use iii_overlay::ino::ROOT;
use iii_overlay::merge::Merged;
use iii_store::tree::Leaf;

use super::super::layers::unpack_blob;
use super::super::stream::Promise;
use super::archives::{gnu_sparse, refuse};
use super::gnu_tar::take;
use super::images::{Packing, pack, tagged, tool};
use super::*;

/// Other tools that accept it.
#[derive(Clone, Copy, PartialEq)]
enum Peers {
    /// GNU tar, which knows no layers, and umoci.
    Both,
    Umoci,
    /// None, for the reason given.
    Alone(&'static str),
}

struct Contained {
    what: &'static str,
    /// Bottom first.
    layers: Vec<Tar>,
    peers: Peers,
    /// The tree, merged.
    tree: &'static [&'static str],
}

fn tar() -> Tar {
    Tar::default()
}

fn head(kind: u8, name: &str) -> Head {
    Head::new(kind, name, 0)
}

/// An archive that would be found in another one by who loses count.
fn smuggled() -> Vec<u8> {
    tar().file("smuggled", "x").end()
}

/// A member whose header says one length and whose PAX header another.
fn two_sizes(header: u64, pax: &str, data: &[u8]) -> Tar {
    tar()
        .dir("d")
        .pax(&[("size", pax.as_bytes())])
        .head(&Head::new(b'0', "d/nested.tar", header))
        .data(data)
        .file("d/next", "n")
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn contained() -> Vec<Contained> {
    use Peers::{Alone, Both, Umoci};
    let mut cases = Vec::new();
    let mut add = |what, peers, layers: Vec<Tar>, tree| {
        cases.push(Contained {
            what,
            layers,
            peers,
            tree,
        });
    };
    add(
        "absolute names",
        Both,
        vec![tar().dir("/etc").file("//etc///passwd", "a")],
        &["/ implicit", "etc/", "etc/passwd = a"],
    );
    add(
        "symlinks that lead out, absolutely and by `..`, with entries below them (CVE-2018-15664, CVE-2025-47290)",
        Umoci,
        vec![
            tar()
                .dir("etc")
                .symlink("out", "../../../../etc")
                .file("out/passwd", "1")
                .symlink("abs", "/etc")
                .file("abs/shadow", "2"),
        ],
        &[
            "/ implicit",
            "abs -> /etc",
            "etc/",
            "etc/passwd = 1",
            "etc/shadow = 2",
            "out -> ../../../../etc",
        ],
    );
    add(
        "a directory that becomes a symlink between two entries (CVE-2018-15664, CVE-2025-47290)",
        Umoci,
        vec![
            tar()
                .dir("etc")
                .dir("d")
                .file("d/x", "1")
                .symlink("d", "/etc")
                .file("d/passwd", "2"),
        ],
        &["/ implicit", "d -> /etc", "etc/", "etc/passwd = 2"],
    );
    add(
        "a symlink that becomes a directory between two entries",
        Umoci,
        vec![tar().symlink("d", "/etc").dir("d").file("d/x", "1")],
        &["/ implicit", "d/", "d/x = 1"],
    );
    add(
        "a directory of a layer that the next one makes a symlink, and the next goes through",
        Alone("umoci goes through symlinks of other layers; docker's overlay and podman's do not"),
        vec![
            tar().dir("d").file("d/x", "1").dir("etc"),
            tar().symlink("d", "/etc"),
            tar().file("d/passwd", "2"),
        ],
        &["/ implicit", "d/ implicit", "d/passwd = 2", "etc/"],
    );
    add(
        "a library where a helper of the engine would load it (CVE-2019-14271)",
        Both,
        vec![
            tar()
                .dir("lib")
                .file("lib/libnss_files.so.2", "elf")
                .dir("etc")
                .file("etc/nsswitch.conf", "passwd: files"),
        ],
        &[
            "/ implicit",
            "etc/",
            "etc/nsswitch.conf = passwd: files",
            "lib/",
            "lib/libnss_files.so.2 = elf",
        ],
    );
    add(
        "mount points of the engine as symlinks to the host (CVE-2024-1753, CVE-2026-46703)",
        Both,
        vec![
            tar()
                .symlink("proc", "/")
                .symlink("dev", "../../..")
                .symlink("workspace", "/root"),
        ],
        &[
            "/ implicit",
            "dev -> ../../..",
            "proc -> /",
            "workspace -> /root",
        ],
    );
    add(
        "hardlinks by way of a symlink, and to a symlink",
        Umoci,
        vec![
            tar()
                .dir("etc")
                .file("etc/x", "1")
                .symlink("out", "/etc")
                .hardlink("h", "out/x")
                .hardlink("o", "out"),
        ],
        &[
            "/ implicit",
            "etc/",
            "etc/x = 1 link#0",
            "h = 1 link#0",
            "o -> /etc link#1",
            "out -> /etc link#1",
        ],
    );
    add(
        "a hardlink that is overwritten leaves the other name alone",
        Both,
        vec![
            tar()
                .file("a", "1")
                .hardlink("b", "a")
                .file("b", "2")
                .hardlink("c", "a"),
        ],
        &["/ implicit", "a = 1 link#0", "b = 2", "c = 1 link#0"],
    );
    add(
        "duplicate names",
        Both,
        vec![
            tar()
                .file("f", "1")
                .file("./f", "2")
                .head(head(b'5', "d").put(100, "0000700"))
                .file("d/x", "1")
                .head(head(b'5', "d/").put(100, "0000711")),
        ],
        &["/ implicit", "d/ 711", "d/x = 1", "f = 2"],
    );
    add(
        "names that are one where case or Unicode's forms do not count",
        Both,
        vec![
            tar()
                .file("Name", "1")
                .file("name", "2")
                .file("caf\u{e9}", "3")
                .file("cafe\u{301}", "4")
                .file("\u{212a}", "5")
                .file("k", "6")
                .file("trailing. ", "7")
                .file("con", "8")
                .file("a\\..\\b", "9"),
        ],
        &[
            "/ implicit",
            "Name = 1",
            "a\\\\..\\\\b = 9",
            "cafe\\xcc\\x81 = 4",
            "caf\\xc3\\xa9 = 3",
            "con = 8",
            "k = 6",
            "name = 2",
            "trailing.  = 7",
            "\\xe2\\x84\\xaa = 5",
        ],
    );
    add(
        "a PAX size over an empty header's, with an archive in the contents (CVE-2025-62518)",
        Both,
        vec![two_sizes(0, "2048", &smuggled())],
        &["/ implicit", "d/", "d/nested.tar = NESTED", "d/next = n"],
    );
    add(
        "a PAX size over another one (CVE-2026-33055)",
        Both,
        vec![two_sizes(512, "2048", &smuggled())],
        &["/ implicit", "d/", "d/nested.tar = NESTED", "d/next = n"],
    );
    add(
        "a PAX size of nothing over a header that claims 10 GiB",
        Both,
        vec![{
            let mut claim = head(b'0', "claim");
            claim.put(124, b"\x80\0\0\0\0\0\0\x02\x80\0\0\0");
            tar().pax(&[("size", b"0")]).head(&claim).file("next", "n")
        }],
        &["/ implicit", "claim = ", "next = n"],
    );
    add(
        "PAX names and targets over the header's",
        Both,
        vec![
            tar()
                .pax(&[("path", b"real"), ("linkpath", b"target")])
                .head(head(b'2', "../../decoy").put(157, "../../decoy")),
        ],
        &["/ implicit", "real -> target"],
    );
    add(
        "a GNU long name and a PAX path that agree",
        Both,
        vec![
            tar()
                .gnu_long(b'L', "both")
                .pax(&[("path", b"both")])
                .file("header", "1"),
        ],
        &["/ implicit", "both = 1"],
    );
    add(
        "devices, FIFOs and setuid of anybody",
        Both,
        vec![
            tar()
                .head(head(b'3', "mem").put(329, "0000001").put(337, "0000001"))
                .head(head(b'4', "sda").put(329, "0000010").put(337, "0000000"))
                .head(head(b'3', "zero").put(329, "0000000").put(337, "0000000"))
                .head(head(b'6', "pipe").put(100, "0000600"))
                .head(head(b'0', "su").put(100, "0006755").put(108, "0001747"))
                .head(head(b'5', "tmp").put(100, "0001777")),
        ],
        &[
            "/ implicit",
            "mem char 1:1",
            "pipe fifo 600",
            "sda block 8:0",
            "su =  6755 999:0",
            "tmp/ 1777",
            "zero char 0:0",
        ],
    );
    add(
        "xattrs that mean something to the host",
        Both,
        vec![
            tar()
                .pax(&[
                    (
                        "SCHILY.xattr.security.capability",
                        b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
                    ),
                    ("SCHILY.xattr.trusted.other", b"y"),
                    ("SCHILY.xattr.user.x", b"a\nb=c\0d"),
                ])
                .file("ping", "elf"),
        ],
        &[
            "/ implicit",
            "ping = elf security.capability=\\x01\\x00\\x00\\x02\\x00 \\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00 \
             trusted.other=y user.x=a\\nb=c\\x00d",
        ],
    );
    add(
        "xattrs by which the kernel's overlay would be misled",
        Alone("the disk of the peer is read through what they mean there"),
        vec![
            tar()
                .pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")])
                .dir("d")
                .pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")])
                .dir("e"),
        ],
        &[
            "/ implicit",
            "d/ trusted.overlay.opaque=y",
            "e/ trusted.overlay.redirect=/etc",
        ],
    );
    add(
        "whiteouts and opaque marks in any order",
        Umoci,
        vec![
            tar()
                .file("gone", "1")
                .dir("dir")
                .file("dir/gone", "1")
                .dir("opaque")
                .file("opaque/old", "1")
                .dir("opaque/sub")
                .file("kept", "1"),
            tar()
                .file("opaque/new", "2")
                .file("opaque/.wh..wh..opq", "")
                .file(".wh.gone", "")
                .file("dir/.wh.gone", "")
                .file(".wh.never", ""),
        ],
        &[
            "/ implicit",
            "dir/",
            "kept = 1",
            "opaque/",
            "opaque/new = 2",
        ],
    );
    add(
        "a whiteout beside an entry of its name",
        Umoci,
        vec![
            tar().dir("d").file("d/old", "1").file("f", "1"),
            tar()
                .file(".wh.d", "")
                .dir("d")
                .file("d/new", "2")
                .file(".wh.f", "")
                .file("f", "2"),
        ],
        &["/ implicit", "d/", "d/new = 2", "f = 2"],
    );
    add(
        "an opaque mark on a file of a layer below",
        Alone("umoci refuses it; docker's overlay makes a directory"),
        vec![
            tar().file("f", "1"),
            tar().dir("f").file("f/.wh..wh..opq", "").file("f/x", "2"),
        ],
        &["/ implicit", "f/", "f/x = 2"],
    );
    add(
        "types that change from layer to layer",
        Umoci,
        vec![
            tar()
                .dir("d")
                .file("d/x", "1")
                .file("f", "1")
                .symlink("s", "d"),
            tar()
                .file("d", "2")
                .dir("f")
                .file("f/y", "2")
                .head(&head(b'6', "s")),
        ],
        &["/ implicit", "d = 2", "f/", "f/y = 2", "s fifo"],
    );
    add(
        "a whiteout of the root's own, and of AUFS",
        Umoci,
        vec![
            tar().file("a", "1").dir("d").file("d/x", "1"),
            tar().dir("./").file(".wh..wh..opq", "").file("b", "2"),
        ],
        &["b = 2"],
    );
    add(
        "entries through a symlink of their own layer, over what a layer below has there",
        Umoci,
        vec![
            tar().dir("usr").dir("usr/lib").file("usr/lib/old", "1"),
            tar()
                .dir("usr")
                .symlink("lib", "usr/lib")
                .dir("usr/lib")
                .file("lib/new", "2"),
        ],
        &[
            "/ implicit",
            "lib -> usr/lib",
            "usr/",
            "usr/lib/",
            "usr/lib/new = 2",
            "usr/lib/old = 1",
        ],
    );
    add(
        "a hardlink of a layer below gets another name here",
        Umoci,
        vec![
            tar().file("a", "1").hardlink("b", "a"),
            tar().file(".wh.b", "").file("c", "3").hardlink("d", "c"),
        ],
        &["/ implicit", "a = 1", "c = 3 link#0", "d = 3 link#0"],
    );
    add(
        "times before 1970, and after 2038",
        Both,
        vec![
            tar()
                .pax(&[("mtime", b"-86400.5")])
                .file("old", "")
                .pax(&[("mtime", b"4294967297.000000001")])
                .file("new", ""),
        ],
        &[
            "/ implicit",
            "new =  @4294967297.000000001",
            "old =  @-86401.500000000",
        ],
    );
    add(
        "a sparse file, and what comes after it",
        Alone(
            "Go's archive/tar wants the end of the map where GNU tar does without; gnu_tar.rs compares what GNU tar writes",
        ),
        vec![
            gnu_sparse("sparse", 3000, &[(0, 4), (1000, 4), (3000, 0)])
                .data("abcdefgh")
                .file("next", "n"),
        ],
        &["/ implicit", "next = n", "sparse = abcd[996]efgh[1996]"],
    );
    cases
}

/// The layers as a sandbox sees them.
fn merged(layers: Vec<Arc<Layer>>) -> Dir {
    fn dir(merged: &Merged, ino: u64) -> Dir {
        let lower = merged.get(ino).unwrap();
        let meta = merged.meta(lower);
        let entries = merged.children(ino, 0).map(|(_, name, child)| {
            let node = match child.node.content() {
                None => Node::Dir(dir(merged, child.ino)),
                Some(content) => Node::Leaf(Leaf {
                    meta: child.node.meta(),
                    content,
                    link: child.node.is_hardlinked().then_some(child.ino),
                }),
            };
            (name.into(), node)
        });
        Dir {
            meta: meta.meta(),
            kind: match meta.dir_kind() {
                DirKind::Implicit => DirKind::Implicit,
                _ => DirKind::Merged,
            },
            entries: entries.collect(),
        }
    }
    dir(&Merged::new(layers).unwrap(), ROOT)
}

fn show_merged(test: &TestStore, layers: Vec<Arc<Layer>>) -> Vec<String> {
    let lease = test.store.lease("test").unwrap();
    let ingest = test.store.ingest(&lease).unwrap();
    let published = ingest.finish(&merged(layers)).unwrap();
    let layer = test.store.layer(&published.layer_id).unwrap();
    let nested = smuggled();
    let nested = format!("= {}", super::contents(&nested));
    let lines = test.show(&layer).into_iter();
    lines
        .map(|line| line.replace(&nested, "= NESTED"))
        .collect()
}

/// The same lines, but for the metadata of directories that no layer has an entry of.
fn liken(theirs: Vec<String>, ours: &[String]) -> Vec<String> {
    let implicit = |line: &str| {
        let (path, time) = line
            .split_once("/ @")
            .unwrap_or((line.trim_end_matches('/'), ""));
        let implicit = format!("{path}/ implicit");
        let is_time = time
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b".-".contains(&byte));
        (is_time && ours.contains(&implicit)).then_some(implicit)
    };
    let lines = theirs.into_iter();
    let mut lines: Vec<_> = lines.map(|line| implicit(&line).unwrap_or(line)).collect();
    if ours.first().is_some_and(|line| line == "/ implicit") && lines.first() != ours.first() {
        lines.insert(0, "/ implicit".to_owned());
    }
    lines
}

fn by_gnu_tar(test: &TestStore, archive: &[u8]) -> Option<Vec<String>> {
    let path = test.dir.path().join("archive.tar");
    fs::write(&path, archive).unwrap();
    let out = test.dir.path().join("gnu tar");
    fs::create_dir(&out).unwrap();
    let mut command = Command::new("tar");
    command.args(["--xattrs", "--xattrs-include=*", "--same-owner", "-C"]);
    tool(command.arg(&out).arg("-xpf").arg(&path))?;
    Some(show_merged(test, vec![take(test, &out)]))
}

fn by_umoci(test: &TestStore, archives: &[Vec<u8>]) -> Option<Vec<String>> {
    let archives: Vec<&[u8]> = archives.iter().map(Vec::as_slice).collect();
    let layout = tagged(test, &archives);
    let out = test.dir.path().join("umoci");
    let image = format!("{}:t", layout.dir.display());
    let mut command = Command::new("umoci");
    tool(command.args(["raw", "unpack", "--image", &image]).arg(&out))?;
    Some(show_merged(test, vec![take(test, &out)]))
}

#[test]
fn what_is_contained_is_what_others_make_of_it() {
    let is_root = tempfile::tempdir()
        .unwrap()
        .path()
        .metadata()
        .unwrap()
        .uid()
        == 0;
    if !is_root {
        eprintln!("SKIPPED: hostile archives compared with GNU tar and umoci: needs root");
    }
    let mut differ = Vec::new();
    let mut compare = |what: &str, theirs: Option<Vec<String>>, ours: &[String]| {
        if let Some(theirs) = theirs
            && liken(theirs.clone(), ours) != ours
        {
            differ.push(format!("{what}:\n  ours {ours:?}\ntheirs {theirs:?}"));
        }
    };
    for case in contained() {
        let what = case.what;
        let test = TestStore::new();
        let archives: Vec<_> = case.layers.into_iter().map(Tar::end).collect();
        let mut layers = Vec::new();
        for archive in &archives {
            let unpacked = test.unpack(archive, Dialect::Layer(&layers), &Limits::default());
            layers.push(unpacked.unwrap_or_else(|error| panic!("{what}: {error}")).0);
        }
        let ours = show_merged(&test, layers);
        assert_eq!(ours, case.tree, "{what}");
        if !is_root {
            continue;
        }
        match case.peers {
            Peers::Alone(why) => eprintln!("{what}: not compared: {why}"),
            Peers::Both | Peers::Umoci => {
                compare(&format!("{what}, umoci"), by_umoci(&test, &archives), &ours);
            }
        }
        if case.peers == Peers::Both {
            compare(
                &format!("{what}, GNU tar"),
                by_gnu_tar(&test, &archives[0]),
                &ours,
            );
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_could_only_deceive_is_refused_by_name() {
    let test = TestStore::new();
    let claim = |size: &[u8]| {
        let mut claim = head(b'0', "claim");
        claim.put(124, size);
        tar().head(&claim)
    };
    let many: Vec<(u64, u64)> = (0..70_000).map(|ix| (ix * 2, 1)).collect();
    let deep = "d/".repeat(10_000);
    for (what, archive, expected) in [
        (
            "the root as a symlink (CVE-2021-29136)",
            tar().symlink(".", "/").file("etc/passwd", ""),
            "\".\": the root of an archive must be a directory",
        ),
        (
            "the root as a symlink, in other words",
            tar().dir("a").symlink("./", "/etc").file("passwd", ""),
            "\"./\": the root of an archive must be a directory",
        ),
        (
            "the root as a hardlink",
            tar().file("x", "").hardlink("/", "x"),
            "\"/\": the root of an archive must be a directory",
        ),
        (
            "a hardlink out by way of a symlink",
            tar().symlink("out", "/etc").hardlink("h", "out/shadow"),
            "\"h\": is a hardlink to \"out/shadow\", which is neither",
        ),
        (
            "a hardlink to what comes later",
            tar().hardlink("h", "later").file("later", ""),
            "\"h\": is a hardlink to \"later\"",
        ),
        (
            "a hardlink to a whiteout",
            tar().file(".wh.x", "").hardlink("h", "x"),
            "\"h\": is a hardlink to \"x\"",
        ),
        (
            "an opaque mark on a file of its own layer",
            tar().file("f", "1").file("f/.wh..wh..opq", ""),
            "\"f/.wh..wh..opq\": its name leads through an entry that is not a directory",
        ),
        (
            "a whiteout of `..`, and of the root",
            tar().file("a/.wh...", ""),
            "\"a/.wh...\": is not a valid whiteout",
        ),
        (
            "entries below a whiteout",
            tar().dir(".wh.d").file(".wh.d/x", ""),
            "\".wh.d/x\": is not a valid whiteout",
        ),
        (
            "10 GiB in 1 KiB, in octal",
            claim(b"120000000000"),
            "cut short at byte 1536, in \"claim\"",
        ),
        (
            "10 GiB in 1 KiB, in base 256",
            claim(b"\x80\0\0\0\0\0\0\x02\x80\0\0\0"),
            "cut short at byte 1536, in \"claim\"",
        ),
        (
            "10 GiB in 1 KiB, in a PAX header",
            tar().pax(&[("size", b"10737418240")]).file("claim", ""),
            "in \"claim\"",
        ),
        (
            "all there can be, in base 256",
            claim(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"),
            "\"claim\": the sum of the sizes of files, in bytes, is over the limit of 68719476736 (bytes)",
        ),
        (
            "a size below zero",
            claim(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
            "\"claim\": the size in its header is not valid",
        ),
        (
            "a map of holes without end (CVE-2025-58183)",
            gnu_sparse("bomb", 1 << 20, &many),
            "\"bomb\": the number of its segments between holes is over the limit of 65536 (segments)",
        ),
        (
            "holes that are worth nothing and take 10 GiB",
            gnu_sparse("bomb", 10 << 30, &[]),
            "\"bomb\": the sum of the holes in sparse files, in bytes, is over the limit of 4294967296 (holes)",
        ),
        (
            "10,000 directories, each in the other",
            tar().pax(&[("path", deep.as_bytes())]).dir("x"),
            "the length of its name is over the limit of 4096 (path)",
        ),
        (
            "a GNU long name and a PAX path that differ",
            tar()
                .pax(&[("path", b"one")])
                .gnu_long(b'L', "two")
                .file("three", ""),
            "\"two\": its GNU and PAX names differ",
        ),
        (
            "a global size (CVE-2025-62518)",
            tar().global(&[("size", b"0")]).file("x", smuggled()),
            "a global PAX header sets names, sizes or holes",
        ),
    ] {
        eprintln!("{what}");
        refuse(&test, &archive.end(), &Limits::default(), expected);
    }
}

/// The fault of a blob, the blob, and the tree or the error.
type Packed<'a> = (&'a str, Vec<u8>, Result<&'a [&'a str], &'a str>);

/// A frame of zstd with one block as it is, and a window of `2^log` bytes.
pub fn zstd_frame(log: u8, bytes: &[u8]) -> Vec<u8> {
    let head = [0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3];
    let block = ((bytes.len() as u32) << 3 | 1).to_le_bytes();
    [&head[..], &block[..3], bytes].concat()
}

/// A frame that says nothing.
fn zstd_skippable(claimed: u32, bytes: &[u8]) -> Vec<u8> {
    let head = 0x184d_2a53_u32.to_le_bytes();
    [&head[..], &claimed.to_le_bytes(), bytes].concat()
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn compression_that_deceives() {
    let archive = tar().dir("d").file("d/x", "1").end();
    // Of one member, where `pack` makes two.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive).unwrap();
    let (gzip, zstd) = (gzip.finish().unwrap(), pack(&archive, Packing::Zstd));
    let joined = |parts: &[&[u8]]| parts.concat();
    let members: Vec<u8> = archive
        .iter()
        .flat_map(|byte| pack(&[*byte], Packing::Gzip))
        .collect();
    let nothing = pack(b"", Packing::Gzip).repeat(20_000);
    let mut long_name = gzip.clone();
    // A file name in the header, which never ends.
    long_name[3] |= 8;
    long_name.splice(10..10, vec![b'n'; 1 << 20]);
    let zeros = vec![0; 8 << 20];
    let whole = &["/ implicit", "d/", "d/x = 1"][..];
    let cases: Vec<Packed> = vec![
        ("gzip of thousands of members", members, Ok(whole)),
        (
            "gzip with thousands of empty members behind",
            joined(&[&gzip, &nothing]),
            Ok(whole),
        ),
        (
            "gzip with garbage behind",
            joined(&[&gzip, b"garbage and more of it"]),
            Err("decompressing (gzip) failed"),
        ),
        (
            "gzip whose header has a name of 1 MiB",
            long_name,
            Err("decompressing (gzip) failed"),
        ),
        (
            "gzip in gzip",
            pack(&gzip, Packing::Gzip),
            Err("the archive is cut short"),
        ),
        (
            "gzip that ends in a bomb behind the archive's end",
            joined(&[&gzip, &pack(&zeros, Packing::Gzip)]),
            Err("the ratio at which it is compressed is over the limit of 50 (ratio)"),
        ),
        (
            "zstd of several frames",
            joined(&[
                &pack(&archive[..700], Packing::Zstd),
                &pack(&archive[700..], Packing::Zstd),
            ]),
            Ok(whole),
        ),
        (
            "zstd between frames to be skipped",
            joined(&[&zstd_skippable(4, b"skip"), &zstd, &zstd_skippable(0, b"")]),
            Ok(whole),
        ),
        (
            "a frame to be skipped of 4 GiB",
            joined(&[&zstd_skippable(u32::MAX, b"skip"), &zstd]),
            Err("decompressing (zstd) failed"),
        ),
        (
            "zstd with a window of 128 MiB",
            zstd_frame(27, &archive),
            Ok(whole),
        ),
        (
            "zstd with a window of 2 GiB",
            zstd_frame(31, &archive),
            Err("decompressing (zstd) failed"),
        ),
        (
            "zstd with a window that no machine has",
            zstd_frame(41, &archive),
            Err("decompressing (zstd) failed"),
        ),
        (
            "zstd with garbage behind",
            joined(&[&zstd, b"garbage and more of it"]),
            Err("decompressing (zstd) failed"),
        ),
        (
            "zstd that ends in a bomb behind the archive's end",
            joined(&[&zstd, &pack(&zeros, Packing::Zstd)]),
            Err("the ratio at which it is compressed is over the limit of 50 (ratio)"),
        ),
        ("an empty blob", Vec::new(), Ok(&["/ implicit"])),
        (
            "an empty gzip",
            pack(b"", Packing::Gzip),
            Ok(&["/ implicit"]),
        ),
        (
            "an empty zstd",
            pack(b"", Packing::Zstd),
            Ok(&["/ implicit"]),
        ),
        (
            "one byte",
            vec![0],
            Err("the archive is cut short at byte 1"),
        ),
        (
            "a magic number and nothing more",
            vec![0x1f, 0x8b],
            Err("decompressing (gzip) failed"),
        ),
    ];
    let limits = Limits {
        ratio: 50,
        ratio_from: 4 << 20,
        ..Limits::default()
    };
    let test = TestStore::new();
    let unpack = |blob: &[u8]| {
        let lease = test.store.lease("test").unwrap();
        let ingest = test.store.ingest(&lease).unwrap();
        let promise = Promise::default();
        let layer = Dialect::Layer(&[]);
        let unpacked = unpack_blob(blob, promise, &ingest, layer, &limits, &|_| {})
            .map_err(|error| with_causes(&error))?;
        let published = ingest.finish(&unpacked.0.tree).unwrap();
        Ok::<_, String>(test.show(&test.store.layer(&published.layer_id).unwrap()))
    };
    for (what, blob, expected) in cases {
        match (unpack(&blob), expected) {
            (Ok(lines), Ok(expected)) => assert_eq!(lines, expected, "{what}"),
            (Err(error), Err(expected)) => assert!(error.contains(expected), "{what}: {error}"),
            (other, _) => panic!("{what}: {other:?}"),
        }
    }
    for (packed, compression) in [(&gzip, "gzip"), (&zstd, "zstd")] {
        // Four bytes show what it is.
        for length in 4..packed.len() {
            let error = unpack(&packed[..length]).unwrap_err();
            let expected = format!("decompressing ({compression}) failed");
            assert!(error.contains(&expected), "cut at {length}: {error}");
        }
    }
}
