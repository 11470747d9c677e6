//! The meaning of archives, and their refusals.

use super::*;

const LAYER: Dialect<'static> = Dialect::Layer(&[]);

#[track_caller]
fn check(dialect: Dialect<'_>, archive: Tar, expected: &[&str]) {
    let test = TestStore::new();
    match test.unpack(&archive.end(), dialect, &Limits::default()) {
        Ok((layer, _)) => assert_eq!(test.show(&layer), expected),
        Err(error) => panic!("{error}"),
    }
}

#[track_caller]
pub fn refuse(test: &TestStore, archive: &[u8], limits: &Limits, expected: &str) {
    match test.unpack(archive, LAYER, limits) {
        Ok((layer, _)) => panic!("taken as {:#?}", test.show(&layer)),
        Err(error) => assert!(error.contains(expected), "{error}"),
    }
    let left: Vec<_> = ["packs", "loose", "layers", "tmp"]
        .iter()
        .flat_map(|name| std::fs::read_dir(test.store.dir().join(name)).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

fn head(kind: u8, name: &str) -> Head {
    Head::new(kind, name, 0)
}

#[test]
fn every_kind_of_entry() {
    let archive = Tar::default()
        .head(head(b'5', "./").put(100, "0000700").put(108, "0001750"))
        .dir("bin/")
        .head(Head::new(b'0', "bin/su", 3).put(100, "0004755"))
        .data("elf")
        .hardlink("bin/sudo", "bin/su")
        .symlink("sh", "bin/sh")
        .hardlink("sh2", "/sh")
        .head(&head(b'6', "pipe"))
        .head(head(b'3', "null").put(329, "0000001").put(337, "0000003"))
        .head(head(b'4', "sda").put(329, "0000010").put(337, "0000000"))
        .member(b'7', "contiguous", "data")
        .file(b"\xff\xfe", "")
        .file("Name", "upper")
        .file("name", "lower");
    check(
        LAYER,
        archive,
        &[
            "/ 700 1000:0",
            "Name = upper",
            "bin/",
            "bin/su = elf 4755 link#0",
            "bin/sudo = elf 4755 link#0",
            "contiguous = data",
            "name = lower",
            "null char 1:3",
            "pipe fifo",
            "sda block 8:0",
            "sh -> bin/sh link#1",
            "sh2 -> bin/sh link#1",
            "\\xff\\xfe = ",
        ],
    );
}

#[test]
fn names_are_relative_to_the_root() {
    let archive = Tar::default()
        .file("/etc//passwd", "a")
        .file("./etc/./group", "b")
        .dir("///var/");
    let expected = [
        "/ implicit",
        "etc/ implicit",
        "etc/group = b",
        "etc/passwd = a",
        "var/",
    ];
    check(LAYER, archive, &expected);
}

#[test]
fn the_later_entry_wins() {
    let replaced = Tar::default()
        .dir("d")
        .file("d/x", "1")
        .file("f", "1")
        .file("f", "2")
        .file("d", "now a file")
        .dir("f")
        .file("f/y", "3");
    let expected = ["/ implicit", "d = now a file", "f/", "f/y = 3"];
    check(LAYER, replaced, &expected);
    let renewed = Tar::default()
        .dir("d")
        .file("d/x", "1")
        .head(head(b'5', "d").put(100, "0001777"));
    check(LAYER, renewed, &["/ implicit", "d/ 1777", "d/x = 1"]);
    let separated = Tar::default()
        .file("a", "1")
        .hardlink("b", "a")
        .hardlink("b", "b")
        .file("a", "2");
    check(LAYER, separated, &["/ implicit", "a = 2", "b = 1"]);
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_else() {
    for swapped in [false, true] {
        let entries = |tar: Tar| {
            tar.dir("own")
                .file("own/x", "1")
                .file("file", "2")
                .dir("opaque")
                .file("opaque/y", "3")
        };
        let marks = |tar: Tar| {
            tar.file(".wh.gone", "")
                .file("a/b/.wh.gone", "ignored")
                .file(".wh.own", "")
                .file(".wh.file", "")
                .file("opaque/.wh..wh..opq", "")
                .file("only/.wh..wh..opq", "")
        };
        let archive = if swapped {
            entries(marks(Tar::default()))
        } else {
            marks(entries(Tar::default()))
        };
        check(
            LAYER,
            archive,
            &[
                "/ implicit",
                "a/ implicit",
                "a/b/ implicit",
                "a/b/gone gone",
                "file = 2",
                "gone gone",
                "only/ opaque",
                "opaque/ opaque",
                "opaque/y = 3",
                "own/ opaque",
                "own/x = 1",
            ],
        );
    }
    let aufs = Tar::default()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", "")
        .file(".wh..wh.aufs", "")
        .file("x", "");
    check(LAYER, aufs, &["/ implicit", "x = "]);
    let longest = "n".repeat(255);
    let hidden = Tar::default()
        .pax(&[("path", format!(".wh.{longest}").as_bytes())])
        .file("x", "");
    let gone = format!("{longest} gone");
    check(LAYER, hidden.clone(), &["/ implicit", &gone]);
    let test = TestStore::new();
    let refused = test.unpack(&hidden.end(), Dialect::Rootfs, &Limits::default());
    assert!(refused.unwrap_err().contains("longer than 255 bytes"));
    let literal = Tar::default()
        .file("d/.wh.x", "1")
        .file(".wh..wh..opq", "2");
    let expected = [".wh..wh..opq = 2", "d/ implicit", "d/.wh.x = 1"];
    check(Dialect::Rootfs, literal, &expected);
}

#[test]
fn symlinks_on_the_way_lead_nowhere_but_into_the_tree() {
    let archive = Tar::default()
        .dir("usr")
        .symlink("lib", "usr/lib")
        .file("lib/x", "1")
        .symlink("out", "../../../../etc")
        .file("out/passwd", "2")
        .symlink("abs", "/var/./tmp//")
        .dir("abs/d")
        .hardlink("linked", "out/passwd");
    check(
        LAYER,
        archive,
        &[
            "/ implicit",
            "abs -> /var/./tmp//",
            "etc/ implicit",
            "etc/passwd = 2 link#0",
            "lib -> usr/lib",
            "linked = 2 link#0",
            "out -> ../../../../etc",
            "usr/",
            "usr/lib/ implicit",
            "usr/lib/x = 1",
            "var/ implicit",
            "var/tmp/ implicit",
            "var/tmp/d/",
        ],
    );
    let switched = Tar::default()
        .dir("d")
        .file("d/x", "1")
        .symlink("d", "/etc")
        .file("d/passwd", "2");
    let expected = ["/ implicit", "d -> /etc", "etc/ implicit", "etc/passwd = 2"];
    check(LAYER, switched, &expected);
    let replaced = Tar::default()
        .symlink("d", "/etc")
        .dir("d")
        .file("d/x", "1");
    check(LAYER, replaced, &["/ implicit", "d/", "d/x = 1"]);
}

#[test]
fn extension_headers() {
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let dir = "d".repeat(200);
    let archive = Tar::default()
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"-1.25"),
            ("uid", b"3000000000"),
            ("gid", b"7"),
            ("comment", b"no matter"),
            ("SCHILY.xattr.user.a", b"1\n2\0\xff"),
            ("SCHILY.xattr.security.capability", b"\x01\n9 size=9\n"),
            ("SCHILY.xattr.nonsense", b"dropped"),
            ("size", b"4"),
        ])
        .head(&Head::new(b'0', "short", 0o7777))
        .data("data")
        .pax(&[
            ("path", b"p"),
            ("path", b"q"),
            ("linkpath", b"t"),
            ("mtime", b""),
        ])
        .head(head(b'2', "s").put(136, "00000000011"))
        .gnu_long(b'L', &long[..300])
        .gnu_long(b'K', "g".repeat(150))
        .head(head(b'2', "short").gnu())
        // The size belongs to the file, not to the long name in between.
        .pax(&[("size", b"1"), ("path", b"between")])
        .gnu_long(b'L', "between")
        .file("x", "z")
        .global(&[("comment", b"a commit"), ("mtime", b"5")])
        .file("last", "l");
    check(
        LAYER,
        archive,
        &[
            "/ implicit",
            "between = z",
            &format!("{dir}/ implicit"),
            &format!("{dir}/{} -> {}", "f".repeat(99), "g".repeat(150)),
            &format!(
                "{long} = data 3000000000:7 @-2.750000000 \
                 security.capability=\\x01\\n9 size=9\\n user.a=1\\n2\\x00\\xff"
            ),
            "last = l",
            "q -> t @9.000000000",
        ],
    );
}

