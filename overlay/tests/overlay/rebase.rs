//! A changed project under an upper that stays: the outcome, path by path, as the specification
//! says it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use iii_overlay::fs::{Caller, Filesystem, Kind, Rename, SetAttr, Special};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Overlay, OverlayOptions, Project};
use iii_store::Layer;
use iii_store::tree::{Dir, DirKind, Node, Tree, components};
use proptest::prelude::*;

use crate::support::{CONTENTS, Home, Seen, View, name, tree, view};

/// The project's tree, in its place.
fn at_workspace(project: Tree) -> Tree {
    let mut root = Tree::implicit();
    root.entries.insert((*b"w").into(), Node::Dir(project));
    root
}

fn options() -> OverlayOptions {
    OverlayOptions {
        project: Some(Project {
            path: b"w".to_vec(),
            slot: 1,
        }),
        ..OverlayOptions::default()
    }
}

/// What a change of a sandbox does, by the path of a directory and a name.
#[derive(Debug, Clone)]
enum Act {
    Write(Vec<u8>),
    Mkdir,
    Chmod,
    Remove,
    Move(prop::sample::Index, Box<[u8]>),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 1..4).prop_map(Act::Write),
        2 => Just(Act::Mkdir),
        1 => Just(Act::Chmod),
        3 => Just(Act::Remove),
        2 => (any::<prop::sample::Index>(), name()).prop_map(|(to, name)| Act::Move(to, name)),
    ]
}

fn find(fs: &Overlay, path: &[u8]) -> Option<Ino> {
    components(path).try_fold(ROOT, |dir, name| Some(fs.lookup(dir, name).ok()?.ino))
}

fn remove(fs: &Overlay, dir: Ino, name: &[u8]) {
    let Ok(attr) = fs.lookup(dir, name) else {
        return;
    };
    if attr.kind == Kind::Dir {
        for (name, _, _) in crate::support::names(fs, attr.ino, false).split_off(2) {
            remove(fs, attr.ino, &name);
        }
        fs.rmdir(dir, name).unwrap();
    } else {
        fs.unlink(dir, name).unwrap();
    }
}

fn apply(fs: &Overlay, pick: prop::sample::Index, name: &[u8], act: &Act) {
    let now = view(fs);
    let dirs: Vec<_> = now
        .iter()
        .filter(|(_, seen)| seen.kind == Kind::Dir)
        .map(|(path, _)| path.clone())
        .collect();
    let dir = find(fs, pick.get::<Vec<u8>>(&dirs)).unwrap();
    let there = fs.lookup(dir, name).ok();
    match (act, there) {
        (Act::Write(bytes), None) => {
            let made = fs
                .mknod(Caller::default(), dir, name, 0o600, Special::File)
                .unwrap();
            fs.write(made.ino, bytes, 0, true).unwrap();
        }
        (Act::Write(bytes), Some(attr)) if attr.kind == Kind::File => {
            fs.write(attr.ino, bytes, 0, true).unwrap();
        }
        (Act::Mkdir, None) => {
            fs.mkdir(Caller::default(), dir, name, 0o700).unwrap();
        }
        (Act::Chmod, Some(attr)) => {
            let set = SetAttr {
                mode: Some(0o700),
                ..SetAttr::default()
            };
            fs.setattr(attr.ino, &set).unwrap();
        }
        (Act::Remove, Some(_)) => remove(fs, dir, name),
        (Act::Move(to, to_name), Some(_)) => {
            let to = find(fs, to.get::<Vec<u8>>(&dirs)).unwrap();
            // Moves that cannot be are none.
            let _ = fs.rename(dir, name, to, to_name, Rename::Replace);
        }
        _ => {}
    }
}

/// What is compared: not times, nor which names are one file.
fn bare(view: View) -> View {
    view.into_iter()
        .map(|(path, seen)| {
            let bare = Seen {
                nlink: 0,
                link: None,
                mtime: None,
                ..seen
            };
            (path, bare)
        })
        .collect()
}

