#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use super::*;
use crate::commit::input::{Input, InputData, InputKind};
use crate::format::sealed_file::Format;
use crate::gc::mark::ChunkLocator;
use crate::gc::optimize::{OptimizeOptions, OptimizeReport};
use crate::id::ChunkKind;
use crate::pack::PackNumber;
use crate::working_set::set::{PageUse, Pushed, WorkingSet};
use crate::{CommitRequest, ErrorClass, ImageRole, PageSize, ParentChoice, Silent, Store};

const PAGE: usize = 4096;
/// Three leaves.
const PAGES: u64 = 1100;
/// Of all zeros.
const ZERO: u64 = 13;

struct Fixture {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        Self { _dir: dir, store }
    }

    fn commit(&self, tag: &str, parent: ParentChoice, image: &[u8]) -> SnapshotId {
        let memory = Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(image.to_vec().into()),
            kind: InputKind::Full,
        };
        let request = CommitRequest {
            tag: tag.to_owned(),
            parent,
            inputs: vec![memory],
            ..CommitRequest::default()
        };
        self.store.commit(&request, &Silent).unwrap().id
    }

    fn base(&self) -> SnapshotId {
        self.commit("base", ParentChoice::Nothing, &image())
    }

    fn keep(&self, id: SnapshotId, set: &WorkingSet) -> PathBuf {
        self.store.keep_working_set(id, "memory", set).unwrap();
        self.store.path().join(format!("working-sets/{id}.memory"))
    }

    fn optimize(&self, most_bytes: Option<u64>) -> OptimizeReport {
        let options = OptimizeOptions {
            most_bytes,
            ..OptimizeOptions::default()
        };
        let store = Store::open(self.store.path()).unwrap();
        store.optimize(options, &Silent).unwrap()
    }

    /// The pages of an image in the order in which packs have them, with where they are.
    fn laid(&self, id: SnapshotId) -> Vec<(Location, u64)> {
        let store = Store::open(self.store.path()).unwrap();
        let manifest = store.manifest(id).unwrap();
        let tree = manifest.image("memory").unwrap().tree();
        let places = ChunkLocator::few(&store.chunks).unwrap();
        let mut laid = Vec::new();
        for page in 0..tree.shape().pages() {
            if let Some(child) = tree.page(&store.chunks, page).unwrap() {
                let id = ChunkId::from_hash(ChunkKind::Page, child.hash);
                let place = places.find(id, None).unwrap().place.location();
                assert_eq!(child.hint, Some(place), "the hint of {page} is stale");
                laid.push((place, page));
            }
        }
        laid.sort_unstable_by_key(|(at, _)| (at.pack, at.entry));
        laid
    }

    fn assert_whole(&self) {
        let report = self.store.verify(true, &Silent).unwrap();
        assert_eq!(report.findings, []);
    }
}

fn noise(seed: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    // Half of it: a commit's copy is larger than the one that is kept.
    page.iter_mut().for_each(|byte| *byte &= 0x0f);
    page
}

fn image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..PAGES).flat_map(noise).collect();
    let zero = usize::try_from(ZERO).unwrap() * PAGE;
    image[zero..zero + PAGE].fill(0);
    image
}

fn set(pages: &[u64]) -> WorkingSet {
    let pages = pages.iter().map(|page| PageUse {
        number: u32::try_from(*page).unwrap(),
        touched: 1,
        known: 1,
    });
    WorkingSet {
        recordings: 1,
        recorded: UNIX_EPOCH,
        last: Pushed::default(),
        pages: pages.collect(),
    }
}

/// `first`, and then the others, both in their order.
fn order(first: &[u64]) -> Vec<u64> {
    let others = (0..PAGES).filter(|page| *page != ZERO && !first.contains(page));
    sorted(first).into_iter().chain(others).collect()
}

fn sorted(pages: &[u64]) -> Vec<u64> {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted
}

fn pages(laid: &[(Location, u64)]) -> Vec<u64> {
    laid.iter().map(|(_, page)| *page).collect()
}

/// Pages of all leaves, none next to the one before it.
fn scattered(count: u64) -> Vec<u64> {
    let pages = (0..PAGES).map(|at| at * 701 % PAGES);
    let pages = pages.filter(|page| *page != ZERO);
    pages.take(usize::try_from(count).unwrap()).collect()
}

#[test]
fn a_set_is_laid_together_before_the_rest_of_its_image() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let touched = scattered(400);
    // What a file may say besides: pages that are zero, beyond the image, or there twice.
    let mut said = touched.clone();
    // Beyond it there are numbers that a tree of this height has other pages for.
    let other = (0..PAGES).find(|page| !touched.contains(page)).unwrap();
    let beyond = [PAGES, 512 * 512 + other, u64::from(u32::MAX)];
    said.splice(5..5, [&[ZERO, touched[1]][..], &beyond].concat());
    fixture.keep(base, &set(&said));
    assert_eq!(fixture.optimize(None).stopped_by, None);
    let laid = fixture.laid(base);
    assert_eq!(pages(&laid), order(&touched));
    let first = laid[0].0;
    for ((at, _), entry) in laid[..touched.len()].iter().zip(first.entry.0..) {
        assert_eq!((at.pack, at.entry.0), (first.pack, entry));
    }
    fixture.assert_whole();
    // It is done once: a set that is recorded later moves nothing.
    fixture.keep(base, &set(&[1099, 1, 5]));
    assert_eq!(fixture.optimize(None).written_bytes, 0);
    assert_eq!(fixture.laid(base), laid);
}

