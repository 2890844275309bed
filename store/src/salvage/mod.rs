//! Finding the whole chunks of a pack, whatever else is damaged in it.
//!
//! A pack whose footer is whole says where its chunks are. In one of version 2 damaged
//! blocks are known, and what is under them is found by its content (`torn`). In one of
//! version 1 with a damaged footer, lines can be wrong: in an offset, which also says where the chunk
//! before ends; in a kind or an encoding; in a key. But chunks tell what they are.
//! zstd frames know their length, raw pages have a page's, and a chunk that
//! decodes has an id, which has to fit the key, or is the key where that is what
//! was damaged.

use std::sync::Arc;

use rayon::prelude::*;

use crate::chunks::{Chunks, Place};
use crate::error::{Damage, Error, Result};
use crate::format::entry::{self, ENTRY_LEN, Entry};
use crate::format::pack_v1::HEADER_LEN;
use crate::id::ChunkKind;
use crate::pack::codec::{self, Encoding};
use crate::pack::reader::{PackReader, Slot};
use crate::pack::{EntryNumber, PackVersion};
use crate::scratch::Scratch;
use crate::sim::{self, Fault};
use crate::threads;

mod torn;

/// Which chunks of a pack to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    Standalone,
    Deltas,
    All,
}

impl Wanted {
    fn takes(self, encoding: Encoding) -> bool {
        match self {
            Self::Standalone => encoding.is_standalone(),
            Self::Deltas => encoding.is_delta(),
            Self::All => true,
        }
    }
}

/// What was found in a pack.
#[derive(Default)]
pub(crate) struct Found {
    /// Chunks that decode to what their keys say, with their true entries.
    pub whole: Vec<Place>,
    /// Deltas whose bases are nowhere standalone. They may be dead, or of a store
    /// in which a base was lost that is there as a delta itself.
    pub baseless: Vec<Place>,
    /// Chunks under damaged blocks of the footer, with entries as they have to be in
    /// another pack: where they are now nobody can find them.
    pub torn: Vec<Place>,
    /// What is damaged. A delta whose base is nowhere is not.
    pub damage: Vec<Damage>,
}

/// What a look at one place has shown.
enum Looked {
    Whole(Place),
    /// It reads as its key says, and its stored bytes are not what the footer says.
    WholeAllTheSame(Place, Damage),
    Baseless(Place),
    Unwanted,
}

