//! A chunk on its way from one pack to another.
//!
//! Stored bytes are taken as they are, unless the format of the store has another way
//! to store the chunk.

use crate::chunks::{Chunks, Place, identified};
use crate::error::Result;
use crate::format::config::StoreFormat;
use crate::format::entry;
use crate::index::Lookup;
use crate::pack::codec::{self, Base, Encoding, Patched};
use crate::pack::reader::{BaseRef, delta_head, payload_limit};
use crate::pack::writer::EncodedChunk;
use crate::scratch::Scratch;

/// Reads the chunk at a place into `stored`, as it is to be stored now.
///
/// `bases` says where the index leads, if a delta may be made anew.
///
/// # Errors
/// As [`Chunks::check_at`]: damage is not copied on, since it would get a fresh
/// checksum.
pub(crate) fn rewrite(
    chunks: &Chunks,
    format: StoreFormat,
    place: &Place,
    bases: Option<&impl Lookup>,
    stored: &mut Vec<u8>,
) -> Result<EncodedChunk> {
    let entry = place.slot.entry;
    let mut payload = Scratch::of_len(payload_limit(entry.key.kind, chunks.page_size()));
    let (id, len) = chunks.read_checked(place, stored, &mut payload)?;
    let mut encoding = entry.encoding;
    let has_another_way = match format {
        StoreFormat::One => encoding == Encoding::IdDelta,
        StoreFormat::Two => place.needs_one_copy(),
    };
    if has_another_way {
        let mut buffer = Scratch::take();
        let base = match bases {
            Some(index) => find_base(chunks, place, index, &mut buffer)?,
            None => None,
        };
        let base = base.as_ref().map(|(base, len)| Base {
            head: delta_head(*base),
            payload: identified(entry.key.kind, &buffer[..*len]),
            patched: Patched::Never,
            encoding: Encoding::IdDelta,
            max_percent: codec::NODE_DELTA_MAX_PERCENT,
        });
        stored.clear();
        encoding = codec::encode(&payload[..len], base, stored);
    }
    Ok(EncodedChunk {
        key: chunks.keys().of(id),
        encoding,
        check: entry::stored_check(stored),
        len: stored.len(),
    })
}

/// The base of a delta where the index leads to a standalone copy of it.
fn find_base(
    chunks: &Chunks,
    delta: &Place,
    index: &impl Lookup,
    out: &mut Vec<u8>,
) -> Result<Option<(BaseRef, usize)>> {
    let Some(base) = delta.pack.base(&delta.slot)? else {
        return Ok(None);
    };
    for at in chunks.indexed(index, base.id) {
        let at = at?;
        let Some(place) = chunks.at_id(base.id, at)? else {
            continue;
        };
        if place.is_standalone() {
            out.resize(payload_limit(base.id.kind(), chunks.page_size()), 0);
            let len = chunks.read_at(&place, base.id, out)?;
            let hint = at;
            return Ok(Some((BaseRef { hint, ..base }, len)));
        }
    }
    Ok(None)
}
