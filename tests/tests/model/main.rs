//! Random histories of a store, against a model that keeps every image whole.

mod image;
mod world;

use anyhow::Context as _;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use snapstore_store::PageSize;

use world::World;

const TAGS: u8 = 5;
#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    Fill(u8),
    Noise(u64),
    /// Noise with one byte changed: alike, so that it is stored as a delta.
    Tweaked(u64, usize),
}

/// Writes a page; `block` picks one block of it where pages have several.
#[derive(Clone, Copy, Debug)]
struct Edit {
    page: u64,
    content: Content,
    block: Option<usize>,
}

#[derive(Clone, Debug)]
enum Step {
    /// Commits an image of its own, dense at the beginning.
    Fresh(u8, u64, Vec<Edit>),
    /// Commits the whole of another tag's image with changes.
    Full(u8, u8, ParentKind, Vec<Edit>),
    /// Commits only the changes.
    Diff(u8, u8, Vec<Edit>),
    /// The same two from extents of a file. Of these pages extents are given
    /// though they are as they were.
    FullExtents(u8, u8, Vec<Edit>),
    DiffExtents(u8, u8, Vec<Edit>, Vec<Edit>),
    Retag(u8, u8),
    Remove(u8),
    Collect(u8),
    Reopen,
    Verify(bool),
    /// Loses the index first if told so.
    Repair(bool),
    Compare(u8, u8),
    Read(u8, u64, usize),
}

#[derive(Clone, Copy, Debug)]
enum ParentKind {
    Automatic,
    Named,
    Nothing,
}

#[derive(Clone, Debug)]
struct History {
    pages: u64,
    steps: Vec<Step>,
}

fn contents() -> impl Strategy<Value = Content> {
    prop_oneof![
        2 => Just(Content::Zero),
        1 => any::<u8>().prop_map(Content::Fill),
        2 => (0..24_u64).prop_map(Content::Noise),
        3 => (0..24_u64, any::<usize>()).prop_map(|(seed, at)| Content::Tweaked(seed, at)),
    ]
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let page =
        prop_oneof![3 => any::<u64>(), 2 => 0..8_u64, 1 => 508..516_u64, 1 => Just(u64::MAX)];
    let edit = (page, contents(), prop::option::of(0..16_usize));
    let edit = edit.prop_map(|(page, content, block)| Edit {
        page,
        content,
        block,
    });
    prop::collection::vec(edit, 0..12)
}

fn steps() -> impl Strategy<Value = Step> {
    let tag = || 0..TAGS;
    let parent = prop_oneof![
        Just(ParentKind::Automatic),
        Just(ParentKind::Named),
        Just(ParentKind::Nothing)
    ];
    prop_oneof![
        2 => (tag(), 0..40_u64, edits()).prop_map(|(t, grown, e)| Step::Fresh(t, grown, e)),
        4 => (tag(), tag(), parent, edits()).prop_map(|(t, from, p, e)| Step::Full(t, from, p, e)),
        5 => (tag(), tag(), edits()).prop_map(|(t, from, e)| Step::Diff(t, from, e)),
        2 => (tag(), tag(), edits()).prop_map(|(t, from, e)| Step::FullExtents(t, from, e)),
        5 => (tag(), tag(), edits(), edits())
            .prop_map(|(t, from, e, same)| Step::DiffExtents(t, from, e, same)),
        1 => (tag(), tag()).prop_map(|(from, to)| Step::Retag(from, to)),
        2 => tag().prop_map(Step::Remove),
        3 => prop::sample::select(vec![0, 50, 90, 100]).prop_map(Step::Collect),
        1 => Just(Step::Reopen),
        1 => any::<bool>().prop_map(Step::Verify),
        1 => any::<bool>().prop_map(Step::Repair),
        1 => (tag(), tag()).prop_map(|(old, new)| Step::Compare(old, new)),
        3 => (tag(), any::<u64>(), 0..300_000_usize).prop_map(|(t, at, len)| Step::Read(t, at, len)),
    ]
}

fn histories() -> impl Strategy<Value = History> {
    let pages = prop_oneof![4 => 64..200_u64, 2 => 500..1500_u64, 1 => 262_100..262_300_u64];
    let steps = prop::collection::vec(steps(), 5..30);
    (pages, steps).prop_map(|(pages, steps)| History { pages, steps })
}

fn follow(page_size: PageSize, history: &History) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::new(dir.path(), page_size, history.pages)?;
    for (number, step) in history.steps.iter().enumerate() {
        world
            .step(step)
            .with_context(|| format!("step {number}, {step:?}"))?;
    }
    world.end()
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn check(page_size: PageSize, cases: u32) {
    let mut runner = TestRunner::new(config(cases));
    let result = runner.run(&histories(), |history| {
        follow(page_size, &history).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn histories_with_pages_of_4_kib() {
    check(PageSize::KIB_4, 16);
}

#[test]
fn histories_with_pages_of_16_kib() {
    check(PageSize::KIB_16, 8);
}

#[test]
fn histories_with_pages_of_64_kib() {
    check(PageSize::KIB_64, 8);
}

/// A tree node may be the base of another one and be needed itself. Whichever
/// the collector comes upon first, it keeps what is below.
#[test]
fn a_node_that_is_a_base_keeps_its_children() -> anyhow::Result<()> {
    let edit = |page, seed| Edit {
        page,
        content: Content::Noise(seed),
        block: None,
    };
    let mut steps = vec![Step::Fresh(0, 0, vec![])];
    steps.extend((1..TAGS).map(|tag| Step::Diff(tag, 0, vec![edit(u64::from(tag), 99)])));
    steps.extend([Step::Remove(TAGS - 1), Step::Collect(100)]);
    let history = History { pages: 600, steps };
    // Which one comes first depends on the snapshots' ids.
    (0..4).try_for_each(|_| follow(PageSize::KIB_4, &history))
}
