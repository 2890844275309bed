//! Pins: parents without a tag, pins taken by a commit, pins that travel.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};

use snapstore_store::{Error, SnapshotId};

use super::*;

const SIZE: u64 = 1024 * KIB_4;

fn whole(seed: u64) -> Input {
    memory(
        InputData::Bytes(noise(seed, SIZE as usize).into()),
        InputKind::Full,
    )
}

/// One page of the image is changed.
fn step(page: u64) -> Input {
    let list = vec![extent(page * KIB_4, 0, KIB_4)];
    memory(
        extents(&file_of(&noise(page, 4096)), SIZE, list),
        InputKind::Diff,
    )
}

fn expected(seed: u64, pages: &[u64]) -> Vec<u8> {
    let mut bytes = noise(seed, SIZE as usize);
    for page in pages {
        let at = (page * KIB_4) as usize;
        bytes[at..at + 4096].copy_from_slice(&noise(*page, 4096));
    }
    bytes
}

fn fixture() -> (Fixture, SnapshotId) {
    let fixture = Fixture::new(PageSize::KIB_4);
    let base = fixture
        .commit("base", ParentChoice::Nothing, whole(1))
        .unwrap();
    (fixture, base.id)
}

#[test]
fn a_pinned_parent_needs_no_tag() {
    let (fixture, base) = fixture();
    // Pinned by one process, used by another.
    let other = fixture.other();
    let (_, pin) = other.pin("base").unwrap();
    remove(&fixture.store, "base");
    collect(&fixture.store);
    let committed = fixture
        .commit("child", ParentChoice::Pinned(base), step(3))
        .unwrap();
    assert_eq!(committed.manifest.parent, Some(base));
    drop(pin);
    collect(&fixture.store);
    assert!(fixture.memory(&committed.manifest) == expected(1, &[3]));
    assert!(
        fixture
            .store
            .verify(true, &Silent)
            .unwrap()
            .findings
            .is_empty()
    );
}

#[test]
fn a_parent_that_is_neither_pinned_nor_tagged_is_not_found() {
    let (fixture, base) = fixture();
    // A tag is as good as a pin.
    fixture
        .commit("tagged", ParentChoice::Pinned(base), step(3))
        .unwrap();
    let (_, pin) = fixture.store.pin("base").unwrap();
    remove(&fixture.store, "base");
    drop(pin);
    let before = fixture.content();
    for id in [base, SnapshotId::from_hex(&"5".repeat(64)).unwrap()] {
        let error = fixture
            .commit("child", ParentChoice::Pinned(id), step(4))
            .unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }
    assert_eq!(fixture.content(), before);
}

#[test]
fn a_commit_that_keeps_its_snapshot_can_lose_the_tag_at_once() {
    let (fixture, _) = fixture();
    let mut request = request(
        "next",
        ParentChoice::Named("base".to_owned()),
        vec![step(3)],
    );
    request.keep = true;
    let first = fixture.store.commit(&request, &Silent).unwrap();
    for tag in ["base", "next"] {
        remove(&fixture.store, tag);
    }
    collect(&fixture.store);
    assert!(fixture.memory(&first.manifest) == expected(1, &[3]));
    // And so on: each step is made from one that nobody can name any more.
    request.parent = ParentChoice::Pinned(first.id);
    request.inputs = vec![step(4)];
    let second = fixture.store.commit(&request, &Silent).unwrap();
    drop(first);
    remove(&fixture.store, "next");
    collect(&fixture.store);
    assert!(fixture.memory(&second.manifest) == expected(1, &[3, 4]));
    drop(second);
    collect_all(&fixture.store);
    // Without being asked for, nothing is kept.
    let plain = fixture
        .commit("plain", ParentChoice::Nothing, whole(2))
        .unwrap();
    assert!(plain.pin.is_none());
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Committing on pinned parents while another thread removes every tag as soon
/// as it sees it and collects.
#[test]
fn a_chain_of_kept_snapshots_outlives_a_busy_collector() {
    let (fixture, base) = fixture();
    let done = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let store = fixture.other();
            while !done.load(Ordering::Relaxed) {
                for tag in store.tags().unwrap().into_keys() {
                    if tag.starts_with("step") {
                        remove(&store, &tag);
                    }
                }
                store.gc(GcOptions::default(), &Silent).unwrap();
            }
        });
        // Also if an assertion fails here.
        let _done = OnDrop(|| done.store(true, Ordering::Relaxed));
        let store = fixture.other();
        let mut parent = base;
        let mut held = None;
        for number in 0..24_u64 {
            let mut request = request(
                &format!("step{number}"),
                ParentChoice::Pinned(parent),
                vec![step(number)],
            );
            request.keep = true;
            let committed = store.commit(&request, &Silent).unwrap();
            parent = committed.id;
            held = Some(committed);
        }
        assert!(!collector.is_finished());
        held.unwrap()
    });
    let pages: Vec<u64> = (0..24).collect();
    assert!(fixture.memory(&last.manifest) == expected(1, &pages));
}

