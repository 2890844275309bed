//! How the pages of an image are read and stored: each once.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use snapstore_store::ReadAt;

use super::*;

const PAGE: usize = KIB_4 as usize;
/// What a commit takes up at a time.
const BATCH: usize = 32 << 20;

/// An image that counts how often each page is read.
#[derive(Debug)]
struct Counting {
    bytes: Vec<u8>,
    hole: Range<u64>,
    reads: Vec<AtomicU32>,
}

impl Counting {
    fn new(bytes: Vec<u8>, hole: Range<u64>) -> Arc<Self> {
        let reads = (0..bytes.len() / PAGE).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self { bytes, hole, reads })
    }

    fn reads(&self) -> Vec<u32> {
        let reads = self.reads.iter();
        reads.map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn expected(&self) -> Vec<u32> {
        (0..self.bytes.len() as u64)
            .step_by(PAGE)
            .map(|at| u32::from(!self.hole.contains(&at)))
            .collect()
    }
}

impl ReadAt for Counting {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        out.copy_from_slice(&self.bytes[start..start + out.len()]);
        for page in start / PAGE..(start + out.len()).div_ceil(PAGE) {
            self.reads[page].fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn next_data(&self, from_bytes: u64) -> io::Result<Option<Range<u64>>> {
        Ok(match from_bytes {
            from if from < self.hole.start => Some(from..self.hole.start),
            from if from < self.size_bytes() => Some(from.max(self.hole.end)..self.size_bytes()),
            _ => None,
        })
    }
}

#[test]
fn each_page_of_an_input_is_read_once_and_no_hole() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let hole = 100 * KIB_4..700 * KIB_4;
    let mut bytes = noise(1, 2000 * PAGE);
    bytes[100 * PAGE..700 * PAGE].fill(0);
    let base = Counting::new(bytes.clone(), hole.clone());
    let input = memory(InputData::Reader(base.clone()), InputKind::Full);
    let nothing = ParentChoice::Nothing;
    let committed = fixture.commit("base", nothing, input).unwrap();
    assert_eq!(base.reads(), base.expected());
    assert_eq!(fixture.memory(&committed.manifest), bytes);

    // What differs from the parent is read no more often.
    for page in (0..100).chain(800..900) {
        bytes[page * PAGE] ^= 1;
    }
    let next = Counting::new(bytes.clone(), hole);
    let input = memory(InputData::Reader(next.clone()), InputKind::Full);
    let parent = ParentChoice::Named("base".to_owned());
    let committed = fixture.commit("next", parent, input).unwrap();
    assert_eq!(next.reads(), next.expected());
    assert_eq!(committed.manifest.images[0].changed_pages, 200);
    assert_eq!(fixture.memory(&committed.manifest), bytes);
}

#[test]
fn a_page_that_an_image_has_often_is_stored_once() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let distinct: Vec<Vec<u8>> = (0..5).map(|seed| noise(seed, PAGE)).collect();
    // Near and far: within a piece, a leaf, a batch, and over several batches.
    let pages = 2 * BATCH / PAGE + 1000;
    let bytes: Vec<u8> = (0..pages)
        .flat_map(|page| distinct[page % 5].clone())
        .collect();
    let input = memory(InputData::Bytes(bytes.clone().into()), InputKind::Full);
    let committed = fixture
        .commit("base", ParentChoice::Nothing, input)
        .unwrap();
    // Five pages, leaves that begin with each of them, the last one, and what is above.
    let chunks = committed.manifest.added_chunks;
    assert!(chunks <= 5 + 5 + 1 + 3, "{chunks} chunks");
    assert_eq!(fixture.memory(&committed.manifest), bytes);
}

/// While a batch is read, places in the pack that is being written are known; it may be full
/// before that batch gets its own.
#[test]
fn pages_of_a_pack_that_became_full_meanwhile_are_found_in_it() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let half = BATCH / 2;
    let mut bytes = Vec::new();
    let mut news: Vec<Range<usize>> = Vec::new();
    for batch in 0..18_u64 {
        // The first half of what was read before the previous batch, and something new.
        let known = news.iter().rev().nth(1).cloned().unwrap_or(0..0);
        bytes.extend_from_within(known);
        let start = bytes.len();
        bytes.extend(noise(batch, (batch as usize + 1) * BATCH - start));
        news.push(start..start + half);
    }
    let len = bytes.len() as u64;
    let counting = Counting::new(bytes, len..len);
    let input = memory(InputData::Reader(counting.clone()), InputKind::Full);
    let committed = fixture
        .commit("base", ParentChoice::Nothing, input)
        .unwrap();
    let bytes = &counting.bytes;
    assert!(fixture.memory(&committed.manifest) == *bytes, "other bytes");
    // A commit that misses what it relies on begins anew.
    assert!(
        counting.reads().iter().all(|count| *count == 1),
        "read again"
    );
    let packs = std::fs::read_dir(fixture.store.path().join("packs")).unwrap();
    assert!(packs.count() > 1, "no pack became full");
    // A page that nobody saw in time may be there twice, but not all of them.
    let distinct = (bytes.len() - 16 * half) / PAGE;
    let chunks = usize::try_from(committed.manifest.added_chunks).unwrap();
    assert!(
        chunks < distinct + bytes.len() / PAGE / 100,
        "{chunks} chunks"
    );
}

/// The first pages of a leaf are in the store, as if all of it were, and others are not.
#[test]
fn a_leaf_that_only_begins_like_a_known_one_is_stored() {
    let fixture = Fixture::new(PageSize::KIB_4);
    let leaf = 512 * PAGE;
    let known = noise(1, 2 * leaf);
    let commit = |tag: &str, bytes: &[u8]| {
        let counting = Counting::new(bytes.to_vec(), 0..0);
        let input = memory(InputData::Reader(counting.clone()), InputKind::Full);
        let committed = fixture.commit(tag, ParentChoice::Nothing, input).unwrap();
        assert!(
            fixture.memory(&committed.manifest) == bytes,
            "{tag} has other bytes"
        );
        (committed.manifest.added_chunks, counting.reads())
    };
    commit("base", &known);
    // Whole leaves are found by their ids, and read once.
    let (added, reads) = commit("again", &known);
    assert_eq!(added, 0);
    assert!(reads.iter().all(|count| *count == 1), "read again");
    // Of the first leaf half is new, of the second a page in the middle.
    let mut begins = known.clone();
    begins[leaf / 2..leaf].copy_from_slice(&noise(2, leaf / 2));
    begins[leaf + leaf / 2..][..PAGE].copy_from_slice(&noise(3, PAGE));
    let (added, reads) = commit("begins", &begins);
    // 257 pages, two leaves, a root.
    assert_eq!(added, 257 + 2 + 1);
    assert!(
        reads.iter().all(|count| (1..=2).contains(count)),
        "read more often"
    );
}