fn parent(path: &[u8]) -> Vec<u8> {
    let at = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    path[..at].to_vec()
}

/// The specification.
fn expected(old_lower: &View, old: &View, new_lower: &View, changed: &BTreeSet<Vec<u8>>) -> View {
    let paths: BTreeSet<&Vec<u8>> = old_lower
        .keys()
        .chain(old.keys())
        .chain(new_lower.keys())
        .collect();
    let mut expected: BTreeMap<Vec<u8>, Seen> = BTreeMap::new();
    for path in paths {
        let stays = old.get(path) != old_lower.get(path);
        let seen = if changed.contains(path) || !stays {
            new_lower.get(path)
        } else {
            old.get(path)
        };
        if let Some(seen) = seen {
            expected.insert(path.clone(), seen.clone());
        }
    }
    // Every entry needs its directories: those of a changed path come from the project, others from
    // the sandbox, unless the project has put something else there.
    let is_dir = |seen: Option<&Seen>| seen.is_some_and(|seen| seen.kind == Kind::Dir);
    for path in expected.keys().cloned().collect::<Vec<_>>() {
        let by_project = changed.contains(&path);
        let mut up = Vec::new();
        let mut at = path.clone();
        while !at.is_empty() {
            at = parent(&at);
            up.push(at.clone());
        }
        for dir in up.into_iter().rev() {
            if !expected.contains_key(&path) || is_dir(expected.get(&dir)) {
                continue;
            }
            if by_project {
                expected.insert(dir.clone(), new_lower[&dir].clone());
            } else if expected.contains_key(&dir) && changed.contains(&dir) {
                expected.remove(&path);
            } else {
                expected.insert(dir.clone(), old[&dir].clone());
            }
        }
    }
    expected
}

fn lower_view(home: &Home, layers: &[Arc<Layer>], at: &str) -> View {
    let overlay = home.open_at(layers, &home.dir.path().join(at), OverlayOptions::default());
    bare(view(&overlay))
}

fn merged(mut tree: Dir) -> Dir {
    tree.meta.mode = 0o755;
    tree
}

proptest! {
    #[test]
    fn changed_paths_win_and_the_rest_stays(
        base in tree(),
        before in tree(),
        after in tree(),
        tops in prop::collection::vec(tree(), 2),
        same_top in any::<bool>(),
        acts in prop::collection::vec((any::<prop::sample::Index>(), name(), act()), 0..12),
        thaws in any::<bool>(),
    ) {
        let home = Home::new();
        let base = home.layer(&base, &CONTENTS);
        let old_project = home.layer(&at_workspace(merged(before)), &CONTENTS);
        let new_project = home.layer(&at_workspace(merged(after)), &CONTENTS);
        // What steps wrote, over the project.
        let tops: Vec<_> = tops.iter().map(|top| home.layer(top, &CONTENTS)).collect();
        let old_layers = vec![base.clone(), old_project, tops[0].clone()];
        let new_layers = vec![base, new_project, tops[usize::from(!same_top)].clone()];
        let mut upper = home.upper();
        let overlay = home.open_at(&old_layers, &upper, options());
        for (dir, name, act) in &acts {
            apply(&overlay, *dir, name, act);
        }
        let old = bare(view(&overlay));
        if thaws {
            // As it was is as it is when it was frozen.
            upper = home.dir.path().join("thawed");
            home.thaw(&overlay, &old_layers, &upper);
        }
        drop(overlay);
        let old_lower = lower_view(&home, &old_layers, "old");
        let new_lower = lower_view(&home, &new_layers, "new");
        let changed = changed(&old_lower, &new_lower);
        let overlay = home.open_at(&new_layers, &upper, options());
        let carried = view(&overlay);
        prop_assert_eq!(
            bare(carried.clone()),
            expected(&old_lower, &old, &new_lower, &changed)
        );
        drop(overlay);
        let overlay = home.open_at(&new_layers, &upper, options());
        prop_assert_eq!(view(&overlay), carried, "and it was written down");
    }
}

