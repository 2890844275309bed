//! From stored bytes to a payload that is checked.

use std::cell::Cell;

use super::Chunks;
use super::rule::{Failure, Place, missing, no_base};
use crate::error::{Damage, Error, Result};
use crate::format::entry::stored_check;
use crate::format::manifest;
use crate::format::node;
use crate::id::{ChunkId, ChunkKind};
use crate::manifest::Manifest;
use crate::pack::Location;
use crate::pack::codec::{self, Encoding, Needs};
use crate::pack::reader::{base_in, payload_limit};
use crate::page::PageSize;
use crate::scratch::Scratch;

impl Chunks {
    /// Reads the chunk `id` at one place, and checks it. See [`Chunks::read`].
    pub fn read_at(&self, place: &Place, id: ChunkId, out: &mut [u8]) -> Result<usize> {
        let mut stored = Scratch::take();
        place.pack.read(&place.slot, &mut stored)?;
        self.decode(place, &stored, |found| found == id, out)
    }

    /// Checks the stored bytes of a place against the footer's check, and its
    /// payload against the key; returns the chunk's id. Without the base of a delta
    /// nothing is known of its payload: [`Damage::Missing`] names the base then.
    pub fn check_at(&self, place: &Place) -> Result<ChunkId> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::of_len(payload_limit(kind, self.page_size));
        let (id, _) = self.read_checked(place, &mut Scratch::take(), &mut payload)?;
        Ok(id)
    }

    /// Reads the stored bytes of a place into `stored` and its payload into `payload`,
    /// checked as [`Chunks::check_at`] does. Returns the id and the payload's length.
    pub fn read_checked(
        &self,
        place: &Place,
        stored: &mut Vec<u8>,
        payload: &mut [u8],
    ) -> Result<(ChunkId, usize)> {
        let entry = place.slot.entry;
        let version = place.pack.version();
        let seen = Cell::new(None);
        self.read_stored(place, stored)?;
        let is_right = |found| {
            seen.set(Some(found));
            self.keys.in_pack(found, version) == entry.key
        };
        let len = self.decode(place, stored, is_right, payload)?;
        Ok((seen.get().expect("what is right was seen"), len))
    }

    /// The same for a chunk whose id is known.
    pub fn check_id_at(&self, place: &Place, id: ChunkId) -> Result<()> {
        let mut stored = Scratch::take();
        self.read_stored(place, &mut stored)?;
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::of_len(payload_limit(kind, self.page_size));
        self.decode(place, &stored, |found| found == id, &mut payload)
            .map(|_| ())
    }

    /// Reads the stored bytes of a place, and checks them against the footer.
    fn read_stored(&self, place: &Place, stored: &mut Vec<u8>) -> Result<()> {
        place.pack.read(&place.slot, stored)?;
        if stored_check(stored) == place.slot.entry.check {
            return Ok(());
        }
        let reason = "its stored bytes do not match the footer";
        Err(place.pack.damaged(place.slot.entry, reason))
    }

    /// What is damaged of the stored bytes of a chunk, at the place where a reader looks
    /// first.
    pub fn damage_of(&self, id: ChunkId, hint: Option<Location>) -> Option<Damage> {
        let place = self.places(id, hint).next()?.ok()?;
        match self.read_stored(&place, &mut Scratch::take()) {
            Err(Error::Damaged(damage)) => Some(damage),
            _ => None,
        }
    }

    /// For [`super::first_readable`].
    pub fn fits(&self) -> impl Fn(&Place, &Place, ChunkId) -> bool + '_ {
        |delta, base, base_id| self.decodes_with(delta, base, base_id)
    }

    /// Whether a delta that needs one copy of its base decodes with this one.
    fn decodes_with(&self, delta: &Place, base: &Place, base_id: ChunkId) -> bool {
        let entry = delta.slot.entry;
        let mut stored = Scratch::take();
        let mut out = Scratch::of_len(payload_limit(entry.key.kind, self.page_size));
        let Ok(payload) = self.base_payload(base, base_id) else {
            return false;
        };
        delta.pack.read(&delta.slot, &mut stored).is_ok()
            && codec::decode(&stored, entry.encoding, &payload, &mut out)
                .and_then(|len| payload_id(entry.key.kind, &out[..len], self.page_size))
                .is_some_and(|id| self.keys.in_pack(id, delta.pack.version()) == entry.key)
    }

    /// What decodes from these stored bytes, as the place's entry tells to.
    pub fn id_at(&self, place: &Place, stored: &[u8]) -> Result<ChunkId> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::of_len(payload_limit(kind, self.page_size));
        let seen = Cell::new(None);
        self.decode(
            place,
            stored,
            |found| {
                seen.set(Some(found));
                true
            },
            &mut payload,
        )?;
        Ok(seen.get().expect("what was decoded was seen"))
    }

    /// The same, and `None` unless that is well-formed.
    pub fn id_of_well_formed(&self, place: &Place, stored: &[u8]) -> Result<Option<ChunkId>> {
        let kind = place.slot.entry.key.kind;
        let mut payload = Scratch::of_len(payload_limit(kind, self.page_size));
        let seen = Cell::new(None);
        let see = |found| {
            seen.set(Some(found));
            true
        };
        let len = self.decode(place, stored, see, &mut payload)?;
        let payload = &payload[..len];
        let is_well_formed = match kind {
            ChunkKind::Page => true,
            ChunkKind::Node => node::len_of(payload) == Some(len),
            ChunkKind::Manifest => Manifest::decode(payload, self.page_size).is_ok(),
        };
        Ok(seen.get().filter(|_| is_well_formed))
    }

    /// Decodes what is stored at a place, and asks whether that `is_right`.
    fn decode(
        &self,
        place: &Place,
        stored: &[u8],
        is_right: impl Fn(ChunkId) -> bool,
        out: &mut [u8],
    ) -> Result<usize> {
        let kind = place.slot.entry.key.kind;
        let has_id =
            |payload: &[u8]| payload_id(kind, payload, self.page_size).is_some_and(&is_right);
        self.decode_if(place, stored, has_id, out)
    }

    /// Decodes a page from these stored bytes of a place into `out`, which has the page's
    /// length. Whoever calls this has to check what it became.
    pub(super) fn decode_unchecked(
        &self,
        place: &Place,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<usize> {
        let page_len = self.page_size.len();
        self.decode_if(place, stored, |payload| payload.len() == page_len, out)
    }

    /// Decodes what is stored at a place, and asks whether that payload `is_right`.
    fn decode_if(
        &self,
        place: &Place,
        stored: &[u8],
        is_right: impl Fn(&[u8]) -> bool,
        out: &mut [u8],
    ) -> Result<usize> {
        let entry = place.slot.entry;
        let undecodable = || place.pack.damaged(entry, "it does not decode");
        let decode = |base: &[u8], out: &mut [u8]| {
            let len = codec::decode(stored, entry.encoding, base, out).ok_or_else(undecodable)?;
            if is_right(&out[..len]) {
                return Ok(len);
            }
            Err(place.pack.damaged(entry, "its bytes do not match its id"))
        };
        match entry.encoding.needs() {
            Needs::Nothing => return decode(&[], out),
            Needs::Newer(encoding) => return Err(place.pack.newer(entry, encoding)),
            Needs::Absent => return Err(undecodable()),
            Needs::Base => {}
        }
        let base = base_in(entry, stored).ok_or_else(undecodable)?;
        let mut failure = Failure::default();
        for base_place in self.places(base.id, Some(base.hint)) {
            let read = base_place.and_then(|base_place| {
                let payload = self.base_payload(&base_place, base.id)?;
                let dictionary = match entry.encoding {
                    Encoding::IdDelta => identified(entry.key.kind, &payload),
                    _ => &payload,
                };
                let len = decode(dictionary, out).map_err(|error| {
                    // It may be another copy that is needed.
                    if place.needs_one_copy() {
                        missing(base.id)
                    } else {
                        error
                    }
                })?;
                self.remember(base.id, Some(base.hint), base_place.location());
                Ok(len)
            });
            match read {
                Ok(len) => return Ok(len),
                Err(error) => failure.add(error),
            }
        }
        Err(failure.or_missing(base.id))
    }

    /// Decodes a delta's base without checking it: the delta's own id vouches
    /// for the result.
    fn base_payload(&self, place: &Place, id: ChunkId) -> Result<Scratch> {
        let entry = place.slot.entry;
        if !place.is_standalone() {
            return Err(no_base(place, id));
        }
        let mut stored = Scratch::take();
        place.pack.read(&place.slot, &mut stored)?;
        let mut payload = Scratch::of_len(payload_limit(entry.key.kind, self.page_size));
        let len = codec::decode(&stored, entry.encoding, &[], &mut payload)
            .ok_or_else(|| place.pack.damaged(entry, "it does not decode"))?;
        payload.truncate(len);
        Ok(payload)
    }
}

/// The part of a payload that its id is the hash of.
pub(crate) fn identified(kind: ChunkKind, payload: &[u8]) -> &[u8] {
    match kind {
        ChunkKind::Page => payload,
        ChunkKind::Node => &payload[..node::canonical_len(payload).unwrap_or(payload.len())],
        ChunkKind::Manifest => manifest::canonical(payload),
    }
}

/// What a payload is; `None` if it cannot be a chunk of this kind.
fn payload_id(kind: ChunkKind, payload: &[u8], page_size: PageSize) -> Option<ChunkId> {
    let hashed = match kind {
        ChunkKind::Page => (payload.len() == page_size.len()).then_some(payload.len())?,
        ChunkKind::Node => node::canonical_len(payload)?,
        ChunkKind::Manifest => manifest::canonical(payload).len(),
    };
    Some(kind.hash(&payload[..hashed]))
}
