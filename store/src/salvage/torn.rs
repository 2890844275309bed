//! Finding the chunks under damaged blocks of a footer of version 2, and in a pack that was
//! cut off before it.
//!
//! Where such chunks begin and end is not known, nor what they are. But they stand one
//! after the other, between the chunks of whole blocks, and how many there are is
//! known. zstd frames know their length, deltas are a head and a frame or a patch, raw pages have
//! a page's length, and nodes and manifests say how long they are. Of the ways to cut
//! the bytes one fits. What decodes has an id, under which it is stored again: a wrong
//! guess would be a chunk that nobody asks for.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use crate::chunks::{Chunks, Place};
use crate::error::{Damage, Error, Result};
use crate::format::entry::{Entry, stored_check};
use crate::format::pack_v2::BLOCK_ENTRIES;
use crate::format::{entry, manifest, node};
use crate::id::{ChunkKey, ChunkKind};
use crate::pack::EntryNumber;
use crate::pack::codec::{self, DELTA_HEAD_LEN, Encoding};
use crate::pack::reader::{PackReader, Slot};
use crate::page::PageSize;

/// The beginning of a zstd frame.
const FRAME_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The longest stretch that is looked through: that of many lost blocks in a row is
/// looked through in part.
const MAX_STRETCH: u64 = 64 << 20;
/// What begins nearer to the end of what was read is read anew, with what follows it. A chunk
/// that is longer may be taken for something else there, which decodes to nothing.
const LONGEST_CHUNK: usize = 1 << 20;

/// Damaged blocks that follow each other.
#[derive(Debug)]
struct Stretch {
    bytes: Range<u64>,
    entries: Range<u32>,
}

/// What stands at a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    encoding: Encoding,
    len: usize,
}

/// The chunks under the damaged blocks of a pack which decode, with entries as they
/// have to be. Bases of deltas are looked up in `chunks`.
pub(super) fn chunks_of(chunks: &Chunks, pack: &Arc<PackReader>) -> Result<Vec<Place>> {
    let mut found = Vec::new();
    for stretch in stretches(pack)? {
        let mut bytes = Vec::new();
        let nothing = nothing_known(stretch.bytes.start);
        let len = (stretch.bytes.end - stretch.bytes.start).min(MAX_STRETCH);
        match pack.read_raw(nothing, stretch.bytes.start, len, &mut bytes) {
            Err(Error::Damaged(_)) => continue,
            other => other?,
        }
        let pieces = cut(&bytes, stretch.entries.len(), chunks.page_size());
        let at = stretch.bytes.start;
        found.extend(decoded(
            chunks,
            pack,
            at,
            &bytes,
            stretch.entries.start,
            &pieces,
        )?);
    }
    Ok(found)
}

/// The chunks of a pack of which nothing is known but that they stand one after the other
/// from its header on: as many as can be told apart.
pub(super) fn chunks_without_seal(chunks: &Chunks, pack: &Arc<PackReader>) -> Result<Vec<Place>> {
    let mut found = Vec::new();
    let mut at = pack.chunks_start();
    let mut number = 0;
    while at < pack.chunks_end() {
        let mut bytes = Vec::new();
        let len = (pack.chunks_end() - at).min(MAX_STRETCH);
        match pack.read_raw(nothing_known(at), at, len, &mut bytes) {
            Err(Error::Damaged(_)) => break,
            other => other?,
        }
        // Near the end of what was read a chunk may look like a shorter one.
        let is_all = at + len == pack.chunks_end();
        let until = bytes
            .len()
            .saturating_sub(if is_all { 0 } else { LONGEST_CHUNK });
        let mut pieces = Vec::new();
        let mut end = 0;
        while end < until
            && let Some(piece) = ways(&bytes[end..], chunks.page_size()).first().copied()
        {
            end += piece.len;
            pieces.push(piece);
        }
        if pieces.is_empty() {
            break;
        }
        found.extend(decoded(chunks, pack, at, &bytes, number, &pieces)?);
        number += u32::try_from(pieces.len()).expect("there is a byte to each");
        at += end as u64;
    }
    Ok(found)
}