/// The paths at which two views differ.
fn changed(old: &View, new: &View) -> BTreeSet<Vec<u8>> {
    let paths = old.keys().chain(new.keys());
    paths
        .filter(|path| old.get(*path) != new.get(*path))
        .cloned()
        .collect()
}

/// Without directories that the lower does not have and nothing is in: of one that the project had
/// once, whose files it took away and the sandbox its own, nobody can say whose it is.
fn without_empty(mut view: View, lower: &View) -> View {
    for (path, seen) in view.clone().into_iter().rev() {
        let below = [&path, &b"/"[..]].concat();
        let is_empty = !view
            .range(below.clone()..)
            .next()
            .is_some_and(|(next, _)| next.starts_with(&below));
        if seen.kind == Kind::Dir && is_empty && !lower.contains_key(&path) {
            view.remove(&path);
        }
    }
    view
}

proptest! {
    /// What a running sandbox sees of a changed project is what it would see if it were started
    /// again, then and ever after.
    #[test]
    fn an_update_is_like_starting_again(
        base in tree(),
        top in tree(),
        projects in prop::collection::vec(tree(), 2..5),
        acts in prop::collection::vec((any::<prop::sample::Index>(), name(), act()), 0..12),
        restarts in any::<bool>(),
        thaws in any::<bool>(),
        ends_with in any::<prop::sample::Index>(),
    ) {
        let home = Home::new();
        let base = home.layer(&base, &CONTENTS);
        let projects: Vec<Arc<Layer>> = projects
            .into_iter()
            .map(|project| home.layer(&at_workspace(merged(project)), &CONTENTS))
            .collect();
        let top = home.layer(&top, &CONTENTS);
        let layers = |at: usize| [base.clone(), projects[at].clone(), top.clone()];
        let mut upper = home.upper();
        let mut overlay = home.open_at(&layers(0), &upper, options());
        let mut stands_on = 0;
        let mut acts = acts.chunks(4);
        for (at, project) in projects.iter().enumerate().skip(1) {
            for (dir, name, act) in acts.next().unwrap_or_default() {
                apply(&overlay, *dir, name, act);
            }
            let old = bare(view(&overlay));
            let old_lower = lower_view(&home, &layers(at - 1), &format!("old{at}"));
            let new_lower = lower_view(&home, &layers(at), &format!("new{at}"));
            let changed = changed(&old_lower, &new_lower);
            overlay.update(project).unwrap();
            prop_assert_eq!(
                bare(view(&overlay)),
                expected(&old_lower, &old, &new_lower, &changed),
                "update {}", at
            );
            if restarts {
                let before = bare(view(&overlay));
                if thaws {
                    upper = home.dir.path().join(format!("thawed{at}"));
                    home.thaw(&overlay, &layers(stands_on), &upper);
                }
                stands_on = at;
                drop(overlay);
                overlay = home.open_at(&layers(at), &upper, options());
                prop_assert_eq!(
                    without_empty(bare(view(&overlay)), &new_lower),
                    without_empty(before, &new_lower),
                    "restart {}", at
                );
            }
        }
        // Started again on any of them.
        let last = projects.len() - 1;
        let end = ends_with.index(projects.len());
        let old = bare(view(&overlay));
        let old_lower = lower_view(&home, &layers(last), "last");
        let new_lower = lower_view(&home, &layers(end), "end");
        drop(overlay);
        let overlay = home.open_at(&layers(end), &upper, options());
        let changed = changed(&old_lower, &new_lower);
        prop_assert_eq!(
            without_empty(bare(view(&overlay)), &new_lower),
            without_empty(expected(&old_lower, &old, &new_lower, &changed), &new_lower),
            "started again on {} after {}", end, last
        );
    }
}

