//! Hashing the objects of packs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::prelude::*;

use super::{Finding, Item, Pass};
use crate::blob::read_exact;
use crate::id::ObjectId;
use crate::objects::{LOOSE_MIN, Pack};
use crate::pack::{self, Place};

/// Most damaged objects of one pack in a report.
const MAX_PER_PACK: usize = 100;
/// Bytes of a pack that are read at once.
const RUN: u64 = 4 << 20;

/// A pack whose objects are hashed in the order of their places in it.
struct PackData<'a> {
    pass: &'a Pass<'a>,
    item: &'a Item,
    pack: &'a Pack,
    file: &'a File,
    /// By ascending offset.
    places: Vec<(ObjectId, Place)>,
    damaged: AtomicUsize,
    /// Whether an object of the pack could not be read.
    unread: AtomicBool,
}

fn end(place: &Place) -> u64 {
    place.offset + place.len
}

impl Pass<'_> {
    /// Hashes every object of a pack, and checks the zeroes between them.
    pub(super) fn check_pack_data(&self, item: &Item, pack: &Pack, file: &File) {
        let mut data = PackData {
            pass: self,
            item,
            pack,
            file,
            places: pack.index.objects().collect(),
            damaged: AtomicUsize::new(0),
            unread: AtomicBool::new(false),
        };
        let runs = data.runs();
        runs.into_par_iter()
            .for_each_init(Vec::new, |buf, run| data.check_run(buf, run));
        let damaged = data.damaged.into_inner().saturating_sub(MAX_PER_PACK);
        self.omitted.fetch_add(damaged as u64, Ordering::Relaxed);
    }
}

impl PackData<'_> {
    fn odd(&self, what: impl Into<String>) {
        let finding = Finding::Pack { pack: self.pack.id };
        self.pass.report(self.item, finding, &self.pack.path, what);
    }

    fn lost(&self, object: ObjectId, what: String) {
        self.pass.lose(object);
        if self.damaged.fetch_add(1, Ordering::Relaxed) < MAX_PER_PACK {
            let pack = Some(self.pack.id);
            let finding = Finding::Object { object, pack };
            self.pass.report(self.item, finding, &self.pack.path, what);
        }
    }

    /// Reports a failure to read, at most one for the whole pack.
    fn unread(&self, err: &io::Error) {
        if !self.unread.swap(true, Ordering::Relaxed) {
            self.pass.unchecked(self.item, &self.pack.path, err);
        }
    }

    /// Sorts the objects, checks that their places are consistent, and returns the ranges of
    /// objects that are read at once.
    fn runs(&mut self) -> Vec<Range<usize>> {
        let count = self.places.len();
        self.places.retain(|(_, place)| place.len < LOOSE_MIN);
        if self.places.len() < count {
            self.odd("its index names an object that is too large for a pack");
        }
        self.places
            .sort_unstable_by_key(|(_, place)| (place.offset, place.len));
        let (mut runs, mut from, mut last) = (Vec::new(), 0, pack::HEADER as u64);
        let mut start = last;
        for (at, (_, place)) in self.places.iter().enumerate() {
            if place.offset < last {
                self.odd("objects in it overlap");
            }
            if at > from && end(place).saturating_sub(start) > RUN {
                runs.push(from..at);
                (from, start) = (at, last);
            }
            last = last.max(end(place));
        }
        runs.push(from..self.places.len());
        if last != self.pack.index.pack_len() {
            self.odd("it ends in bytes that belong to nothing");
        }
        runs
    }

    fn check_run(&self, buf: &mut Vec<u8>, run: Range<usize>) {
        let before = run.start.checked_sub(1).and_then(|at| self.places.get(at));
        let before = before.map_or(pack::HEADER as u64, |(_, place)| end(place));
        let places = self.places.get(run).unwrap_or_default();
        let Some((_, first)) = places.first() else {
            return;
        };
        let until = places.iter().map(|(_, place)| end(place)).max();
        // The zeroes before the first object belong to the run.
        let start = before.min(first.offset);
        let len = until.unwrap_or(start) - start;
        if len > 2 * RUN {
            self.odd("objects in it lie too far apart");
        }
        buf.resize(len.min(2 * RUN) as usize, 0);
        if len <= 2 * RUN && read_exact(self.pass.disk, self.file, buf, start).is_ok() {
            self.check_read(buf, start, places);
        } else {
            // Reads them one by one, to find those that can be read.
            for (object, place) in places {
                let bytes = &mut buf[..place.len as usize];
                match read_exact(self.pass.disk, self.file, bytes, place.offset) {
                    Ok(()) => self.check_object(*object, bytes),
                    Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                        self.lost(*object, format!("object {object} is cut short"));
                    }
                    Err(err) => self.unread(&err),
                }
            }
        }
        self.pass
            .progress(places.iter().map(|(_, place)| place.len).sum());
    }

    /// Checks `bytes`, which were read from `start` on.
    fn check_read(&self, buf: &[u8], start: u64, places: &[(ObjectId, Place)]) {
        let mut last = start;
        for (object, place) in places {
            let at = (place.offset - start) as usize;
            let gap = (last.min(place.offset) - start) as usize;
            if buf[gap..at].iter().any(|&byte| byte != 0) {
                self.odd(format!(
                    "the zeroes before byte {} are damaged",
                    place.offset
                ));
            }
            self.check_object(*object, &buf[at..at + place.len as usize]);
            last = last.max(end(place));
        }
    }

    fn check_object(&self, object: ObjectId, bytes: &[u8]) {
        if ObjectId::of(bytes) != object {
            self.lost(object, format!("object {object} is damaged"));
        }
    }
}
