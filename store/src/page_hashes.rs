//! The hashes of many pages, side by side.
//!
//! BLAKE3 cuts its input into pieces of 1 KiB, and a processor hashes up to sixteen of these at
//! once. A page of 4 KiB has four: alone it leaves most of what the processor could do unused.
//! Sixteen pages hashed together take a third of the time, and have the same hashes.
//!
//! The crate's functions for that are public, and not part of what it promises: this is the
//! only file that knows them, and its tests compare with [`blake3::hash`].

use blake3::IncrementCounter;
use blake3::platform::Platform;

/// Pages that are hashed together: what the widest registers have room for.
pub(crate) const SIDE_BY_SIDE: usize = 16;

const PAGE_LEN: usize = 4096;
const PIECE_LEN: usize = 1024;
const PIECES: usize = PAGE_LEN / PIECE_LEN;
const HASH_LEN: usize = blake3::OUT_LEN;
const PARENT_LEN: usize = 2 * HASH_LEN;

/// The initial value and the flags of BLAKE3 (its specification, 2.2 and table 3).
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

/// The BLAKE3-256 of each page, in their order.
pub(crate) fn page_hashes(pages: &[&[u8]]) -> Vec<[u8; HASH_LEN]> {
    hashes_on(Platform::detect(), pages)
}

fn hashes_on(platform: Platform, pages: &[&[u8]]) -> Vec<[u8; HASH_LEN]> {
    let mut hashes = Vec::with_capacity(pages.len());
    for some in pages.chunks(SIDE_BY_SIDE) {
        // A longer page fills the processor by itself.
        if some.len() == 1 || some.iter().any(|page| page.len() != PAGE_LEN) {
            hashes.extend(some.iter().map(|page| *blake3::hash(page).as_bytes()));
        } else {
            let roots = side_by_side(platform, some);
            hashes.extend_from_slice(roots[..some.len() * HASH_LEN].as_chunks().0);
        }
    }
    hashes
}

/// The hashes of up to [`SIDE_BY_SIDE`] pages of [`PAGE_LEN`] bytes, one after another.
fn side_by_side(platform: Platform, pages: &[&[u8]]) -> [u8; SIDE_BY_SIDE * HASH_LEN] {
    let count = pages.len();
    // Of each page the hashes of its pieces: two parents' inputs.
    let mut parents = [[0; PARENT_LEN]; 2 * SIDE_BY_SIDE];
    for piece in 0..PIECES {
        let mut inputs = [&[0; PIECE_LEN]; SIDE_BY_SIDE];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks().0[piece];
        }
        let mut outputs = [0; SIDE_BY_SIDE * HASH_LEN];
        platform.hash_many(
            &inputs[..count],
            &IV,
            piece as u64,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            &mut outputs,
        );
        for (page, output) in outputs.chunks(HASH_LEN).take(count).enumerate() {
            let side = piece % 2 * HASH_LEN;
            parents[2 * page + piece / 2][side..side + HASH_LEN].copy_from_slice(output);
        }
    }
    let mut halves = [0; 2 * SIDE_BY_SIDE * HASH_LEN];
    merge(platform, &parents[..2 * count], PARENT, &mut halves);
    let mut roots = [0; SIDE_BY_SIDE * HASH_LEN];
    let halves: &[[u8; PARENT_LEN]] = halves.as_chunks().0;
    merge(platform, &halves[..count], PARENT | ROOT, &mut roots);
    roots
}

/// Hashes the hashes of pairs.
fn merge(platform: Platform, pairs: &[[u8; PARENT_LEN]], flags: u8, out: &mut [u8]) {
    let mut inputs = [&[0; PARENT_LEN]; 2 * SIDE_BY_SIDE];
    for (input, pair) in inputs.iter_mut().zip(pairs) {
        *input = pair;
    }
    let inputs = &inputs[..pairs.len()];
    platform.hash_many(inputs, &IV, 0, IncrementCounter::No, flags, 0, 0, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platforms() -> Vec<Platform> {
        let mut platforms = vec![Platform::detect(), Platform::portable()];
        #[cfg(target_arch = "x86_64")]
        {
            let narrower = [Platform::sse2(), Platform::sse41(), Platform::avx2()];
            platforms.extend(narrower.into_iter().flatten());
        }
        platforms
    }

    fn bytes(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new()
            .update(b"pages")
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    #[test]
    fn any_number_of_pages_has_the_hashes_that_each_has_alone() {
        let bytes = bytes(50 * PAGE_LEN);
        let all: Vec<&[u8]> = bytes.chunks(PAGE_LEN).collect();
        for count in 0..all.len() {
            let pages = &all[..count];
            let alone: Vec<[u8; HASH_LEN]> =
                pages.iter().map(|page| blake3::hash(page).into()).collect();
            assert_eq!(page_hashes(pages), alone);
            for platform in platforms() {
                assert_eq!(hashes_on(platform, pages), alone, "{count} on {platform:?}");
            }
        }
    }

    #[test]
    fn pages_of_another_length_have_the_hashes_that_each_has_alone() {
        let bytes = bytes(20 * (64 << 10));
        for page_len in [1, 1000, PAGE_LEN - 1, PAGE_LEN + 1, 16 << 10, 64 << 10] {
            let pages: Vec<&[u8]> = bytes.chunks_exact(page_len).take(20).collect();
            let alone: Vec<[u8; HASH_LEN]> =
                pages.iter().map(|page| blake3::hash(page).into()).collect();
            assert_eq!(page_hashes(&pages), alone, "{page_len} bytes");
        }
    }
}