/// The example of everyday: a file edited on the host, others written in the sandbox.
#[test]
fn an_edited_file_shows_and_what_the_sandbox_wrote_stays() {
    let home = Home::new();
    let project = |files: &[(&[u8], &[u8])]| {
        let mut tree = Tree::implicit();
        for (path, bytes) in files {
            crate::support::put(&mut tree, path, bytes);
        }
        let contents: Vec<&[u8]> = files.iter().map(|(_, bytes)| *bytes).collect();
        home.layer(&tree, &contents)
    };
    let base = home.layer(&Tree::implicit(), &[]);
    let before = project(&[
        (b"w/src/a", b"a1"),
        (b"w/src/b", b"b1"),
        (b"w/gone/c", b"c1"),
    ]);
    let after = project(&[
        (b"w/src/a", b"a2"),
        (b"w/src/b", b"b1"),
        (b"w/gone/c", b"c2"),
    ]);
    let overlay = home.open_at(&[base.clone(), before], &home.upper(), options());
    for path in [&b"w/src/a"[..], b"w/src/b"] {
        let ino = find(&overlay, path).unwrap();
        overlay.write(ino, b"mine", 0, true).unwrap();
    }
    let w = find(&overlay, b"w").unwrap();
    remove(&overlay, w, b"gone");
    let made = overlay
        .mknod(Caller::default(), w, b"own", 0o644, Special::File)
        .unwrap();
    overlay.write(made.ino, b"own", 0, true).unwrap();
    drop(overlay);
    let overlay = home.open_at(&[base, after], &home.upper(), options());
    let files: Vec<_> = view(&overlay)
        .into_iter()
        .filter(|(_, seen)| seen.kind == Kind::File)
        .map(|(path, seen)| (path, seen.bytes))
        .collect();
    let want = [
        (&b"w/gone/c"[..], &b"c2"[..]),
        (b"w/own", b"own"),
        (b"w/src/a", b"a2"),
        (b"w/src/b", b"mine"),
    ];
    assert_eq!(
        files,
        want.map(|(path, bytes)| (path.to_vec(), bytes.to_vec()))
    );
}

/// What the base has, what the sandbox removes, and the files that it sees before and after.
type Removal = (
    &'static [&'static [u8]],
    &'static [u8],
    &'static [&'static [u8]],
    &'static [&'static [u8]],
);

const REMOVALS: [Removal; 4] = [
    (&[], b"w/dir", &[b"w/other"], &[]),
    (&[], b"w/dir/a", &[b"w/dir/b", b"w/other"], &[b"w/dir/b"]),
    (
        &[b"w/dir/hidden"],
        b"w/dir/a",
        &[b"w/dir/b", b"w/dir/hidden", b"w/other"],
        &[b"w/dir/b"],
    ),
    (&[b"w/dir/hidden"], b"w/dir", &[b"w/other"], &[]),
];

/// A directory that comes to hide the layers below did not change, only what it hides: what the
/// sandbox removed of the rest stays away.
#[test]
fn a_directory_that_became_opaque_did_not_change() {
    let home = Home::new();
    let layer = |files: &[&[u8]], kind: Option<DirKind>| {
        let mut tree = Tree::implicit();
        for path in files {
            crate::support::put(&mut tree, path, b"same");
        }
        if let Some(kind) = kind {
            let dir = tree.dir_at(b"w/dir").unwrap();
            (dir.kind, dir.meta.mode) = (kind, 0o755);
        }
        home.layer(&tree, &[b"same"])
    };
    let files = |overlay: &Overlay| -> Vec<Vec<u8>> {
        let files = view(overlay).into_iter();
        let files = files.filter(|(_, seen)| seen.kind == Kind::File);
        files.map(|(path, _)| path).collect()
    };
    let merged = layer(&[b"w/dir/a", b"w/dir/b", b"w/other"], Some(DirKind::Merged));
    let opaque = layer(&[b"w/dir/a", b"w/dir/b"], Some(DirKind::Opaque));
    for (at, (below, removed, before, after)) in REMOVALS.into_iter().enumerate() {
        let base = layer(below, None);
        for runs in [false, true] {
            let upper = home.dir.path().join(format!("upper-{at}-{runs}"));
            let overlay = home.open_at(&[base.clone(), merged.clone()], &upper, options());
            let dir = find(&overlay, &parent(removed)).unwrap();
            remove(&overlay, dir, components(removed).last().unwrap());
            assert_eq!(files(&overlay), before, "case {at}");
            if runs {
                overlay.update(&opaque).unwrap();
                assert_eq!(files(&overlay), after, "case {at}, updated");
                assert_eq!(find(&overlay, removed), None, "case {at}, updated");
            }
            drop(overlay);
            let overlay = home.open_at(&[base.clone(), opaque.clone()], &upper, options());
            assert_eq!(files(&overlay), after, "case {at}, {runs}");
            assert_eq!(find(&overlay, removed), None, "case {at}, {runs}");
        }
    }
}

