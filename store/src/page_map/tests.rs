use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::commit::input::{Input, InputData, InputKind};
use crate::commit::{CommitRequest, ParentChoice};
use crate::manifest::ImageRole;
use crate::page::PageSize;
use crate::progress::Silent;
use crate::working_set::set::{Seen, WorkingSet};

const PAGE: usize = 4096;

/// Pages, each by what fills it.
type Pages = Vec<u8>;

fn bytes(pages: &[u8]) -> Vec<u8> {
    pages.iter().flat_map(|fill| [*fill; PAGE]).collect()
}

fn commit(store: &Store, tag: &str, parent: Option<&str>, images: &[(&str, &Pages)]) -> SnapshotId {
    let inputs = images.iter().map(|(name, pages)| Input {
        name: (*name).to_owned(),
        role: match *name {
            "memory" => ImageRole::Memory,
            _ => ImageRole::Disk,
        },
        data: InputData::Bytes(bytes(pages).into()),
        kind: InputKind::Full,
    });
    let request = CommitRequest {
        tag: tag.to_owned(),
        parent: match parent {
            Some(parent) => ParentChoice::Named(parent.to_owned()),
            None => ParentChoice::Nothing,
        },
        inputs: inputs.collect(),
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent).unwrap().id
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
    (dir, store)
}

fn map(store: &Store, id: SnapshotId, image: &str) -> PageMap {
    let found = store.page_maps(&[(id, image)]).unwrap();
    assert!(found.unreadable.is_empty());
    found.maps.into_iter().next().unwrap().unwrap()
}

/// The kind of each page. The runs cover all pages, and neighbours are not alike.
fn kinds(map: &PageMap) -> Vec<PageKind> {
    let mut kinds = Vec::new();
    for run in &map.runs {
        assert_eq!(run.first_page, kinds.len() as u64);
        assert!(run.pages > 0);
        kinds.extend((0..run.pages).map(|_| run.kind));
    }
    for pair in map.runs.windows(2) {
        let alike = |run: &PageRun| (run.kind, run.in_working_set);
        assert_ne!(alike(&pair[0]), alike(&pair[1]));
    }
    kinds
}

