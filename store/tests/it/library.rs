//! The store as a library: readers of a caller's own, snapshots that stay whole while
//! they are read, handles, tokens and pools.

use std::fs;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rayon::ThreadPoolBuilder;
use snapstore_store::{
    Cancel, Error, ErrorClass, GcOptions, Progress, ReadAt, RepairOptions, VerifyReport,
};

use super::*;

const PAGE: usize = KIB_4 as usize;

/// Bytes with one run of data, and a place where reading fails.
#[derive(Debug)]
struct Sparse {
    bytes: Vec<u8>,
    data: Range<u64>,
    fails_at: Option<u64>,
}

impl ReadAt for Sparse {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let range = offset_bytes..offset_bytes + out.len() as u64;
        if self.fails_at.is_some_and(|at| range.contains(&at)) {
            return Err(io::Error::other("it was taken away"));
        }
        let start = usize::try_from(offset_bytes).unwrap();
        out.copy_from_slice(&self.bytes[start..start + out.len()]);
        Ok(())
    }

    fn next_data(&self, from_bytes: u64) -> io::Result<Option<Range<u64>>> {
        let start = self.data.start.max(from_bytes);
        Ok((start < self.data.end).then_some(start..self.data.end))
    }
}

fn sparse(seed: u64, fails_at: Option<u64>) -> Sparse {
    let mut bytes = vec![0; 700 * PAGE];
    let data = 3 * PAGE..601 * PAGE;
    bytes[data.clone()].copy_from_slice(&noise(seed, data.len()));
    Sparse {
        bytes,
        data: data.start as u64..data.end as u64,
        fails_at,
    }
}

fn reader(input: impl ReadAt + 'static, kind: InputKind) -> Input {
    memory(InputData::Reader(Arc::new(input)), kind)
}

#[test]
fn what_a_caller_reads_is_committed_with_its_holes() {
    for page_size in [PageSize::KIB_4, PageSize::KIB_16] {
        let fixture = Fixture::new(page_size);
        let wanted = sparse(1, None);
        let bytes = wanted.bytes.clone();
        let input = reader(wanted, InputKind::Full);
        let base = fixture
            .commit("base", ParentChoice::Nothing, input)
            .unwrap();
        assert!(fixture.memory(&base.manifest) == bytes);
        // As a diff its holes are the parent's bytes, also within a page.
        let mut diff = sparse(2, None);
        diff.data = 4096 * 5 + 512..4096 * 9;
        let mut expected = bytes;
        expected[4096 * 5 + 512..4096 * 9].copy_from_slice(&diff.bytes[4096 * 5 + 512..4096 * 9]);
        let input = reader(diff, InputKind::Diff);
        let parent = ParentChoice::Named("base".to_owned());
        let next = fixture.commit("next", parent, input).unwrap();
        assert!(fixture.memory(&next.manifest) == expected);
    }
}

#[test]
fn a_reader_that_fails_leaves_the_store_as_it_was() {
    let fixture = Fixture::new(PageSize::KIB_4);
    for fails_at in [3 * KIB_4, 300 * KIB_4 + 17, 600 * KIB_4] {
        let before = fixture.content();
        let input = reader(sparse(1, Some(fails_at)), InputKind::Full);
        let error = fixture
            .commit("base", ParentChoice::Nothing, input)
            .unwrap_err();
        assert!(matches!(error, Error::InputLost { .. }), "{error}");
        assert!(error.to_string().contains("it was taken away"), "{error}");
        assert_eq!(fixture.content(), before);
    }
}

#[test]
fn a_snapshot_is_copied_to_another_store() {
    let from = Fixture::new(PageSize::KIB_4);
    let to = Fixture::new(PageSize::KIB_16);
    let input = reader(sparse(1, None), InputKind::Full);
    let base = from.commit("base", ParentChoice::Nothing, input).unwrap();
    let image = from
        .store
        .snapshot("base")
        .unwrap()
        .image("memory")
        .unwrap();
    let input = reader(image, InputKind::Full);
    let copy = to.commit("copy", ParentChoice::Nothing, input).unwrap();
    assert!(to.memory(&copy.manifest) == from.memory(&base.manifest));
}

/// As long as the snapshot, a clone or a reader of an image lives.
#[test]
fn a_snapshot_stays_whole_while_anything_reads_it() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let input = reader(sparse(1, None), InputKind::Full);
    let base = fixture
        .commit("base", ParentChoice::Nothing, input)
        .unwrap();
    let expected = fixture.memory(&base.manifest);
    let snapshot = fixture.store.snapshot("base").unwrap();
    assert_eq!(snapshot.id(), base.id);
    assert!(snapshot.not_pinned().is_none());
    let clone = snapshot.clone();
    drop(snapshot);
    let (_, image) = clone.images().next().unwrap();
    drop(clone);
    remove(&fixture.store, "base");
    let other = fixture.other();
    collect(&other);
    let mut bytes = vec![0; expected.len()];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected);
    drop(image);
    collect_all(&other);
}

#[test]
fn handles_are_one_store_with_patience_of_their_own() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let lock = File::open(fixture.store.path().join("locks/publish")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let hasty = fixture.store.clone().with_lock_timeout(Duration::ZERO);
    let input = reader(sparse(1, None), InputKind::Full);
    let request = request("base", ParentChoice::Nothing, vec![input]);
    let error = hasty.commit(&request, &Silent).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Busy, "{error}");
    drop(lock);
    hasty.commit(&request, &Silent).unwrap();
    assert!(fixture.store.tag("base").unwrap().is_some());
}