/// Nobody pins the layers between the first and the last for long.
#[test]
fn a_file_that_moved_keeps_what_a_former_project_had() {
    let home = Home::new();
    let project = |bytes: &[u8]| {
        let mut tree = Tree::implicit();
        crate::support::put(&mut tree, b"w/a", bytes);
        home.layer(&tree, &[bytes])
    };
    let projects = [&b"first"[..], b"second", b"third"].map(project);
    let base = home.layer(&Tree::implicit(), &[]);
    let layers = |at: usize| [base.clone(), projects[at].clone()];
    let overlay = home.open_at(&layers(0), &home.upper(), options());
    let w = find(&overlay, b"w").unwrap();
    for (at, name) in [(1, &b"of-first"[..]), (2, b"of-second")] {
        overlay.rename(w, b"a", w, name, Rename::Replace).unwrap();
        overlay.update(&projects[at]).unwrap();
    }
    home.lose(b"second");
    let files = |overlay: &Overlay| -> Vec<_> {
        let files = view(overlay).into_iter();
        files
            .filter(|(_, seen)| seen.kind == Kind::File)
            .map(|(_, seen)| seen.bytes)
            .collect()
    };
    let want = [&b"third"[..], b"first", b"second"];
    assert_eq!(files(&overlay), want);
    drop(overlay);
    let overlay = home.open_at(&layers(2), &home.upper(), options());
    assert_eq!(files(&overlay), want);
}

/// A package that the sandbox changed is that of a newer install afterwards, whole, and it is told
/// how many files gave way.
#[test]
fn what_a_step_changed_wins_and_is_counted() {
    let home = Home::new();
    let layer = |files: &[(&[u8], &[u8])]| {
        let mut tree = Tree::implicit();
        for (path, bytes) in files {
            crate::support::put(&mut tree, path, bytes);
        }
        let contents: Vec<&[u8]> = files.iter().map(|(_, bytes)| *bytes).collect();
        home.layer(&tree, &contents)
    };
    let base = layer(&[(b"etc/a", b"base")]);
    let project = layer(&[(b"w/package.json", b"1")]);
    let edited = layer(&[(b"w/package.json", b"2")]);
    let install = |version: &'static [u8]| {
        layer(&[
            (b"w/node_modules/ms/package.json", version),
            (b"w/node_modules/ms/index.js", version),
            (b"w/node_modules/ms/readme", version),
            (b"w/node_modules/other/index.js", b"other"),
        ])
    };
    let old = [base.clone(), project.clone(), install(b"2.1.2")];
    let new = [base.clone(), edited.clone(), install(b"2.1.3")];
    let overlay = home.open_at(&old, &home.upper(), options());
    for path in [&b"ms/package.json"[..], b"ms/index.js", b"other/index.js"] {
        let path = [&b"w/node_modules/"[..], path].concat();
        let ino = find(&overlay, &path).unwrap();
        overlay.write(ino, b"2.0.0", 0, true).unwrap();
    }
    let ms = find(&overlay, b"w/node_modules/ms").unwrap();
    remove(&overlay, ms, b"readme");
    let own = overlay
        .mknod(Caller::default(), ROOT, b"own", 0o644, Special::File)
        .unwrap();
    overlay.write(own.ino, b"own", 0, true).unwrap();
    // What an update brings is not the sandbox's, and gives way uncounted.
    overlay.update(&edited).unwrap();
    assert_eq!(overlay.gave_way(), 0);
    drop(overlay);
    let overlay = home.open_at(&new, &home.upper(), options());
    assert_eq!(overlay.gave_way(), 3);
    let files = |overlay: &Overlay| -> Vec<(Vec<u8>, Vec<u8>)> {
        let files = view(overlay).into_iter();
        let files = files.filter(|(_, seen)| seen.kind == Kind::File);
        files.map(|(path, seen)| (path, seen.bytes)).collect()
    };
    let want = [
        (&b"etc/a"[..], &b"base"[..]),
        (b"own", b"own"),
        (b"w/node_modules/ms/index.js", b"2.1.3"),
        (b"w/node_modules/ms/package.json", b"2.1.3"),
        (b"w/node_modules/ms/readme", b"2.1.3"),
        (b"w/node_modules/other/index.js", b"2.0.0"),
        (b"w/package.json", b"2"),
    ];
    let want = want.map(|(path, bytes)| (path.to_vec(), bytes.to_vec()));
    assert_eq!(files(&overlay), want);
    drop(overlay);
    // The same layers in another order, as an earlier program composed them: nothing but what they
    // have in common changes.
    let [base, project, install] = new;
    let overlay = home.open_at(
        &[base, install, project],
        &home.upper(),
        OverlayOptions {
            project: Some(Project {
                path: b"w".to_vec(),
                slot: 2,
            }),
            ..OverlayOptions::default()
        },
    );
    assert_eq!((files(&overlay), overlay.gave_way()), (want.to_vec(), 0));
}