#[test]
fn a_set_that_cannot_be_used_leaves_the_order_of_the_image() {
    let spoil = |fixture: &Fixture, base, how: &str| {
        let mut bad = set(&scattered(100));
        if how == "not trusted" {
            bad.last = Pushed {
                pushed: 100,
                left_out: 100,
                left_out_touched: 0,
                outside: 0,
            };
        }
        let path = fixture.keep(base, &bad);
        let mut bytes = fs::read(&path).unwrap();
        match how {
            "damaged" => *bytes.last_mut().unwrap() ^= 1,
            "newer" => {
                let newer = Format {
                    magic: bytes[..8].try_into().unwrap(),
                    version: 99,
                };
                bytes = newer.encode(&path, b"of which nothing is known");
            }
            "cut" => bytes.truncate(20),
            "missing" => return fs::remove_file(&path).unwrap(),
            _ => return,
        }
        fs::write(&path, bytes).unwrap();
        let read = fixture.store.working_set(base, "memory");
        let is_newer = read.is_err_and(|error| error.class() == ErrorClass::Newer);
        assert_eq!(is_newer, how == "newer");
    };
    for how in ["damaged", "newer", "cut", "missing", "not trusted"] {
        let fixture = Fixture::new();
        let base = fixture.base();
        spoil(&fixture, base, how);
        assert_eq!(fixture.optimize(None).stopped_by, None, "{how}");
        assert_eq!(pages(&fixture.laid(base)), order(&[]), "{how}");
        fixture.assert_whole();
    }
}

/// It is met in its set and in its leaf.
#[test]
fn a_damaged_page_of_a_set_is_told_once() {
    let fixture = Fixture::new();
    let base = fixture.base();
    fixture.keep(base, &set(&[7, 8, 9]));
    let (at, _) = fixture.laid(base)[8];
    let store = Store::open(fixture.store.path()).unwrap();
    let pack = store.chunks.packs().get(at.pack).unwrap().unwrap();
    let offset = pack.slot(at.entry).unwrap().unwrap().entry.offset;
    let path = fixture.store.layout.pack(at.pack);
    let mut bytes = fs::read(&path).unwrap();
    bytes[offset as usize + 100] ^= 1;
    fs::write(&path, bytes).unwrap();
    let report = fixture.optimize(None);
    assert_eq!(report.not_copied.len(), 1, "{:?}", report.not_copied);
    assert_eq!(fixture.laid(base).len(), order(&[]).len());
}

#[test]
fn the_newest_takes_what_its_set_needs_and_others_what_is_left() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let mut changed = image();
    changed[100 * PAGE..101 * PAGE].copy_from_slice(&noise(PAGES + 1));
    let parent = ParentChoice::Named("base".to_owned());
    let next = fixture.commit("next", parent, &changed);
    fixture.keep(next, &set(&[1000, 100, 7]));
    fixture.keep(base, &set(&[7, 900, 100]));
    assert_eq!(fixture.optimize(None).stopped_by, None);
    assert_eq!(pages(&fixture.laid(next)), order(&[1000, 100, 7]));
    // Of the older one's set only its own page is left; it comes after all of the newer one.
    let laid = pages(&fixture.laid(base));
    assert_eq!(laid[..2], [7, 1000]);
    assert_eq!(laid.last(), Some(&100));
    fixture.assert_whole();
}

#[test]
fn one_that_was_stopped_in_a_set_goes_on_with_the_rest_of_it() {
    let touched = scattered(700);
    let stopped = |fixture: &Fixture| {
        let base = fixture.base();
        fixture.keep(base, &set(&touched));
        // After a batch.
        assert!(fixture.optimize(Some(1)).stopped_by.is_some());
        let some = fixture.laid_in_first_new(base);
        assert_eq!(some, sorted(&touched)[..some.len()]);
        assert!((1..touched.len()).contains(&some.len()), "{}", some.len());
        assert_eq!(fixture.optimize(None).stopped_by, None);
        fixture.assert_whole();
        (some.len(), fixture.laid(base))
    };
    let fixture = Fixture::new();
    let (written, laid) = stopped(&fixture);
    assert_eq!(pages(&laid), order(&touched));
    let packs: Vec<PackNumber> = laid.iter().map(|(at, _)| at.pack).collect();
    let after = packs.iter().filter(|pack| **pack != packs[0]).count();
    assert_eq!(after, laid.len() - written);
    // Whoever does the same again gets the same.
    assert_eq!(stopped(&Fixture::new()), (written, laid));
}

impl Fixture {
    /// What a run that was stopped has written, in order. Everything else is where the
    /// commit wrote it, in a pack with a smaller number.
    fn laid_in_first_new(&self, id: SnapshotId) -> Vec<u64> {
        let store = Store::open(self.store.path()).unwrap();
        let manifest = store.manifest(id).unwrap();
        let tree = manifest.image("memory").unwrap().tree();
        let places = ChunkLocator::few(&store.chunks).unwrap();
        let mut laid = Vec::new();
        for page in (0..PAGES).filter(|page| *page != ZERO) {
            let child = tree.page(&store.chunks, page).unwrap().unwrap();
            let id = ChunkId::from_hash(ChunkKind::Page, child.hash);
            let at = places.find(id, None).unwrap().place.location();
            laid.push((at.pack, at.entry, page));
        }
        let first = laid.iter().map(|(pack, ..)| *pack).min().unwrap();
        laid.retain(|(pack, ..)| *pack != first);
        laid.sort_unstable();
        laid.into_iter().map(|(.., page)| page).collect()
    }
}