/// Cancels when so much has been done.
struct CancelAfter(Cancel, AtomicUsize);

impl Progress for CancelAfter {
    fn begin(&self, _what: &str, _total: u64) {}

    fn advance(&self, _done: u64) {
        if self.1.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.cancel();
        }
    }
}

#[test]
fn what_is_cancelled_leaves_no_trace() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let input = reader(sparse(1, None), InputKind::Full);
    fixture
        .commit("base", ParentChoice::Nothing, input)
        .unwrap();
    let before = fixture.content();
    let cancel = Cancel::default();
    let stoppable = fixture.store.clone().with_cancel(cancel.clone());
    let input = reader(sparse(2, None), InputKind::Full);
    let request = request("next", ParentChoice::Automatic, vec![input]);
    let progress = CancelAfter(cancel, AtomicUsize::new(1));
    let error = stoppable.commit(&request, &progress).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert_eq!(fixture.content(), before);
    // It stays cancelled, and other handles never were.
    let error = stoppable.verify(true, &Silent).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Cancelled, "{error}");
    fixture.store.gc(GcOptions::default(), &Silent).unwrap();
    fixture.store.commit(&request, &Silent).unwrap();
}

#[test]
fn work_is_shared_in_the_pool_of_the_caller() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    #[derive(Debug)]
    struct Watched(Sparse);
    impl ReadAt for Watched {
        fn size_bytes(&self) -> u64 {
            self.0.size_bytes()
        }
        fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            assert!(name.starts_with("mine-"), "read by {name}");
            SEEN.fetch_add(1, Ordering::Relaxed);
            self.0.read_exact_at(out, offset_bytes)
        }
    }
    let fixture = Fixture::new(PageSize::KIB_4);
    let pool = ThreadPoolBuilder::new()
        .num_threads(2)
        .thread_name(|number| format!("mine-{number}"))
        .build()
        .unwrap();
    let store = fixture.store.clone().with_pool(Arc::new(pool));
    let input = reader(Watched(sparse(1, None)), InputKind::Full);
    let request = request("base", ParentChoice::Nothing, vec![input]);
    store.commit(&request, &Silent).unwrap();
    assert!(SEEN.load(Ordering::Relaxed) > 0);
    let report: VerifyReport = store.verify(true, &Silent).unwrap();
    assert_eq!(report.findings, []);
}

/// Cancels when this many units of work are done.
struct CancelAt(Cancel, u64);

impl Progress for CancelAt {
    fn begin(&self, _what: &str, _total: u64) {}
    fn advance(&self, done: u64) {
        if done >= self.1 {
            self.0.cancel();
        }
    }
}

#[test]
fn a_repair_that_is_cancelled_leaves_what_was_there() {
    let fixture = Fixture::new(PageSize::KIB_4);
    for seed in 0..3 {
        let data = InputData::Bytes(noise(seed, 8 * 4096).into());
        let input = memory(data, InputKind::Full);
        let tag = format!("tag{seed}");
        fixture.commit(&tag, ParentChoice::Nothing, input).unwrap();
    }
    let path = fixture.store.path();
    // Six units of work: each pack is looked at twice.
    for done in 1..6 {
        let cancel = Cancel::default();
        let options = RepairOptions {
            cancel: cancel.clone(),
            ..RepairOptions::default()
        };
        let before = fixture.content();
        let repaired = Store::repair_with(path, &options, &CancelAt(cancel, done));
        assert!(matches!(repaired, Err(Error::Cancelled)), "{repaired:?}");
        assert_eq!(fixture.content(), before);
        assert!(!path.join("index.new").exists());
        let report = fixture.other().verify(true, &Silent).unwrap();
        assert_eq!(report.findings, []);
    }
    Store::repair(path, &Silent).unwrap();
}

#[test]
fn a_snapshot_that_was_just_committed_is_found_without_the_sorted_index() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let data = InputData::Bytes(noise(1, 4096).into());
    let input = memory(data, InputKind::Full);
    fixture.commit("a", ParentChoice::Nothing, input).unwrap();
    let index = fixture.store.path().join("index");
    fs::rename(index.join("CURRENT"), index.join("away")).unwrap();
    let store = fixture.other();
    let manifest = store.manifest(store.resolve("a").unwrap()).unwrap();
    let image = manifest.image("memory").unwrap();
    let read = store.read_file_image(image, 1 << 20).unwrap();
    assert_eq!(read, noise(1, 4096));
}

#[test]
fn a_snapshot_that_has_moved_since_the_newest_entries_were_read_is_found() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let commit = |number: u64| {
        let data = InputData::Bytes(noise(number, 4096).into());
        let input = memory(data, InputKind::Full);
        let tag = format!("t{number}");
        fixture.commit(&tag, ParentChoice::Nothing, input).unwrap();
        fixture.store.resolve(&tag).unwrap()
    };
    let ids: Vec<_> = (0..60).map(commit).collect();
    let reader = fixture.other();
    reader.manifest(ids[0]).unwrap();
    let options = GcOptions::default();
    fixture.other().gc(options, &Silent).unwrap();
    let packs = fs::read_dir(fixture.store.path().join("packs")).unwrap();
    assert!(packs.count() < 10, "they are merged");
    for (number, id) in (0..).zip(ids) {
        let manifest = reader.manifest(id).unwrap();
        assert_eq!(manifest.images.len(), 1);
        let image = manifest.image("memory").unwrap();
        let read = reader.read_file_image(image, 1 << 20).unwrap();
        assert_eq!(read, noise(number, 4096));
    }
}
