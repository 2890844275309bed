//! Commits of images that are read while they change.

use std::sync::atomic::{AtomicBool, Ordering};

use snapstore_store::{Error, ErrorClass};

use super::*;

const PAGES: u64 = 3000;
const SIZE: u64 = PAGES * KIB_4;

fn write(file: &File, page: u64, seed: u64) {
    let bytes = noise(seed.wrapping_mul(PAGES) + page, 4096);
    file.write_all_at(&bytes, page * KIB_4).unwrap();
}

/// An image whose data are these pages of a file of the same length.
fn pages(file: &Arc<File>, pages: impl IntoIterator<Item = u64>, kind: InputKind) -> Input {
    let list = pages.into_iter().map(|page| page * KIB_4);
    let list = list.map(|at| extent(at, at, KIB_4)).collect();
    memory(extents(file, SIZE, list), kind)
}

fn all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A file whose every third page is zero.
fn file() -> Arc<File> {
    let file = file_of(&[]);
    file.set_len(SIZE).unwrap();
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        write(&file, page, 1);
    }
    file
}

/// Reads all, then some, then commits the rest; each time after some pages have changed.
fn read_and_commit(
    fixture: &Fixture,
    file: &Arc<File>,
    parent: ParentChoice,
    kind: InputKind,
) -> Committed {
    let mut precopy = fixture.store.precopy(&parent, "new").unwrap();
    precopy.read(&pages(file, 0..PAGES, kind), &Silent).unwrap();
    collect(&fixture.other());
    (100..200).for_each(|page| write(file, page, 2));
    precopy.read(&pages(file, 100..200, kind), &Silent).unwrap();
    collect(&fixture.other());
    (150..160).for_each(|page| write(file, page, 3));
    // Away and back: 700 is what it was at first.
    write(file, 701, 1);
    file.write_all_at(&[0; 4096], 2000 * KIB_4).unwrap();
    let last = (150..160).chain([700, 701, 2000]);
    let request = request("new", parent, vec![pages(file, last, kind)]);
    fixture
        .store
        .commit_after(precopy, &request, &Silent)
        .unwrap()
}

#[test]
fn the_snapshot_is_what_was_read_last() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file();
    let done = read_and_commit(&fixture, &file, ParentChoice::Nothing, InputKind::Full);
    assert_eq!(fixture.memory(&done.manifest), all(&file));
    // As if it had been read once.
    let whole = pages(&file, 0..PAGES, InputKind::Full);
    let once = fixture
        .commit("once", ParentChoice::Nothing, whole)
        .unwrap();
    let [image, expected] = [&done, &once].map(|done| &done.manifest.images[0]);
    assert_eq!(image, expected);
    collect(&fixture.store);
    assert_eq!(fixture.memory(&done.manifest), all(&file));
}

#[test]
fn changes_are_counted_from_the_parent() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file();
    let base = pages(&file, 0..PAGES, InputKind::Full);
    fixture.commit("base", ParentChoice::Nothing, base).unwrap();
    let parent = ParentChoice::Named("base".to_owned());
    let done = read_and_commit(&fixture, &file, parent.clone(), InputKind::Diff);
    assert_eq!(fixture.memory(&done.manifest), all(&file));
    let whole = pages(&file, 0..PAGES, InputKind::Diff);
    let once = fixture.commit("once", parent, whole).unwrap();
    let [image, expected] = [&done, &once].map(|done| &done.manifest.images[0]);
    assert_eq!(image, expected);
    assert_eq!(done.manifest.parent, once.manifest.parent);
    assert_eq!(image.changed_pages, 100 + 1);
}

/// A page that changes between its hash and its compression is no error, as it would be
/// of an input that must not change, and no other bytes get its name.
#[test]
fn pages_that_change_meanwhile_are_read_once() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 10.. {
                for page in 0..PAGES {
                    write(&file, page, seed);
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            }
        });
        let mut precopy = fixture
            .store
            .precopy(&ParentChoice::Nothing, "new")
            .unwrap();
        let mut read = || precopy.read(&pages(&file, 0..PAGES, InputKind::Full), &Silent);
        let done = [read(), read(), read()];
        over.store(true, Ordering::Relaxed);
        done.into_iter().for_each(Result::unwrap);
        // Nothing is said to have changed since: what is there is what was read.
        let request = request(
            "new",
            ParentChoice::Nothing,
            vec![pages(&file, [], InputKind::Full)],
        );
        let done = fixture
            .store
            .commit_after(precopy, &request, &Silent)
            .unwrap();
        fixture.memory(&done.manifest);
    });
    let report = fixture.store.verify(true, &Silent).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn what_is_given_up_is_collected() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file();
    let mut precopy = fixture
        .store
        .precopy(&ParentChoice::Nothing, "new")
        .unwrap();
    let input = pages(&file, 0..PAGES, InputKind::Full);
    precopy.read(&input, &Silent).unwrap();
    collect(&fixture.store);
    assert_eq!(packs(fixture.store.path()), 1, "the commit needs it");
    drop(precopy);
    collect_all(&fixture.store);
    assert!(fixture.store.tags().unwrap().is_empty());
}

#[test]
fn another_length_is_refused() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let file = file();
    let mut precopy = fixture
        .store
        .precopy(&ParentChoice::Nothing, "new")
        .unwrap();
    let input = pages(&file, 0..PAGES, InputKind::Full);
    precopy.read(&input, &Silent).unwrap();
    let longer = memory(extents(&file, SIZE + KIB_4, vec![]), InputKind::Full);
    let request = request("new", ParentChoice::Nothing, vec![longer]);
    let error = fixture
        .store
        .commit_after(precopy, &request, &Silent)
        .unwrap_err();
    assert!(matches!(error, Error::DiffSize { .. }), "{error}");
    assert_eq!(error.class(), ErrorClass::Invalid);
}
