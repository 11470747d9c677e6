//! Random operations on random layers, against the model, with restarts and freezing.

use std::sync::Arc;

use iii_overlay::fs::{
    Caller, Errno, Filesystem, Kind, Rename, SetAttr, SetTime, SetXattr, Special, Time,
};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Footing, Overlay, OverlayOptions};
use iii_store::Layer;
use proptest::prelude::*;

use crate::model::{Model, new_inode};
use crate::support::{CONTENTS, Home, View, name, timeless, tree, view};

/// Picks a directory by its index among all.
type Pick = prop::sample::Index;
type Name = Box<[u8]>;

#[derive(Debug, Clone)]
enum Step {
    Create(Pick, Name, u16),
    Mkdir(Pick, Name, u16),
    Symlink(Pick, Name),
    Fifo(Pick, Name),
    Unlink(Pick, Name),
    Rmdir(Pick, Name),
    RemoveAll(Pick, Name),
    Rename(Pick, Name, Pick, Name, u8),
    Link(Pick, Name, Pick, Name),
    Write(Pick, Name, u64, Vec<u8>),
    Truncate(Pick, Name, u64),
    Chmod(Pick, Name, u16),
    Chown(Pick, Name, u32, u32),
    Utimes(Pick, Name, i64),
    SetXattr(Pick, Name),
    RemoveXattr(Pick, Name),
    Restart,
    Thaw,
}

fn step() -> impl Strategy<Value = Step> {
    let dir = any::<Pick>;
    let mode = || prop::sample::select(&[0o644_u16, 0o755, 0o4711, 0o2755][..]);
    prop_oneof![
        3 => (dir(), name(), mode()).prop_map(|(d, n, m)| Step::Create(d, n, m)),
        3 => (dir(), name(), mode()).prop_map(|(d, n, m)| Step::Mkdir(d, n, m)),
        1 => (dir(), name()).prop_map(|(d, n)| Step::Symlink(d, n)),
        1 => (dir(), name()).prop_map(|(d, n)| Step::Fifo(d, n)),
        4 => (dir(), name()).prop_map(|(d, n)| Step::Unlink(d, n)),
        2 => (dir(), name()).prop_map(|(d, n)| Step::Rmdir(d, n)),
        2 => (dir(), name()).prop_map(|(d, n)| Step::RemoveAll(d, n)),
        8 => (dir(), name(), dir(), name(), 0..10_u8)
            .prop_map(|(d, n, e, m, how)| Step::Rename(d, n, e, m, how)),
        4 => (dir(), name(), dir(), name()).prop_map(|(d, n, e, m)| Step::Link(d, n, e, m)),
        4 => (dir(), name(), 0..50_u64, prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(d, n, at, bytes)| Step::Write(d, n, at, bytes)),
        3 => (dir(), name(), prop_oneof![Just(0_u64), 0..60_u64])
            .prop_map(|(d, n, len)| Step::Truncate(d, n, len)),
        2 => (dir(), name(), mode()).prop_map(|(d, n, m)| Step::Chmod(d, n, m)),
        1 => (dir(), name(), 0..3_u32, 0..3_u32).prop_map(|(d, n, u, g)| Step::Chown(d, n, u, g)),
        1 => (dir(), name(), -5..5_i64).prop_map(|(d, n, t)| Step::Utimes(d, n, t)),
        1 => (dir(), name()).prop_map(|(d, n)| Step::SetXattr(d, n)),
        1 => (dir(), name()).prop_map(|(d, n)| Step::RemoveXattr(d, n)),
        1 => Just(Step::Restart),
        1 => Just(Step::Thaw),
    ]
}

const CALLER: Caller = Caller { uid: 7, gid: 8 };
const OWNER: (u32, u32) = (7, 8);

/// Overlay and model side by side.
struct Pair<'a> {
    home: &'a Home,
    layers: Vec<Arc<Layer>>,
    overlay: Option<Overlay>,
    model: Model,
    /// Number of times that the upper was made anew.
    thaws: usize,
}

