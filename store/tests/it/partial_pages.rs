//! Extents over a parent, against bytes in memory: pages that are covered in
//! part, written with zeros, or given though they are as they were.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;

/// Blocks of 4 KiB of the image: two leaves with pages of 4 KiB.
const BLOCKS: u64 = 768;

#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    /// What the image has there already.
    Same,
    Noise(u64),
}

type Step = Vec<(u64, u64, Content)>;

fn steps() -> impl Strategy<Value = Vec<(InputKind, Step)>> {
    let content = prop_oneof![
        2 => Just(Content::Zero),
        2 => Just(Content::Same),
        3 => (0..9_u64).prop_map(Content::Noise),
    ];
    // Runs of up to 20 blocks are longer than a page of 64 KiB.
    let step = prop::collection::vec((0..BLOCKS, 1..20_u64, content), 0..16);
    let kind = prop_oneof![1 => Just(InputKind::Full), 4 => Just(InputKind::Diff)];
    prop::collection::vec((kind, step), 1..6)
}

/// The extents of a step, and the image after it.
fn apply(image: &[u8], kind: InputKind, step: &Step) -> (Vec<u8>, Vec<u8>, Vec<Extent>) {
    let mut covered = vec![false; BLOCKS as usize];
    let mut new = image.to_vec();
    for (first, count, content) in step {
        for block in *first..(first + count).min(BLOCKS) {
            let at = block as usize * 4096;
            covered[block as usize] = true;
            let bytes = match content {
                Content::Zero => vec![0; 4096],
                Content::Same => image[at..at + 4096].to_vec(),
                Content::Noise(seed) => noise(seed * 1000 + block % 7, 4096),
            };
            new[at..at + 4096].copy_from_slice(&bytes);
        }
    }
    let mut file = Vec::new();
    let mut list: Vec<Extent> = Vec::new();
    for block in 0..BLOCKS {
        let at = block as usize * 4096;
        if covered[block as usize] {
            // Now and then an extent is cut where it could run on.
            match list.last_mut() {
                Some(last) if last.image_offset + last.length == at as u64 && block % 5 != 0 => {
                    last.length += KIB_4;
                }
                _ => list.push(extent(at as u64, file.len() as u64, KIB_4)),
            }
            file.extend_from_slice(&new[at..at + 4096]);
        } else if kind == InputKind::Full {
            new[at..at + 4096].fill(0);
        }
    }
    (new, file, list)
}

fn follow(page_size: PageSize, steps: &[(InputKind, Step)]) {
    let fixture = Fixture::new(page_size);
    let mut image = noise(77, BLOCKS as usize * 4096);
    image[100 * 4096..300 * 4096].fill(0);
    let base = memory(InputData::Bytes(image.clone().into()), InputKind::Full);
    let mut committed = fixture.commit("0", ParentChoice::Nothing, base).unwrap();
    for (number, (kind, step)) in steps.iter().enumerate() {
        let (new, file, list) = apply(&image, *kind, step);
        let input = memory(extents(&file_of(&file), BLOCKS * KIB_4, list), *kind);
        let parent = ParentChoice::Named(number.to_string());
        committed = fixture
            .commit(&(number + 1).to_string(), parent, input)
            .unwrap();
        assert!(
            fixture.memory(&committed.manifest) == new,
            "step {number} reads back otherwise"
        );
        let page = page_size.bytes() as usize;
        let pairs = || image.chunks(page).zip(new.chunks(page));
        let entry = &committed.manifest.images[0];
        let changed = pairs().filter(|(old, new)| old != new).count() as u64;
        let nonzero = pairs().filter(|(_, new)| new.iter().any(|byte| *byte != 0));
        assert_eq!(entry.changed_pages, changed);
        assert_eq!(entry.nonzero_pages, nonzero.count() as u64);
        image = new;
    }
    // Content decides, not the way it came: the whole image has the same tree.
    let whole = memory(InputData::Bytes(image.into()), InputKind::Full);
    let whole = fixture
        .commit("whole", ParentChoice::Nothing, whole)
        .unwrap();
    let key = |committed: &Committed| committed.manifest.images[0].content_key();
    assert_eq!(key(&whole), key(&committed));
    assert!(
        fixture
            .store
            .verify(true, &Silent)
            .unwrap()
            .findings
            .is_empty()
    );
}

fn check(page_size: PageSize, cases: u32) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        max_shrink_iters: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&steps(), |steps| {
        follow(page_size, &steps);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn extents_over_pages_of_4_kib() {
    check(PageSize::KIB_4, 10);
}

#[test]
fn extents_over_pages_of_16_kib() {
    check(PageSize::KIB_16, 12);
}

#[test]
fn extents_over_pages_of_64_kib() {
    check(PageSize::KIB_64, 12);
}

/// One block of a page of 64 KiB: the other fifteen are the parent's, and the
/// parent's own page was made that way.
#[test]
fn the_rest_of_a_page_is_the_parents() {
    let fixture = Fixture::new(PageSize::KIB_64);
    let mut expected = noise(1, 128 << 10);
    let base = memory(InputData::Bytes(expected.clone().into()), InputKind::Full);
    fixture.commit("0", ParentChoice::Nothing, base).unwrap();
    for step in 1..5_u64 {
        let block = noise(step + 10, 4096);
        let at = step * 7 % 32 * KIB_4;
        expected[at as usize..][..4096].copy_from_slice(&block);
        let list = vec![extent(at, 0, KIB_4)];
        let input = memory(extents(&file_of(&block), 128 << 10, list), InputKind::Diff);
        let parent = ParentChoice::Named((step - 1).to_string());
        let committed = fixture.commit(&step.to_string(), parent, input).unwrap();
        assert!(fixture.memory(&committed.manifest) == expected, "{step}");
        assert_eq!(committed.manifest.images[0].changed_pages, 1);
    }
}
