//! Reading many pages at once gives what reading each alone gives.

use std::path::PathBuf;

use snapstore_store::{Error, ImageReader};

use super::*;

const PAGE: usize = KIB_4 as usize;
const PAGES: usize = 700;

/// Pages that are stored raw, compressed, and not at all, in turns that fit no group of any size.
fn mixed() -> Vec<u8> {
    let mut bytes = Vec::new();
    for page in 0..PAGES {
        bytes.extend(match page % 7 {
            0 | 3 => vec![0; PAGE],
            1 | 4 => (page as u32).to_le_bytes().repeat(PAGE / 4),
            _ => noise(page as u64, PAGE),
        });
    }
    bytes
}

/// The same after a small change of every fifth page, a large one of every eleventh.
fn changed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for page in (0..PAGES).step_by(5) {
        bytes[page * PAGE + 100] ^= 1;
    }
    for page in (0..PAGES).step_by(11) {
        let other = noise(1000 + page as u64, PAGE / 2);
        bytes[page * PAGE..][..PAGE / 2].copy_from_slice(&other);
    }
    bytes
}

fn commit(fixture: &Fixture, tag: &str, parent: ParentChoice, bytes: &[u8]) {
    let data = InputData::Bytes(bytes.to_vec().into());
    fixture
        .commit(tag, parent, memory(data, InputKind::Full))
        .unwrap();
}

/// Commits both, and returns their bytes.
fn base_and_next(fixture: &Fixture) -> (Vec<u8>, Vec<u8>) {
    let base = mixed();
    let next = changed(&base);
    commit(fixture, "base", ParentChoice::Nothing, &base);
    let parent = ParentChoice::Named("base".to_owned());
    commit(fixture, "next", parent, &next);
    (base, next)
}

fn image(store: &Store, tag: &str) -> ImageReader {
    store.snapshot(tag).unwrap().image("memory").unwrap()
}

/// All that can be read at once, by position and by number, is what is there.
fn check(image: &ImageReader, bytes: &[u8]) {
    for (start, len) in [
        (0, bytes.len()),
        (PAGE, 17 * PAGE),
        (PAGE / 2, 33 * PAGE),
        (5, 100),
    ] {
        let mut out = vec![0xa5; len];
        let end = (start + len).min(bytes.len());
        assert_eq!(image.read_at(&mut out, start as u64).unwrap(), end - start);
        assert_eq!(out[..end - start], bytes[start..end], "{len} from {start}");
    }
    let numbers: Vec<u64> = (0..PAGES as u64)
        .map(|at| at * 301 % PAGES as u64)
        .collect();
    for some in numbers.chunks(23) {
        let mut out = vec![0xa5; some.len() * PAGE];
        image.read_pages(some, &mut out).unwrap();
        for (page, out) in some.iter().zip(out.chunks(PAGE)) {
            assert_eq!(out, &bytes[*page as usize * PAGE..][..PAGE], "page {page}");
        }
    }
    let mut out = vec![0xa5; 2 * PAGE];
    image.read_pages(&[PAGES as u64, 1], &mut out).unwrap();
    assert_eq!(out[..PAGE], [0; PAGE], "beyond the end");
    assert_eq!(out[PAGE..], bytes[PAGE..2 * PAGE]);
}

#[test]
fn many_pages_are_read_as_each_alone() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let (base, next) = base_and_next(&fixture);
    check(&image(&fixture.other(), "base"), &base);
    check(&image(&fixture.other(), "next"), &next);
}

/// Places that hints lead to are gone after a collection: for who reads, and for who has
/// opened the store before.
#[test]
fn many_pages_are_found_where_a_collection_has_moved_them() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let other = noise(7, 3000 * PAGE);
    commit(&fixture, "other", ParentChoice::Nothing, &other);
    let (_, next) = base_and_next(&fixture);
    let before = fixture.other();
    let opened = image(&before, "next");
    check(&opened, &next);
    remove(&fixture.store, "base");
    remove(&fixture.store, "other");
    fixture
        .store
        .optimize(snapstore_store::OptimizeOptions::default(), &Silent)
        .unwrap();
    collect(&fixture.store);
    check(&opened, &next);
    check(&image(&fixture.other(), "next"), &next);
}

fn pack_of_noise(fixture: &Fixture, page: &[u8]) -> (PathBuf, usize) {
    for pack in std::fs::read_dir(fixture.store.path().join("packs")).unwrap() {
        let path = pack.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        // What does not compress is stored as it is.
        if let Some(at) = bytes.windows(64).position(|found| *found == page[..64]) {
            return (path, at);
        }
    }
    panic!("no pack has the page");
}

/// One flipped bit costs one page, whatever is read with it, and is never served.
#[test]
fn a_damaged_page_among_many_is_told_and_costs_no_other() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let bytes = mixed();
    commit(&fixture, "base", ParentChoice::Nothing, &bytes);
    let damaged = 9;
    assert_eq!(damaged % 7, 2, "it is stored as it is");
    let (path, at) = pack_of_noise(&fixture, &bytes[damaged * PAGE..][..PAGE]);
    let mut pack = std::fs::read(&path).unwrap();
    pack[at + 1000] ^= 4;
    std::fs::write(&path, &pack).unwrap();

    let store = fixture.other();
    let image = image(&store, "base");
    let mut out = vec![0; 16 * PAGE];
    let error = image.read_at(&mut out, 0).unwrap_err();
    assert!(matches!(error, Error::Damaged(_)), "{error}");
    let told = format!("{error}");
    assert!(told.contains("do not match its id"), "{told}");
    let error = image.read_pages(&[3, damaged as u64, 5], &mut out[..3 * PAGE]);
    assert_eq!(error.unwrap_err().to_string(), told);
    for page in (0..PAGES).filter(|page| *page != damaged) {
        let out = &mut out[..PAGE];
        image.read_pages(&[page as u64], out).unwrap();
        assert_eq!(out, &bytes[page * PAGE..][..PAGE], "page {page}");
    }
    let after = (damaged + 1) * PAGE;
    let mut rest = vec![0; bytes.len() - after];
    image.read_at(&mut rest, after as u64).unwrap();
    assert_eq!(rest, bytes[after..]);
}