impl Pair<'_> {
    fn fs(&self) -> &Overlay {
        self.overlay.as_ref().expect("open")
    }

    fn open(&self) -> Overlay {
        let upper = self.home.dir.path().join(format!("upper{}", self.thaws));
        self.home
            .open_at(&self.layers, &upper, OverlayOptions::default())
    }

    /// Freezes the upper, and goes on with an upper that is made from the result.
    fn thaw(&mut self) {
        let before = view(self.fs());
        let tree = self.home.frozen(self.fs());
        let written: Vec<_> = before.values().map(|seen| seen.bytes.clone()).collect();
        let written: Vec<&[u8]> = written.iter().map(Vec::as_slice).collect();
        let frozen = self.home.layer(&tree, &written);
        self.thaws += 1;
        let upper = self.home.dir.path().join(format!("upper{}", self.thaws));
        let footing = Footing::default();
        iii_overlay::thaw(&upper, &footing, self.layers.clone(), &frozen).unwrap();
        let id = frozen.layer_id();
        assert_eq!(iii_overlay::thawed_of(&upper).unwrap(), Some(id));
        self.overlay = Some(self.open());
        assert_eq!(
            frozen_view(view(self.fs())),
            frozen_view(before),
            "an upper that is thawed is as it was frozen"
        );
        let again = self.home.layer(&self.home.frozen(self.fs()), &written);
        assert_eq!(again.layer_id(), id, "and is frozen as it was");
    }

    /// The same directory in overlay and model.
    fn dir(&self, pick: Pick) -> (Ino, usize) {
        let dirs = self.model.dirs();
        let (path, ix) = pick.get(&dirs);
        (self.ino(path), *ix)
    }

    fn ino(&self, path: &[u8]) -> Ino {
        iii_store::tree::components(path).fold(ROOT, |dir, name| {
            let ino = self.fs().lookup(dir, name).expect("the model has it").ino;
            self.fs().forget(ino, 1);
            ino
        })
    }

    /// The same entry in overlay and model, if it exists.
    fn child(&self, pick: Pick, name: &[u8]) -> Option<(Ino, usize)> {
        let (dir, model_dir) = self.dir(pick);
        let ours = self.fs().lookup(dir, name);
        let theirs = self.model.child(model_dir, name);
        assert_eq!(ours.is_ok(), theirs.is_some(), "{name:?}");
        let ino = ours.ok()?.ino;
        self.fs().forget(ino, 1);
        Some((ino, theirs?))
    }

    fn same(ours: Result<(), Errno>, theirs: Result<(), Errno>) {
        assert_eq!(ours, theirs);
    }

    fn made(&self, ours: Result<iii_overlay::fs::Attr, Errno>, theirs: Result<(), Errno>) {
        if let Ok(attr) = &ours {
            self.fs().forget(attr.ino, 1);
        }
        Self::same(ours.map(drop), theirs);
    }

    fn remove_all(&mut self, dir: Ino, model_dir: usize, name: &[u8]) {
        let Some(ix) = self.model.child(model_dir, name) else {
            return;
        };
        if self.model.inodes[ix].kind == Kind::Dir {
            let ino = self.fs().lookup(dir, name).unwrap().ino;
            self.fs().forget(ino, 1);
            let names: Vec<_> = self.model.inodes[ix].entries.keys().cloned().collect();
            for name in names {
                self.remove_all(ino, ix, &name);
            }
            Self::same(
                self.fs().rmdir(dir, name),
                self.model.rmdir(model_dir, name),
            );
        } else {
            Self::same(
                self.fs().unlink(dir, name),
                self.model.unlink(model_dir, name),
            );
        }
    }

    fn setattr(&self, ino: Ino, set: SetAttr) {
        self.fs().setattr(ino, &set).unwrap();
    }

    #[allow(clippy::too_many_lines)]
    fn take(&mut self, step: Step) {
        match step {
            Step::Create(dir, name, mode) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().mknod(CALLER, dir, &name, mode, Special::File);
                let inode = new_inode(Kind::File, mode, OWNER, b"");
                let theirs = self.model.make(model_dir, &name, inode);
                self.made(ours, theirs);
            }
            Step::Mkdir(dir, name, mode) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().mkdir(CALLER, dir, &name, mode);
                let inode = new_inode(Kind::Dir, mode, OWNER, b"");
                let theirs = self.model.make(model_dir, &name, inode);
                self.made(ours, theirs);
            }
            Step::Symlink(dir, name) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().symlink(CALLER, dir, &name, b"to");
                let inode = new_inode(Kind::Symlink, 0o777, OWNER, b"to");
                let theirs = self.model.make(model_dir, &name, inode);
                self.made(ours, theirs);
            }
            Step::Fifo(dir, name) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().mknod(CALLER, dir, &name, 0o600, Special::Fifo);
                let inode = new_inode(Kind::Fifo, 0o600, OWNER, b"");
                let theirs = self.model.make(model_dir, &name, inode);
                self.made(ours, theirs);
            }
            Step::Unlink(dir, name) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().unlink(dir, &name);
                Self::same(ours, self.model.unlink(model_dir, &name));
            }
            Step::Rmdir(dir, name) => {
                let (dir, model_dir) = self.dir(dir);
                let ours = self.fs().rmdir(dir, &name);
                Self::same(ours, self.model.rmdir(model_dir, &name));
            }
            Step::RemoveAll(dir, name) => {
                let (dir, model_dir) = self.dir(dir);
                self.remove_all(dir, model_dir, &name);
            }
            Step::Rename(dir, name, to, to_name, how) => {
                let how = match how {
                    0 => Rename::NoReplace,
                    1 | 2 => Rename::Exchange,
                    3 => Rename::Whiteout,
                    _ => Rename::Replace,
                };
                let ((dir, model_dir), (to, model_to)) = (self.dir(dir), self.dir(to));
                let ours = self.fs().rename(dir, &name, to, &to_name, how);
                let theirs = self.model.rename(model_dir, &name, model_to, &to_name, how);
                Self::same(ours, theirs);
            }
            Step::Link(dir, name, to, to_name) => {
                let (to, model_to) = self.dir(to);
                if let Some((ino, ix)) = self.child(dir, &name) {
                    let ours = self.fs().link(ino, to, &to_name);
                    let theirs = self.model.link(ix, model_to, &to_name);
                    self.made(ours, theirs);
                }
            }
            Step::Write(dir, name, at, bytes) => {
                if let Some((ino, ix)) = self.file(dir, &name) {
                    assert_eq!(self.fs().write(ino, &bytes, at, true), Ok(bytes.len()));
                    let inode = &mut self.model.inodes[ix];
                    let end = at as usize + bytes.len();
                    if inode.bytes.len() < end {
                        inode.bytes.resize(end, 0);
                    }
                    inode.bytes[at as usize..end].copy_from_slice(&bytes);
                    strip(&mut inode.mode);
                }
            }
            Step::Truncate(dir, name, len) => {
                if let Some((ino, ix)) = self.file(dir, &name) {
                    let set = SetAttr {
                        size: Some(len),
                        kill_suid: true,
                        ..SetAttr::default()
                    };
                    self.setattr(ino, set);
                    self.model.inodes[ix].bytes.resize(len as usize, 0);
                    strip(&mut self.model.inodes[ix].mode);
                }
            }
            Step::Chmod(dir, name, mode) => {
                if let Some((ino, ix)) = self.child(dir, &name) {
                    let set = SetAttr {
                        mode: Some(mode),
                        ..SetAttr::default()
                    };
                    self.setattr(ino, set);
                    self.model.inodes[ix].mode = mode;
                }
            }
            Step::Chown(dir, name, uid, gid) => {
                if let Some((ino, ix)) = self.child(dir, &name) {
                    let set = SetAttr {
                        uid: Some(uid),
                        gid: Some(gid),
                        ..SetAttr::default()
                    };
                    self.setattr(ino, set);
                    let inode = &mut self.model.inodes[ix];
                    inode.owner = (uid, gid);
                    if inode.kind != Kind::Dir {
                        strip(&mut inode.mode);
                    }
                }
            }
            Step::Utimes(dir, name, sec) => {
                if let Some((ino, _)) = self.child(dir, &name) {
                    let time = SetTime::At(Time { sec, nsec: 5 });
                    let set = SetAttr {
                        atime: Some(time),
                        mtime: Some(time),
                        ..SetAttr::default()
                    };
                    self.setattr(ino, set);
                    let attr = self.fs().getattr(ino).unwrap();
                    assert_eq!(attr.mtime, Time { sec, nsec: 5 });
                }
            }
            Step::SetXattr(dir, name) => {
                if let Some((ino, ix)) = self.child(dir, &name) {
                    self.fs()
                        .setxattr(ino, b"user.y", b"value", SetXattr::Set)
                        .unwrap();
                    let xattrs = &mut self.model.inodes[ix].xattrs;
                    xattrs.insert(b"user.y".to_vec(), b"value".to_vec());
                }
            }
            Step::RemoveXattr(dir, name) => {
                if let Some((ino, ix)) = self.child(dir, &name) {
                    let ours = self.fs().removexattr(ino, b"user.x");
                    let theirs = self.model.inodes[ix].xattrs.remove(&b"user.x"[..]);
                    assert_eq!(ours, theirs.map(drop).ok_or(Errno::NODATA));
                }
            }
            Step::Restart => {
                let before = view(self.fs());
                self.overlay = None;
                self.overlay = Some(self.open());
                assert_eq!(view(self.fs()), before, "a restart changed something");
            }
            Step::Thaw => self.thaw(),
        }
    }

    fn file(&self, dir: Pick, name: &[u8]) -> Option<(Ino, usize)> {
        self.child(dir, name)
            .filter(|&(_, ix)| self.model.inodes[ix].kind == Kind::File)
    }
}