/// Those of the pieces which decode. `bytes` are at `at` in the pack, and the first piece is
/// entry `number` of it.
fn decoded(
    chunks: &Chunks,
    pack: &Arc<PackReader>,
    at: u64,
    bytes: &[u8],
    number: u32,
    pieces: &[Piece],
) -> Result<Vec<Place>> {
    let mut found = Vec::new();
    let mut start = 0;
    for (number, piece) in (number..).zip(pieces) {
        let end = start + piece.len;
        let at = at + start as u64;
        let place = |kind, encoding| Place {
            pack: pack.clone(),
            slot: Slot {
                number: EntryNumber(number),
                entry: Entry {
                    encoding,
                    check: stored_check(&bytes[start..end]),
                    ..entry_of(kind, at)
                },
                end: at + piece.len as u64,
            },
        };
        found.extend(identify(chunks, &place, *piece, &bytes[start..end])?);
        start = end;
    }
    Ok(found)
}

/// As which kinds of chunk stored bytes decode. More than one is possible in theory.
fn identify(
    chunks: &Chunks,
    place: &impl Fn(ChunkKind, Encoding) -> Place,
    piece: Piece,
    stored: &[u8],
) -> Result<Vec<Place>> {
    let ways = match piece.encoding {
        Encoding::Delta => vec![
            (ChunkKind::Page, Encoding::Delta),
            (ChunkKind::Node, Encoding::IdDelta),
        ],
        Encoding::Patch => vec![(ChunkKind::Page, Encoding::Patch)],
        encoding => vec![
            (ChunkKind::Page, encoding),
            (ChunkKind::Node, encoding),
            (ChunkKind::Manifest, encoding),
        ],
    };
    let mut found = Vec::new();
    for (kind, encoding) in ways {
        let mut tried = place(kind, encoding);
        match chunks.id_of_well_formed(&tried, stored) {
            Ok(Some(id)) => {
                tried.slot.entry.key = chunks.keys().of(id);
                found.push(tried);
            }
            Ok(None) | Err(Error::Damaged(_) | Error::Newer { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}

/// Cuts bytes into so many pieces, or as many as can be found from the beginning on.
fn cut(bytes: &[u8], count: usize, page_size: PageSize) -> Vec<Piece> {
    let mut best = Vec::new();
    let mut tried = HashSet::new();
    // The pieces so far, and for each the ones that could stand there instead.
    let mut path: Vec<(Piece, Vec<Piece>)> = Vec::new();
    let mut at = 0;
    loop {
        let here = path.iter().map(|(piece, _)| *piece);
        if path.len() == count && at == bytes.len() {
            return here.collect();
        }
        if path.len() > best.len() {
            best = here.collect();
        }
        let mut pieces = Vec::new();
        if path.len() < count && tried.insert((at, path.len())) {
            pieces = ways(&bytes[at..], page_size);
        }
        // The likely ones first.
        pieces.reverse();
        loop {
            if let Some(next) = pieces.pop() {
                at += next.len;
                path.push((next, pieces));
                break;
            }
            let Some((last, others)) = path.pop() else {
                return best;
            };
            at -= last.len;
            pieces = others;
        }
    }
}

/// What may stand at the beginning of these bytes, the likely first.
fn ways(bytes: &[u8], page_size: PageSize) -> Vec<Piece> {
    let frame = |skip: usize| {
        let frame = bytes.get(skip..)?;
        let len = frame
            .starts_with(&FRAME_MAGIC)
            .then(|| codec::frame_len(frame));
        Some(len?? + skip).filter(|len| *len <= bytes.len())
    };
    let raw = |len: Option<usize>| {
        let encoding = Encoding::Raw;
        len.filter(|len| *len <= bytes.len())
            .map(|len| Piece { encoding, len })
    };
    let zstd = frame(0).map(|len| Piece {
        encoding: Encoding::Zstd,
        len,
    });
    let delta = frame(DELTA_HEAD_LEN).map(|len| Piece {
        encoding: Encoding::Delta,
        len,
    });
    // Not more than there is: `patch::len` has looked at all of it.
    let patch = || {
        let encoding = Encoding::Patch;
        let len = codec::stored_len(bytes, encoding, page_size.len())?;
        Some(Piece { encoding, len })
    };
    let found = [
        zstd,
        delta,
        patch(),
        raw(node::len_of(bytes)),
        raw(manifest::len_of(bytes, page_size)),
        raw(Some(page_size.len())),
    ];
    found.into_iter().flatten().collect()
}

fn stretches(pack: &PackReader) -> Result<Vec<Stretch>> {
    let mut found: Vec<Stretch> = Vec::new();
    let mut begun: Option<(u64, u32)> = None;
    let mut end_of_last = pack.chunks_start();
    for number in 0..pack.block_count() {
        let first = number * BLOCK_ENTRIES;
        match pack.read_block(number) {
            Ok(block) => {
                if let Some((start, entry)) = begun.take() {
                    found.push(Stretch {
                        bytes: start..u64::from(entry::offset_in(&block)).max(start),
                        entries: entry..first,
                    });
                }
                let last = &block[block.len() - entry::ENTRY_LEN..];
                end_of_last = u64::from(entry::offset_in(last));
            }
            Err(Error::Damaged(Damage::Footer { .. })) => {
                begun = begun.or(Some((end_of_last, first)));
            }
            Err(other) => return Err(other),
        }
    }
    if let Some((start, entry)) = begun {
        found.push(Stretch {
            bytes: start..pack.chunks_end().max(start),
            entries: entry..pack.entry_count(),
        });
    }
    Ok(found)
}

fn entry_of(kind: ChunkKind, at: u64) -> Entry {
    Entry {
        key: ChunkKey {
            kind,
            prefix: [0; 16],
        },
        offset: u32::try_from(at).unwrap_or(u32::MAX),
        encoding: Encoding::Raw,
        check: [0; 3],
    }
}

/// Stands for chunks of which nothing is known.
fn nothing_known(at: u64) -> Entry {
    entry_of(ChunkKind::Page, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::node::{Child, Node};
    use crate::pack::codec::{Base, Patched};

    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new()
            .update(&[seed])
            .finalize_xof()
            .fill(&mut out);
        out
    }

    #[test]
    fn stored_chunks_are_cut_where_they_were_joined() {
        let mut chunks = Vec::new();
        for seed in 0..40 {
            let mut page = noise(seed, 4096);
            if seed % 3 == 0 {
                page[300..].fill(seed);
            }
            // One that looks like a patch, one like a delta, and one like a frame.
            if seed == 5 {
                page[40..48].copy_from_slice(&[0xd9, 0x5b, 4, 0, 0, 2, 1, 1]);
            }
            if seed == 7 {
                page[40..44].copy_from_slice(&FRAME_MAGIC);
            }
            if seed == 8 {
                page[..4].copy_from_slice(&FRAME_MAGIC);
            }
            let mut stored = Vec::new();
            codec::encode(&page, None, &mut stored);
            chunks.push(stored);
            if seed % 10 == 0 {
                let mut delta = vec![seed; DELTA_HEAD_LEN];
                codec::encode(&[seed; 4096], None, &mut delta);
                chunks.push(delta);
                let mut changed = page.clone();
                changed[2000] ^= 1;
                changed[4095] ^= 1;
                let base = Base {
                    head: [seed; DELTA_HEAD_LEN],
                    payload: &page,
                    patched: Patched::IfBest,
                    encoding: Encoding::Delta,
                    max_percent: codec::PAGE_DELTA_MAX_PERCENT,
                };
                let mut patch = Vec::new();
                assert_eq!(
                    codec::encode_to_keep(&changed, &[base], &mut patch),
                    Encoding::Patch
                );
                chunks.push(patch);
            }
        }
        let mut leaf = Node::empty(0);
        for slot in 0..37 {
            let hash = noise(100, 32).try_into().unwrap();
            leaf.set_child(slot, Some(Child { hash, hint: None }));
        }
        chunks.push(leaf.encode());
        let bytes = chunks.concat();
        let lens: Vec<usize> = chunks.iter().map(Vec::len).collect();
        let found = cut(&bytes, chunks.len(), PageSize::KIB_4);
        let found: Vec<usize> = found.iter().map(|piece| piece.len).collect();
        assert_eq!(found, lens);
        // With a damaged one in between, what is before it is found.
        let mut damaged = bytes;
        let at: usize = lens[..20].iter().sum();
        let len = damaged.len();
        damaged.drain(at + 1..(at + 30).min(len));
        let found = cut(&damaged, chunks.len(), PageSize::KIB_4);
        assert!(
            found
                .iter()
                .map(|it| it.len)
                .take(20)
                .eq(lens[..20].iter().copied())
        );
    }
}