#[test]
fn old_and_odd_headers() {
    let mut v7 = head(0, "v7/");
    v7.put(257, [0; 8]);
    let mut signed = head(b'0', "");
    signed.put(0, b"\xe9\xe9\xe9");
    let archive = Tar::default()
        .head(&v7)
        .head(head(b'0', "name").put(345, "prefix"))
        .head(
            head(b'0', "name")
                .put(345, "star")
                .put(476, "1234")
                .put(508, b"tar\0"),
        )
        .head(head(b'0', "name").gnu().put(345, "no prefix"))
        .head(
            head(b'0', "binary")
                .put(108, b"\x80\0\0\0\xee\x6b\x28\0")
                .put(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"),
        )
        .head(
            head(b'0', "spaces")
                .put(108, b"     17 ")
                .put(116, b"\0\0\0\0\0\0\0\0"),
        )
        // Only files have data, whatever their headers say.
        .head(Head::new(b'5', "sized", 512).put(100, "0000700"))
        .head(Head::new(b'1', "linked", 512).put(157, "name"));
    let expected = [
        "/ implicit",
        "binary =  4000000000:0 @-2.000000000",
        "linked =  link#0",
        "name =  link#0",
        "prefix/ implicit",
        "prefix/name = ",
        "sized/ 700",
        "spaces =  15:0",
        "star/ implicit",
        "star/name = ",
        "v7/ 644",
    ];
    check(LAYER, archive, &expected);
    let mut bytes = Tar::default().file("x", "1").end();
    bytes.extend(b"what follows the end is not read");
    let test = TestStore::new();
    for archive in [&bytes[..], &bytes[..1024], &bytes[..1536]] {
        let (layer, _) = test.unpack(archive, LAYER, &Limits::default()).unwrap();
        assert_eq!(test.show(&layer), ["/ implicit", "x = 1"]);
    }
}

/// A GNU sparse header; a segment is an offset and a length.
pub fn gnu_sparse(name: &str, size: u64, segments: &[(u64, u64)]) -> Tar {
    let stored: u64 = segments.iter().map(|(_, len)| len).sum();
    let mut head = Head::new(b'S', name, stored);
    head.gnu().put(483, format!("{size:011o}"));
    let write = |block: &mut Head, at: usize, segments: &[(u64, u64)]| {
        for (ix, (offset, len)) in segments.iter().enumerate() {
            block
                .put(at + ix * 24, format!("{offset:011o}"))
                .put(at + ix * 24 + 12, format!("{len:011o}"));
        }
    };
    let (here, mut rest) = segments.split_at(segments.len().min(4));
    write(&mut head, 386, here);
    head.0[482] = u8::from(!rest.is_empty());
    let mut tar = Tar::default().head(&head);
    while !rest.is_empty() {
        let (here, after) = rest.split_at(rest.len().min(21));
        let mut block = Head([0; 512]);
        write(&mut block, 0, here);
        block.0[504] = u8::from(!after.is_empty());
        tar.0.extend(block.0);
        rest = after;
    }
    tar
}

#[test]
fn sparse_files_of_every_format() {
    check(
        LAYER,
        gnu_sparse("old", 3000, &[(0, 4), (1000, 4), (3000, 0)]).data("abcdefgh"),
        &["/ implicit", "old = abcd[996]efgh[1996]"],
    );
    let many: Vec<(u64, u64)> = (0..30).map(|ix| (ix * 20 + 10, 1)).collect();
    let expected = format!(
        "/ implicit|many = {}",
        "[10]x[9]".repeat(30).replace("[9][10]", "[19]")
    );
    let expected: Vec<&str> = expected.split('|').collect();
    check(
        LAYER,
        gnu_sparse("many", 600, &many).data("x".repeat(30)),
        &expected,
    );
    let pax =
        |records: &[(&str, &[u8])], data: &str| Tar::default().pax(records).file("stored", data);
    let zero = pax(
        &[
            ("GNU.sparse.size", b"40"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"10"),
            ("GNU.sparse.numbytes", b"2"),
            ("GNU.sparse.offset", b"30"),
            ("GNU.sparse.numbytes", b"10"),
        ],
        "abcdefghijkl",
    );
    check(
        LAYER,
        zero,
        &["/ implicit", "stored = [10]ab[18]cdefghijkl"],
    );
    let first = pax(
        &[
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.size", b"20"),
            ("GNU.sparse.map", b"0,1,19,1"),
        ],
        "ab",
    );
    check(LAYER, first, &["/ implicit", "real = a[18]b"]);
    let map = format!("{:\0<512}", "2\n9\n1\n20\n0\n");
    let second = pax(
        &[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.realsize", b"20"),
        ],
        &format!("{map}a"),
    );
    check(
        LAYER,
        second.file("next", "1"),
        &["/ implicit", "next = 1", "real = [9]a[10]"],
    );
}

#[test]
fn hardlinks_into_the_layers_below() {
    let test = TestStore::new();
    let limits = Limits::default();
    let lower = Tar::default()
        .head(Head::new(b'0', "etc/conf", 4).put(108, "0000005"))
        .data("conf")
        .head(head(b'5', "srv").put(100, "0000711"))
        .file("srv/x", "1")
        .file("srv/y", "1")
        .end();
    let (lower, _) = test.unpack(&lower, LAYER, &limits).unwrap();
    let below = [lower];
    let upper = Tar::default()
        .hardlink("copy", "etc/conf")
        .file("srv/.wh..wh..opq", "");
    let (upper, depends) = test
        .unpack(&upper.end(), Dialect::Layer(&below), &limits)
        .unwrap();
    assert!(depends);
    let expected = [
        "/ implicit",
        "copy = conf 5:0 link#0",
        "etc/ implicit",
        "etc/conf = conf 5:0 link#0",
        "srv/ opaque 711",
    ];
    assert_eq!(test.show(&upper), expected);
    for hidden in [
        Tar::default().file("srv/.wh.x", ""),
        Tar::default().file("srv/.wh..wh..opq", ""),
        Tar::default().file(".wh.srv", ""),
        Tar::default().file("srv", ""),
    ] {
        let archive = hidden.hardlink("l", "srv/x").end();
        let error = test
            .unpack(&archive, Dialect::Layer(&below), &limits)
            .unwrap_err();
        assert!(error.contains("\"l\""), "{error}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn hostile_archives_are_refused_by_name() {
    let test = TestStore::new();
    let usual = Limits::default();
    let tar = Tar::default;
    let deep = "a/".repeat(1500);
    let mut nested = tar().symlink("s0", ".");
    for level in 0..3 {
        let path = format!("s{level}/{deep}");
        nested = nested
            .pax(&[("path", path.as_bytes())])
            .dir("x")
            .pax(&[("linkpath", path.as_bytes())])
            .symlink(format!("s{}", level + 1), "x");
    }
    let mut huge = Head::new(b'0', "claim", 0);
    huge.put(124, format!("{:011o}", 8_u64 << 30));
    let mut extension = Head::new(b'x', "pax", 0);
    extension.put(124, format!("{:011o}", 3_u64 << 30));
    let mut checksum = tar().file("x", "").0;
    checksum[0] = b'y';
    let sparse = |size: &[u8], map: &[u8]| {
        let records = [("GNU.sparse.size", size), ("GNU.sparse.map", map)];
        tar().pax(&records).file("bomb", "12")
    };
    let many_segments = {
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"bomb"),
            ("GNU.sparse.realsize", b"9"),
        ];
        tar()
            .pax(&records)
            .file("x", format!("{:\0<512}", "9999999999\n"))
    };
    let xattr = |name: &str, value: &[u8]| {
        tar()
            .pax(&[(&format!("SCHILY.xattr.{name}"), value)])
            .file("attributed", "")
    };
    for (archive, expected) in [
        (
            tar().file("../etc/passwd", ""),
            "\"../etc/passwd\": a name in an archive must not contain \"..\"",
        ),
        (tar().file("a/../../b", ""), "must not contain \"..\""),
        (tar().file("/..", ""), "must not contain \"..\""),
        (tar().dir("a/.."), "must not contain \"..\""),
        (
            tar().hardlink("h", "../../etc/shadow"),
            "\"h\": a name in an archive must not contain",
        ),
        (
            tar().hardlink("h", "/etc/shadow"),
            "\"h\": is a hardlink to \"/etc/shadow\", which is neither",
        ),
        (
            tar().symlink("l", "/").hardlink("h", "l/etc/shadow"),
            "which is neither in the archive",
        ),
        (
            tar().dir("d").hardlink("h", "d"),
            "is a hardlink to the directory \"d\"",
        ),
        (tar().hardlink("h", ""), "which is neither"),
        (
            tar().symlink("a", "b").symlink("b", "a").file("a/x", ""),
            "\"a/x\": its name leads through more than 40",
        ),
        (
            tar().file("f", "").file("f/x", ""),
            "\"f/x\": its name leads through an entry that is not a directory",
        ),
        (
            tar().file("f", "").file("f/.wh..wh..opq", ""),
            "not a directory",
        ),
        (
            tar().symlink("s", ""),
            "\"s\": a symlink's target must have",
        ),
        (
            tar().file("", "x"),
            "the root of an archive must be a directory",
        ),
        (
            tar().symlink("/", "x"),
            "the root of an archive must be a directory",
        ),
        (
            tar().file(".wh...", ""),
            "\".wh...\": is not a valid whiteout",
        ),
        (
            tar().file("a/.wh..", ""),
            "\"a/.wh..\": is not a valid whiteout",
        ),
        (tar().file(".wh.", ""), "is not a valid whiteout"),
        (tar().file(".wh.a/b", ""), "is not a valid whiteout"),
        (
            tar().member(b'M', "volume", ""),
            "\"volume\": members of type 'M' are not supported",
        ),
        (
            tar().pax(&[("path", b"a\0b")]).file("x", ""),
            "the name in its header is not valid",
        ),
        (
            tar()
                .pax(&[("path", "n".repeat(256).as_bytes())])
                .file("x", ""),
            "longer than 255 bytes",
        ),
        (
            tar()
                .pax(&[("path", "n/".repeat(5000).as_bytes())])
                .file("x", ""),
            "the length of its name is over the limit of 4096",
        ),
        (
            nested,
            "the depth of its directories is over the limit of 2048, which cannot be raised",
        ),
        (tar().head(&huge), "cut short"),
        (
            tar().pax(&[("size", b"999999999999999")]).file("x", ""),
            "\"x\": the sum of the sizes of files, in bytes, is over the limit of 68719476736",
        ),
        (
            tar().pax(&[("size", b"-1")]).file("x", ""),
            "\"x\": the size in its header is not valid",
        ),
        (tar().pax(&[("size", b"4096")]).file("x", ""), "cut short"),
        (
            tar().pax(&[("uid", b"4294967295")]).file("x", ""),
            "\"x\": the uid in its header",
        ),
        (
            tar().pax(&[("mtime", b"1e9")]).file("x", ""),
            "\"x\": the mtime in its header",
        ),
        (
            tar().head(&extension),
            "a PAX or GNU extension header is over the limit of 1048576",
        ),
        (
            tar().member(b'x', "p", "8 path=x\n").file("x", ""),
            "the PAX header at byte 0 is malformed",
        ),
        (
            tar()
                .member(b'x', "p", "99999999999 path=x\n")
                .file("x", ""),
            "is malformed",
        ),
        (
            tar().member(b'x', "p", "path=x\n").file("x", ""),
            "is malformed",
        ),
        (
            tar().pax(&[]).pax(&[]).file("x", ""),
            "two extension headers of one kind",
        ),
        (
            tar().gnu_long(b'L', "a").gnu_long(b'L', "b").file("x", ""),
            "two extension headers of one kind",
        ),
        (
            tar()
                .gnu_long(b'L', "a")
                .pax(&[("path", b"b")])
                .file("x", ""),
            "its GNU and PAX names differ",
        ),
        (
            tar()
                .gnu_long(b'K', "a")
                .pax(&[("linkpath", b"b")])
                .symlink("x", ""),
            "its GNU and PAX link targets differ",
        ),
        (
            tar().global(&[("size", b"1")]).file("x", ""),
            "a global PAX header sets names, sizes",
        ),
        (
            tar().global(&[("path", b"y")]).file("x", ""),
            "a global PAX header sets names, sizes",
        ),
        (tar().pax(&[("path", b"y")]), "cut short"),
        (
            sparse(b"9999999999", b"0,2"),
            "\"bomb\": the sum of the holes in sparse files, in bytes, is over the limit of 4294967296",
        ),
        (
            sparse(b"18446744073709551615", b"0,2"),
            "the sum of the holes",
        ),
        (
            sparse(b"10", b"0,1"),
            "\"bomb\": its map of holes is not valid",
        ),
        (sparse(b"1", b"0,2"), "its map of holes is not valid"),
        (sparse(b"10", b"4,1,3,1"), "its map of holes is not valid"),
        (sparse(b"10", b"0,2,5"), "its map of holes is not valid"),
        (
            sparse(b"10", b"18446744073709551615,2"),
            "its map of holes is not valid",
        ),
        (
            many_segments,
            "the number of its segments between holes is over the limit of 65536",
        ),
        (
            gnu_sparse("bomb", 8 << 30, &[(0, 2)]).data("12"),
            "the sum of the holes",
        ),
        (
            xattr(&format!("user.{}", "n".repeat(256)), b""),
            "the name of an xattr is over the limit of 255",
        ),
        (
            xattr("user.a", &vec![0; 65537]),
            "\"attributed\": the value of an xattr is over the limit of 65536",
        ),
        (
            xattr("user.a\0b", b""),
            "the name of an xattr in its header is not valid",
        ),
        (Tar(checksum), "no valid tar header at byte 0"),
        (
            Tar(b"#!/bin/sh\n".repeat(100)),
            "no valid tar header at byte 0",
        ),
    ] {
        refuse(&test, &archive.end(), &usual, expected);
    }
    let whole = tar().file("x", "data").file("y", "more").end();
    let taken = TestStore::new();
    for length in 1..whole.len() - 1024 {
        // A header and four bytes of contents; the padding may be missing.
        if (1..516).contains(&(length % 1024)) {
            refuse(&test, &whole[..length], &usual, "cut short");
        } else {
            let (layer, _) = taken.unpack(&whole[..length], LAYER, &usual).unwrap();
            let lines = taken.show(&layer).len();
            assert_eq!(lines, 1 + length.div_ceil(1024), "{length}");
        }
    }
}

#[test]
fn limits_are_told() {
    let test = TestStore::new();
    let few = Limits {
        entries: 3,
        ..Limits::default()
    };
    let archive = (0..4).fold(Tar::default(), |tar, ix| tar.file(format!("f{ix}"), ""));
    refuse(
        &test,
        &archive.end(),
        &few,
        "\"f3\": the number of entries is over the limit of 3",
    );
    let short = Limits {
        metadata: 100,
        ..Limits::default()
    };
    let archive = Tar::default()
        .file("n".repeat(60), "")
        .file("m".repeat(60), "");
    refuse(
        &test,
        &archive.end(),
        &short,
        "the size of all names and xattrs together, in bytes, is over the limit of 100",
    );
    // Following symlinks costs time, and is counted for that.
    let archive = (0..4).fold(Tar::default().symlink("l", "./".repeat(30)), |tar, ix| {
        tar.file(format!("l/{ix}"), "")
    });
    refuse(&test, &archive.end(), &short, "over the limit of 100");
}

#[test]
fn large_and_many_files_arrive_whole() {
    let test = TestStore::new();
    let large: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut tar = Tar::default().file("large", &large);
    for ix in 0..3000 {
        tar = tar.file(
            format!("d/{ix:04}"),
            format!("contents of {ix}").repeat(ix % 50),
        );
    }
    let archive = tar.file("last", &large[..1 << 20]).end();
    let (layer, _) = test.unpack(&archive, LAYER, &Limits::default()).unwrap();
    for (path, bytes) in [("large", &large[..]), ("last", &large[..1 << 20])] {
        let id = layer.lookup(path.as_bytes()).unwrap().object();
        assert_eq!(id, iii_store::ObjectId::of(bytes));
    }
    for ix in 0..3000 {
        let node = layer.lookup(format!("d/{ix:04}").as_bytes()).unwrap();
        let contents = format!("contents of {ix}").repeat(ix % 50);
        assert_eq!(node.object(), iii_store::ObjectId::of(contents.as_bytes()));
    }
    refuse(
        &TestStore::new(),
        &archive[..10_000_000],
        &Limits::default(),
        "the archive is cut short at byte 10000000, in \"large\"",
    );
}

/// One of everything that has a format of its own.
pub fn sample() -> Vec<u8> {
    let archive = gnu_sparse(
        "old",
        3000,
        &[(0, 4), (1000, 4), (2000, 1), (2010, 1), (2020, 2)],
    )
    .data("abcdefghijkl");
    archive
        .pax(&[
            ("path", b"long"),
            ("SCHILY.xattr.user.a", b"1"),
            ("mtime", b"1.5"),
        ])
        .file("x", "data")
        .gnu_long(b'L', "n".repeat(120))
        .dir("d")
        .symlink("s", "d")
        .file("s/x", "1")
        .hardlink("h", "long")
        .pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.map", b"0,1,19,1")])
        .file("sparse", "ab")
        .file("d/.wh.gone", "")
        .end()
}