/// The wanted chunks of a pack. Bases of deltas are looked up in `chunks`.
pub(crate) fn chunks_of(chunks: &Chunks, pack: &Arc<PackReader>, wanted: Wanted) -> Result<Found> {
    threads::start_pool(chunks.path())?;
    let mut found = Found {
        damage: pack.problems()?,
        ..Found::default()
    };
    let entries_are_whole = pack.version() == PackVersion::Two || found.damage.is_empty();
    let slots = if entries_are_whole {
        whole_slots(pack)?
    } else {
        lines(pack, &mut found.damage)?
    };
    if pack.version() == PackVersion::Two && !found.damage.is_empty() {
        found.torn = torn::chunks_of(chunks, pack)?;
        found.torn.retain(|it| wanted.takes(it.slot.entry.encoding));
    }
    let looked: Vec<Result<Looked>> = slots
        .into_par_iter()
        .map(|slot| {
            let place = Place {
                pack: pack.clone(),
                slot,
            };
            if !entries_are_whole {
                let place = identify(chunks, place)?;
                let place = place.filter(|it| wanted.takes(it.slot.entry.encoding));
                return Ok(place.map_or(Looked::Unwanted, Looked::Whole));
            }
            // What only a newer version can read is left as it is.
            if !wanted.takes(slot.entry.encoding)
                || matches!(slot.entry.encoding, Encoding::Unknown(_))
            {
                return Ok(Looked::Unwanted);
            }
            match chunks.check_at(&place) {
                Ok(_) => Ok(Looked::Whole(place)),
                // What is stored here may be right.
                Err(Error::Damaged(Damage::Missing { .. })) => Ok(Looked::Baseless(place)),
                // What is damaged is its base, which is told where that is.
                Err(Error::Damaged(damage)) if !place.is_told_by(&damage) => {
                    Ok(Looked::Baseless(place))
                }
                Err(Error::Damaged(damage)) => match as_it_reads(chunks, &place)? {
                    Some(place) => Ok(Looked::WholeAllTheSame(place, damage)),
                    None => Err(damage.into()),
                },
                Err(error) => Err(error),
            }
        })
        .collect();
    for result in looked {
        match result {
            Ok(Looked::Whole(place)) => found.whole.push(place),
            Ok(Looked::WholeAllTheSame(place, damage)) => {
                found.whole.push(place);
                found.damage.push(damage);
            }
            Ok(Looked::Baseless(place)) if sim::on(Fault::RepairEntersDeadDelta) => {
                found.whole.push(place);
            }
            Ok(Looked::Baseless(place)) => found.baseless.push(place),
            Ok(Looked::Unwanted) => {}
            Err(Error::Damaged(damage)) => found.damage.push(damage),
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}

/// The wanted chunks of a pack that was cut off among them, found by their content.
pub(crate) fn unsealed_chunks_of(
    chunks: &Chunks,
    pack: &Arc<PackReader>,
    wanted: Wanted,
) -> Result<Vec<Place>> {
    let mut found = torn::chunks_without_seal(chunks, pack)?;
    found.retain(|it| wanted.takes(it.slot.entry.encoding));
    Ok(found)
}

/// A chunk whose stored bytes do not match the footer, if it reads as its key says: a bit
/// may be wrong that no reader needs, in the hint of a delta for example.
fn as_it_reads(chunks: &Chunks, place: &Place) -> Result<Option<Place>> {
    let mut found = place.clone();
    let mut stored = Scratch::take();
    let read = place.pack.read(&place.slot, &mut stored).and_then(|()| {
        found.slot.entry.check = entry::stored_check(&stored);
        chunks.check_at(&found)
    });
    match read {
        Ok(_) => Ok(Some(found)),
        Err(Error::Damaged(_) | Error::Newer { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

/// The entries of a footer, but for damaged blocks.
fn whole_slots(pack: &PackReader) -> Result<Vec<Slot>> {
    let mut slots = Vec::new();
    for slot in pack.scan() {
        match slot {
            Ok(slot) => slots.push(slot),
            Err(Error::Damaged(_)) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(slots)
}

/// The lines of a footer of version 1 that may be damaged, with offsets put right where the
/// chunk before tells its length.
fn lines(pack: &PackReader, damage: &mut Vec<Damage>) -> Result<Vec<Slot>> {
    let raw = match pack.raw_lines() {
        Err(Error::Damaged(unreadable)) => {
            damage.push(unreadable);
            return Ok(Vec::new());
        }
        other => other?,
    };
    let raw: Vec<&[u8]> = raw.chunks_exact(ENTRY_LEN).collect();
    let mut slots = Vec::new();
    let mut start = HEADER_LEN as u64;
    for (position, line) in raw.iter().enumerate() {
        let next = raw.get(position + 1);
        let told = next.map_or(pack.chunks_end(), |next| u64::from(entry::offset_in(next)));
        let Some(entry) = guess(line, start) else {
            start = told;
            continue;
        };
        let number = EntryNumber(u32::try_from(position).expect("entries are counted in 32 bits"));
        let mut slot = Slot {
            number,
            entry,
            end: told,
        };
        if !fits(pack, &slot)?
            && let Some(len) = own_len(pack, &slot)?
        {
            slot.end = start + len;
            if !fits(pack, &slot)? {
                slot.end = told;
            }
        }
        start = slot.end;
        slots.push(slot);
    }
    Ok(slots)
}

/// The entry of a line whose chunk begins at `start`. A kind that does not exist
/// is taken for a page: [`identify`] tries the others.
fn guess(line: &[u8], start: u64) -> Option<Entry> {
    let mut line: [u8; ENTRY_LEN] = line.try_into().ok()?;
    line[16..20].copy_from_slice(&u32::try_from(start).ok()?.to_le_bytes());
    Entry::from_bytes(&line).or_else(|| {
        line[20] &= 0xf0;
        Entry::from_bytes(&line)
    })
}

/// Whether the bytes between a slot's ends are what the footer's check is of.
fn fits(pack: &PackReader, slot: &Slot) -> Result<bool> {
    let mut stored = Scratch::take();
    match pack.read(slot, &mut stored) {
        Err(Error::Damaged(_)) => Ok(false),
        other => other.map(|()| entry::stored_check(&stored) == slot.entry.check),
    }
}

/// How long a chunk says it is.
fn own_len(pack: &PackReader, slot: &Slot) -> Result<Option<u64>> {
    let start = u64::from(slot.entry.offset);
    let mut bytes = Scratch::take();
    match pack.read_raw(
        slot.entry,
        start,
        2 * pack.page_len() as u64 + 4096,
        &mut bytes,
    ) {
        Err(Error::Damaged(_)) => return Ok(None),
        other => other?,
    }
    let len = codec::stored_len(&bytes, slot.entry.encoding, pack.page_len());
    Ok(len.map(|len| len as u64))
}

/// The place with its true entry: `None` if nothing that is stored there decodes
/// to a chunk.
fn identify(chunks: &Chunks, place: Place) -> Result<Option<Place>> {
    const KINDS: [ChunkKind; 3] = [ChunkKind::Page, ChunkKind::Node, ChunkKind::Manifest];
    let said = place.slot.entry;
    match chunks.check_at(&place) {
        Ok(_) => return Ok(Some(place)),
        Err(Error::Damaged(_) | Error::Newer { .. }) => {}
        Err(other) => return Err(other),
    }
    let mut stored = Scratch::take();
    match place.pack.read(&place.slot, &mut stored) {
        Err(Error::Damaged(_)) => return Ok(None),
        other => other?,
    }
    let stored_is_right = entry::stored_check(&stored) == said.check;
    let others = KINDS
        .into_iter()
        .flat_map(|kind| Encoding::KNOWN.map(|encoding| (kind, encoding)));
    let own = (said.key.kind, said.encoding);
    for (kind, encoding) in std::iter::once(own).chain(others) {
        let mut tried = place.clone();
        tried.slot.entry.key.kind = kind;
        tried.slot.entry.encoding = encoding;
        let id = match chunks.id_at(&tried, &stored) {
            Err(Error::Damaged(_) | Error::Newer { .. }) => continue,
            other => other?,
        };
        // One field was damaged: the key, or another one.
        let key = id.plain_key();
        let key_fits = key.prefix == said.key.prefix;
        let key_was_damaged = (kind, encoding) == own && stored_is_right;
        if key_fits || key_was_damaged {
            tried.slot.entry.key = key;
            tried.slot.entry.check = entry::stored_check(&stored);
            return Ok(Some(tried));
        }
    }
    Ok(None)
}