fn strip(mode: &mut u16) {
    *mode &= !0o4000;
    if *mode & 0o010 != 0 {
        *mode &= !0o2000;
    }
}

/// The part of a view that a layer keeps: no sockets, and no times of unchanged directories.
fn frozen_view(mut view: View) -> View {
    for seen in view.values_mut() {
        if seen.kind == Kind::Dir {
            seen.mtime = None;
        }
    }
    view
}

proptest! {
    #[test]
    fn layers_merge_as_if_laid_one_on_the_other(trees in prop::collection::vec(tree(), 0..4)) {
        let home = Home::new();
        let layers: Vec<_> = trees.iter().map(|tree| home.layer(tree, &CONTENTS)).collect();
        let overlay = home.open(&layers);
        let model = Model::of_layers(layers.iter().map(|layer| &**layer), &CONTENTS);
        prop_assert_eq!(view(&overlay), model.view());
        prop_assert!(home.frozen(&overlay).entries.is_empty());
    }

    #[test]
    fn behaves_like_the_model(
        trees in prop::collection::vec(tree(), 0..3),
        steps in prop::collection::vec(step(), 0..40),
    ) {
        let home = Home::new();
        let layers: Vec<_> = trees.iter().map(|tree| home.layer(tree, &CONTENTS)).collect();
        let model = Model::of_layers(layers.iter().map(|layer| &**layer), &CONTENTS);
        let mut pair = Pair {
            overlay: None,
            home: &home,
            layers,
            model,
            thaws: 0,
        };
        pair.overlay = Some(pair.open());
        for step in steps {
            pair.take(step);
            let ours = timeless(view(pair.fs()));
            prop_assert_eq!(ours, timeless(pair.model.view()));
        }
        let live = view(pair.fs());
        let tree = home.frozen(pair.fs());
        prop_assert_eq!(&home.frozen(pair.fs()), &tree, "freezing is deterministic");
        pair.take(Step::Restart);
        prop_assert_eq!(&home.frozen(pair.fs()), &tree, "and a restart changes nothing");
        pair.take(Step::Thaw);
        let mut layers = pair.layers.clone();
        let written: Vec<_> = live.values().map(|seen| &*seen.bytes).collect();
        layers.push(home.layer(&tree, &written));
        let again = home.dir.path().join("again");
        let composed = home.open_at(&layers, &again, OverlayOptions::default());
        prop_assert_eq!(frozen_view(view(&composed)), frozen_view(live));
    }
}