/// What a layer above the project hides is not shown by an update, and what it shows is not taken
/// away.
#[test]
fn an_update_respects_what_is_above_the_project() {
    let home = Home::new();
    let project = |text: &[u8]| {
        let mut tree = Tree::implicit();
        for path in [&b"w/lock"[..], b"w/gone", b"w/run.sh", b"w/dir/a"] {
            crate::support::put(&mut tree, path, text);
        }
        home.layer(&tree, &[text])
    };
    let mut step = Tree::implicit();
    for path in [&b"w/lock"[..], b"w/dir/made"] {
        crate::support::put(&mut step, path, b"step");
    }
    let w = step.dir_at(b"w").unwrap();
    let gone = iii_store::tree::Leaf {
        meta: iii_store::tree::Meta::default(),
        content: iii_store::tree::Content::Whiteout,
        link: None,
    };
    w.entries.insert((*b"gone").into(), Node::Leaf(gone));
    let step = home.layer(&step, &[b"step"]);
    let (one, two) = (project(b"one"), project(b"two"));
    let base = home.layer(&Tree::implicit(), &[]);
    let overlay = home.open_at(&[base.clone(), one, step.clone()], &home.upper(), options());
    // The sandbox's own change of a file that a step wrote over.
    let lock = find(&overlay, b"w/lock").unwrap();
    overlay.write(lock, b"mine", 0, true).unwrap();
    overlay.update(&two).unwrap();
    let files = |overlay: &Overlay| -> Vec<(Vec<u8>, Vec<u8>)> {
        let files = view(overlay).into_iter();
        let files = files.filter(|(_, seen)| seen.kind == Kind::File);
        files.map(|(path, seen)| (path, seen.bytes)).collect()
    };
    let want = [
        (&b"w/dir/a"[..], &b"two"[..]),
        (b"w/dir/made", b"step"),
        (b"w/lock", b"mine"),
        (b"w/run.sh", b"two"),
    ];
    let want = want.map(|(path, bytes)| (path.to_vec(), bytes.to_vec()));
    assert_eq!(files(&overlay), want);
    drop(overlay);
    let overlay = home.open_at(&[base, two, step], &home.upper(), options());
    assert_eq!((files(&overlay), overlay.gave_way()), (want.to_vec(), 0));
}