fn images() -> impl Strategy<Value = Vec<(Pages, Option<usize>)>> {
    // More than a leaf has, mostly zero, out of few contents.
    let page = prop_oneof![3 => Just(0_u8), 1 => 1_u8..9];
    let image = (
        prop::collection::vec(page, 1..40),
        0_usize..3,
        prop::option::of(0_usize..9),
    );
    let image = image.prop_map(|(mut pages, leaves, parent)| {
        let distance = leaves * 300;
        pages.splice(0..0, std::iter::repeat_n(0, distance));
        (pages, parent)
    });
    prop::collection::vec(image, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn each_page_is_of_the_kind_that_a_model_says(images in images()) {
        let (_dir, store) = store();
        let mut ids = Vec::new();
        let mut parents = Vec::new();
        for (number, (pages, parent)) in images.iter().enumerate() {
            let parent = parent.filter(|_| number > 0).map(|parent| parent % number);
            let named = parent.map(|parent| format!("tag{parent}"));
            let tag = format!("tag{number}");
            ids.push(commit(&store, &tag, named.as_deref(), &[("memory", pages)]));
            parents.push(parent);
        }
        let asked: Vec<_> = ids.iter().map(|id| (*id, "memory")).collect();
        let found = store.page_maps(&asked).unwrap();
        for (number, map) in found.maps.iter().enumerate() {
            let map = map.as_ref().unwrap();
            let (pages, _) = &images[number];
            let expected: Vec<_> = pages.iter().enumerate().map(|(at, fill)| {
                let by_parent = parents[number].and_then(|parent| images[parent].0.get(at));
                // One content twice is one snapshot, which is no other one.
                let elsewhere = images.iter().enumerate().any(|(other, (pages, _))| {
                    ids[other] != ids[number] && pages.contains(fill)
                });
                match fill {
                    0 => PageKind::Zero,
                    fill if by_parent == Some(fill) => PageKind::Parent,
                    _ if elsewhere => PageKind::Shared,
                    _ => PageKind::Own,
                }
            }).collect();
            prop_assert_eq!(kinds(map), expected, "of snapshot {}", number);
            // Asked alone it is the same.
            let alone = store.page_maps(&[asked[number]]).unwrap();
            prop_assert_eq!(&alone.maps[0].as_ref().unwrap().runs, &map.runs);
        }
    }
}

#[test]
fn other_images_of_other_snapshots_count_and_those_of_the_same_do_not() {
    let (_dir, store) = store();
    let one = commit(
        &store,
        "one",
        None,
        &[("disk", &vec![1, 2]), ("memory", &vec![3])],
    );
    let two = commit(
        &store,
        "two",
        None,
        &[("disk", &vec![3, 9]), ("memory", &vec![1, 9])],
    );
    assert_eq!(
        kinds(&map(&store, one, "disk")),
        [PageKind::Shared, PageKind::Own]
    );
    assert_eq!(kinds(&map(&store, one, "memory")), [PageKind::Shared]);
    assert_eq!(
        kinds(&map(&store, two, "memory")),
        [PageKind::Shared, PageKind::Own]
    );
}

#[test]
fn a_second_tag_is_no_other_snapshot_and_a_parent_without_a_tag_is_none() {
    let (_dir, store) = store();
    let base = commit(&store, "base", None, &[("memory", &vec![1, 2])]);
    let next = commit(&store, "next", Some("base"), &[("memory", &vec![1, 3])]);
    store.set_tag("again", next, false).unwrap();
    let of_next = map(&store, next, "memory");
    assert_eq!(of_next.parent, Some(base));
    assert_eq!(kinds(&of_next), [PageKind::Parent, PageKind::Own]);
    store.remove_tags(&["base".to_owned()]).unwrap();
    let of_next = map(&store, next, "memory");
    assert_eq!(of_next.parent, None);
    assert_eq!(kinds(&of_next), [PageKind::Own, PageKind::Own]);
}

#[test]
fn working_sets_are_told_beside_the_kind() {
    let (_dir, store) = store();
    let id = commit(&store, "one", None, &[("memory", &vec![1, 0, 0, 2, 2])]);
    assert!(!map(&store, id, "memory").has_working_set);
    let seen = Seen {
        // One is beyond the end: the file is a guess, and may be anything.
        touched: vec![3, 1, 700],
        ..Seen::default()
    };
    let set = WorkingSet::merged(None, &seen, std::time::SystemTime::now());
    store.keep_working_set(id, "memory", &set).unwrap();
    let map = map(&store, id, "memory");
    assert_eq!(map.working_set_pages(), 2);
    let told: HashMap<u64, bool> = map
        .runs
        .iter()
        .map(|run| (run.first_page, run.in_working_set))
        .collect();
    assert_eq!(kinds(&map).len(), 5);
    assert!(told[&1] && told[&3] && !told[&0] && !told[&2] && !told[&4]);
}

/// What is lost of a parent, and of nothing that the snapshot itself needs, does not keep
/// it from being mapped.
#[test]
fn damage_of_the_parent_is_none_of_its_child() {
    let (_dir, store) = store();
    // Whole leaves that differ, so that each has nodes of its own.
    let noise = |seed: u8| (0..600).map(|at| seed + (at % 3) as u8).collect::<Pages>();
    commit(&store, "base", None, &[("memory", &noise(1))]);
    let pack = store.path().join("packs/00000001.pack");
    assert!(pack.is_file());
    let next = commit(&store, "next", Some("base"), &[("memory", &noise(101))]);
    let whole = std::fs::read(&pack).unwrap();
    let mut without_parent = 0;
    for at in (0..whole.len()).step_by(7) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&pack, &flipped).unwrap();
        let store = Store::open(store.path()).unwrap();
        let mut page = [0; PAGE];
        let memory = store.snapshot("next").unwrap().image("memory").unwrap();
        let is_whole = (0..600).all(|at| memory.read_at(&mut page, at * PAGE as u64).is_ok());
        let found = store.page_maps(&[(next, "memory")]).unwrap();
        match &found.maps[0] {
            Ok(map) => without_parent += u32::from(map.parent.is_none()),
            Err(error) => assert!(!is_whole, "byte {at}: {error}"),
        }
    }
    assert!(
        without_parent > 0,
        "no flipped byte was one of the parent's tree"
    );
}

#[test]
fn an_image_that_is_not_there_is_not_found() {
    let (_dir, store) = store();
    let id = commit(&store, "one", None, &[("memory", &vec![1])]);
    let found = store.page_maps(&[(id, "disk")]);
    assert!(matches!(found, Err(Error::NotFound { .. })));
    assert!(store.page_maps(&[]).unwrap().maps.is_empty());
}
