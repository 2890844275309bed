//! Bases of deltas stay: beside other commits, collections and what is dead.

use std::sync::atomic::{AtomicBool, Ordering};

use snapstore_store::Progress;

use crate::*;

const PAGE: usize = 4096;

/// A page that is a small delta against `noise(seed, PAGE)`.
fn changed(seed: u64, mark: u8) -> Vec<u8> {
    let mut page = noise(seed, PAGE);
    page[usize::from(mark)..][..10].fill(mark);
    page
}

/// An image of these pages.
fn image(pages: &[Vec<u8>]) -> Input {
    memory(InputData::Bytes(pages.concat().into()), InputKind::Full)
}

fn others(seed: u64, count: u64) -> impl Iterator<Item = Vec<u8>> {
    (0..count).map(move |n| noise(seed * 1000 + n + 1, PAGE))
}

/// Commits another snapshot when the commit that it watches has begun: that one
/// does not see it, and is acknowledged after it.
struct Meanwhile<'a>(&'a (dyn Fn() + Sync));

impl Progress for Meanwhile<'_> {
    fn begin(&self, _: &str, _: u64) {
        (self.0)();
    }

    fn advance(&self, _: u64) {}
}

fn assert_whole(fixture: &Fixture, tag: &str, pages: &[Vec<u8>]) {
    let store = fixture.other();
    let id = store.tag(tag).unwrap().unwrap();
    let manifest = store.manifest(id).unwrap();
    let found = store.read_file_image(manifest.image("memory").unwrap(), 1 << 30);
    assert!(found.unwrap() == pages.concat(), "{tag} has other bytes");
    let report = store.verify(true, &Silent).unwrap();
    assert_eq!(report.findings, [], "verify agrees with the reader");
}

#[test]
fn a_base_that_another_commit_has_stored_as_a_delta_stays() {
    let fixture = Fixture::new(PageSize::default());
    let old = noise(7, PAGE);
    let base = changed(7, 50);
    let delta = {
        let mut page = base.clone();
        page[2000..2010].fill(9);
        page
    };
    let parent: Vec<_> = std::iter::once(old).chain(others(1, 600)).collect();
    fixture
        .commit("parent", ParentChoice::Nothing, image(&parent))
        .unwrap();
    // One commit stores the page as a delta and is acknowledged first; the other
    // one, which began before, stores it standalone.
    let first = vec![base.clone()];
    let second: Vec<_> = std::iter::once(base).chain(others(2, 600)).collect();
    let began = AtomicBool::new(false);
    let meanwhile = || {
        if !began.swap(true, Ordering::SeqCst) {
            let parent = ParentChoice::Named("parent".to_owned());
            fixture
                .other()
                .commit(&request("first", parent, vec![image(&first)]), &Silent)
                .unwrap();
        }
    };
    let second_request = request("second", ParentChoice::Nothing, vec![image(&second)]);
    fixture
        .store
        .commit(&second_request, &Meanwhile(&meanwhile))
        .unwrap();
    let third: Vec<_> = std::iter::once(delta).chain(others(2, 600)).collect();
    let on_second = ParentChoice::Named("second".to_owned());
    fixture.commit("third", on_second, image(&third)).unwrap();
    remove(&fixture.store, "first");
    remove(&fixture.store, "parent");
    collect(&fixture.other());
    assert_whole(&fixture, "second", &second);
    assert_whole(&fixture, "third", &third);
    remove(&fixture.store, "second");
    collect(&fixture.other());
    assert_whole(&fixture, "third", &third);
}

#[test]
fn a_dead_delta_whose_base_is_gone_is_not_relied_on() {
    let fixture = Fixture::new(PageSize::default());
    let base: Vec<_> = std::iter::once(noise(7, PAGE))
        .chain(others(1, 20))
        .collect();
    fixture
        .commit("base", ParentChoice::Nothing, image(&base))
        .unwrap();
    // A pack with one delta, and with pages that another snapshot needs.
    let step: Vec<_> = std::iter::once(changed(7, 50))
        .chain(others(2, 600))
        .collect();
    let on_base = ParentChoice::Named("base".to_owned());
    fixture.commit("step", on_base, image(&step)).unwrap();
    let kept: Vec<_> = others(2, 600).collect();
    fixture
        .commit("kept", ParentChoice::Nothing, image(&kept))
        .unwrap();
    remove(&fixture.store, "base");
    remove(&fixture.store, "step");
    let report = collect(&fixture.other());
    assert_eq!(
        report.plan.packs.len(),
        2,
        "the pack with the delta stays: {report:?}"
    );
    // The page is in the index, as a delta that cannot be read any more.
    let again = vec![changed(7, 50)];
    fixture
        .commit("again", ParentChoice::Nothing, image(&again))
        .unwrap();
    assert_whole(&fixture, "again", &again);
    assert_whole(&fixture, "kept", &kept);
}

#[test]
fn many_small_packs_become_one_and_every_snapshot_stays() {
    let fixture = Fixture::new(PageSize::default());
    let pages: Vec<_> = others(3, 60).collect();
    for (number, page) in pages.iter().enumerate() {
        let tag = format!("t{number}");
        let one = [page.clone()];
        fixture
            .commit(&tag, ParentChoice::Nothing, image(&one))
            .unwrap();
    }
    assert_eq!(packs(fixture.store.path()), 60);
    collect(&fixture.other());
    assert!(
        packs(fixture.store.path()) < 10,
        "{}",
        packs(fixture.store.path())
    );
    for (number, page) in pages.iter().enumerate() {
        assert_whole(&fixture, &format!("t{number}"), std::slice::from_ref(page));
    }
    // What was merged is not merged again.
    let before = fixture.content();
    collect(&fixture.other());
    assert!(before == fixture.content());
}

/// Copies of one node may hint at different places of its children.
#[test]
fn a_delta_of_a_node_is_read_with_any_copy_of_its_base() {
    let fixture = Fixture::new(PageSize::default());
    let leaf: Vec<_> = others(4, 512).collect();
    let shuffled: Vec<_> = leaf.iter().rev().cloned().collect();
    let rest: Vec<_> = others(5, 512).collect();
    let mut step = leaf.clone();
    for page in [7, 100, 300] {
        step[page] = noise(90_000 + page as u64, PAGE);
    }
    let first = [shuffled.clone(), leaf.clone()].concat();
    fixture
        .commit("a", ParentChoice::Nothing, image(&first))
        .unwrap();
    let second = [shuffled, step.clone(), rest.clone()].concat();
    let on_a = ParentChoice::Named("a".to_owned());
    fixture.commit("b", on_a, image(&second)).unwrap();
    fixture
        .commit("rest", ParentChoice::Nothing, image(&rest))
        .unwrap();
    remove(&fixture.store, "a");
    remove(&fixture.store, "b");
    collect(&fixture.other());
    // The base of the dead delta comes back, with other hints.
    fixture
        .commit("leaf", ParentChoice::Nothing, image(&leaf))
        .unwrap();
    assert_whole(&fixture, "leaf", &leaf);
    let on_leaf = ParentChoice::Named("leaf".to_owned());
    fixture.commit("step", on_leaf, image(&step)).unwrap();
    assert_whole(&fixture, "step", &step);
    collect(&fixture.other());
    assert_whole(&fixture, "step", &step);
}