#[test]
fn a_pin_as_a_descriptor_lives_until_it_is_closed() {
    let (fixture, base) = fixture();
    let (_, pin) = fixture.store.pin("base").unwrap();
    let fd = pin.into_fd();
    remove(&fixture.store, "base");
    collect(&fixture.store);
    let manifest = fixture.store.manifest(base).unwrap();
    assert!(fixture.memory(&manifest) == expected(1, &[]));
    let duplicate = fd.try_clone().unwrap();
    drop(fd);
    collect(&fixture.store);
    assert!(fixture.memory(&manifest) == expected(1, &[]));
    drop(duplicate);
    collect_all(&fixture.store);
    assert!(
        fixture.content().is_empty(),
        "{:?}",
        fixture.content().keys()
    );
}

#[test]
fn a_child_process_inherits_a_pin() {
    let (fixture, base) = fixture();
    let (_, pin) = fixture.store.pin("base").unwrap();
    let child = Killed::start(Stdio::from(pin.into_fd()));
    remove(&fixture.store, "base");
    collect(&fixture.store);
    let next = fixture.commit("next", ParentChoice::Pinned(base), step(5));
    assert!(fixture.memory(&next.unwrap().manifest) == expected(1, &[5]));
    remove(&fixture.store, "next");
    collect(&fixture.store);
    assert!(packs(fixture.store.path()) > 0);
    drop(child);
    collect_all(&fixture.store);
}

/// A snapshot without a tag can be pinned while it is whole, and only then.
#[test]
fn an_untagged_snapshot_is_pinned_if_it_is_whole() {
    let (fixture, base) = fixture();
    let child = fixture
        .commit("child", ParentChoice::Pinned(base), step(3))
        .unwrap();
    remove(&fixture.store, "base");
    remove(&fixture.store, "child");
    let name = child.id.to_string();
    let (id, pin) = fixture.store.pin(&name).unwrap();
    assert_eq!(id, child.id);
    collect(&fixture.store);
    assert!(fixture.memory(&child.manifest) == expected(1, &[3]));
    drop(pin);
    // Half of it: the pack with most of its pages is gone, its manifest is not.
    std::fs::remove_file(fixture.store.path().join("packs/00000001.pack")).unwrap();
    let other = fixture.other();
    let mut pin = other.empty_pin().unwrap();
    let error = pin.add(&other, &name).unwrap_err();
    assert!(matches!(error, Error::Damaged(_)), "{error}");
    // What could not be pinned does not stop a collection.
    collect_all(&other);
}

#[test]
fn what_another_process_has_collected_is_not_whole_though_it_is_open_here() {
    let (fixture, base) = fixture();
    let here = &fixture.store;
    // Its packs are open here now.
    let manifest = here.manifest(base).unwrap();
    assert!(fixture.memory(&manifest) == expected(1, &[]));
    remove(&fixture.other(), "base");
    // As a collection leaves it that was killed before it cleaned up the index.
    for pack in std::fs::read_dir(here.path().join("packs")).unwrap() {
        std::fs::remove_file(pack.unwrap().path()).unwrap();
    }
    let tagged = here.set_tag("again", base, false);
    assert!(matches!(tagged, Err(Error::Damaged(_))), "{tagged:?}");
    let pinned = here.pin(&base.to_string());
    assert!(pinned.is_err(), "a pin of what is gone");
    assert_eq!(here.tag("again").unwrap(), None);
}
