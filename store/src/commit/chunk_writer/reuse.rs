//! What is stored already, and what of it a commit may rely on.

use std::sync::{Arc, PoisonError};

use super::ChunkWriter;
use super::notes::{MAX_NOTES, Notes};
use crate::chunks::Place;
use crate::error::{Error, Result};
use crate::format::node::{Child, Node};
use crate::id::{ChunkId, ChunkKey};
use crate::pack::codec::Encoding;
use crate::pack::reader::{BaseRef, PackReader};
use crate::pack::{Location, PackNumber};
use crate::sim::{self, Fault};

impl ChunkWriter<'_> {
    /// Where each of these chunks is stored, for those a new snapshot may use.
    pub fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>> {
        let names = self.chunks().keys();
        let mut order: Vec<(ChunkKey, usize)> = (ids.iter().zip(0..))
            .map(|(id, position)| (names.of(*id), position))
            .collect();
        // Neighbours in the index are looked up one after the other.
        order.sort_unstable();
        let keys: Vec<ChunkKey> = order.iter().map(|(key, _)| *key).collect();
        let mut known = vec![None; ids.len()];
        for ((_, position), at) in order.into_iter().zip(self.index.get_many(&keys)?) {
            let id = ids[position];
            known[position] = match at {
                Some(at) if sim::on(Fault::PackNotLookedFor) => Some(at),
                Some(at) => self.usable(id, at)?.map(|place| place.location()),
                None => None,
            };
            if known[position].is_none() && names.is_upgrading() {
                known[position] = self.known_as_before(id)?;
            }
        }
        Ok(known)
    }

    /// Where a chunk is that this commit has claimed a place for, also if its pack was finished
    /// meanwhile.
    pub fn place_of(&self, id: ChunkId) -> Result<Location> {
        if let Some(at) = self.claimed(id) {
            return Ok(at);
        }
        let at = self.known(&[id])?[0];
        at.ok_or_else(|| Error::Overtaken {
            path: self.store.layout.packs(),
        })
    }

    /// Where a pack of format 1 has the chunk.
    fn known_as_before(&self, id: ChunkId) -> Result<Option<Location>> {
        match self.index.get(id.plain_key())? {
            Some(at) => Ok(self.usable(id, at)?.map(|place| place.location())),
            None => Ok(None),
        }
    }

    /// Where this leaf is stored, if it and all its pages may be used as they are.
    pub fn known_leaf(&self, id: ChunkId) -> Result<Option<Child>> {
        let Some((child, leaf)) = self.read_leaf(id)? else {
            return Ok(None);
        };
        let in_place = sim::on(Fault::StaleLeafTrusted) || self.pages_in_place(&leaf)?;
        Ok(in_place.then_some(child))
    }

    /// A leaf that may be used, with where it is; `None` if there is none, or it is lost:
    /// nothing new is built on what is damaged.
    fn read_leaf(&self, id: ChunkId) -> Result<Option<(Child, Arc<Node>)>> {
        let Some(at) = self.known(&[id])?[0] else {
            return Ok(None);
        };
        let child = Child {
            hash: *id.as_bytes(),
            hint: Some(at),
        };
        match self.chunks().node(child, 0) {
            Err(error) if error.is_lost() => Ok(None),
            leaf => Ok(Some((child, leaf?))),
        }
    }

    /// Whether this leaf and all its pages may be used, wherever they are.
    pub fn has_leaf(&self, id: ChunkId) -> Result<bool> {
        let Some((_, leaf)) = self.read_leaf(id)? else {
            return Ok(false);
        };
        let mut elsewhere = Vec::new();
        for (_, page) in leaf.present() {
            let id = leaf.child_id(page);
            if !self.in_place(id, page.hint)? {
                elsewhere.push(id);
            }
        }
        Ok(self.known(&elsewhere)?.iter().all(Option::is_some))
    }

    /// Whether the pages of a leaf are where its hints say. A leaf can outlive
    /// its pages: when no snapshot refers to it, or when repair has set a damaged
    /// pack aside.
    pub fn pages_in_place(&self, leaf: &Node) -> Result<bool> {
        for (_, page) in leaf.present() {
            if !self.in_place(leaf.child_id(page), page.hint)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a hint leads to a chunk that a new snapshot may use.
    pub fn in_place(&self, id: ChunkId, hint: Option<Location>) -> Result<bool> {
        match hint {
            Some(at) => Ok(self.usable(id, at)?.is_some()),
            None => Ok(false),
        }
    }

    /// The standalone chunk that a delta against `id` may be made from, if there
    /// is one: the chunk itself, or its base. Reads its payload into `out`; tells how long that is, and
    /// how long where it is stored.
    ///
    /// It is where the index leads: the invariant of bases (`placement`).
    pub(super) fn base_for(
        &self,
        id: ChunkId,
        hint: Option<Location>,
        out: &mut [u8],
    ) -> Result<Option<(BaseRef, usize, usize)>> {
        let base = match self.chunks().base_id(id, hint) {
            // Nothing new is built on what is damaged.
            Err(error) if error.is_lost() => return Ok(None),
            other => other?,
        };
        let indexed: Vec<Location> = if sim::bases_by_id() {
            let found = self.chunks().readable(id, hint)?;
            vec![found.base.unwrap_or(found.place).location()]
        } else {
            let indexed = self.chunks().indexed(&*self.index, base);
            indexed.collect::<Result<_>>()?
        };
        for at in indexed {
            let place = self.usable(base, at)?;
            let Some(place) = place.filter(Place::is_standalone) else {
                continue;
            };
            match self.chunks().read_at(&place, base, out) {
                Err(Error::Damaged(_)) => {}
                read => {
                    let stored_len = usize::try_from(place.slot.stored_len()).unwrap_or(usize::MAX);
                    let base = BaseRef { id: base, hint: at };
                    return Ok(Some((base, read?, stored_len)));
                }
            }
        }
        Ok(None)
    }

    /// The chunk at a place, if a new snapshot may rely on it being there.
    fn usable(&self, id: ChunkId, at: Location) -> Result<Option<Place>> {
        let Some(place) = self.sound_place(id, at)? else {
            return Ok(None);
        };
        let looks_for_base = !sim::on(Fault::DeadDeltaTrusted);
        // Which copy of its base such a delta needs is not looked into.
        if place.needs_one_copy() {
            return Ok(None);
        }
        if looks_for_base && place.slot.entry.encoding.is_delta() {
            let base = match place.pack.base(&place.slot) {
                Ok(Some(base)) => base,
                Ok(None) | Err(Error::Damaged(_)) => return Ok(None),
                Err(other) => return Err(other),
            };
            let standalone = |at| {
                let place = self.sound_place(base.id, at)?;
                Ok::<_, Error>(place.filter(Place::is_standalone))
            };
            let mut found = standalone(base.hint)?;
            if found.is_none() {
                for at in self.chunks().indexed(&*self.index, base.id) {
                    found = standalone(at?)?;
                    if found.is_some() {
                        break;
                    }
                }
            }
            let Some(found) = found else {
                return Ok(None);
            };
            self.rely_on(&found.pack);
        }
        self.rely_on(&place.pack);
        Ok(Some(place))
    }

    /// The chunk at a place, if its pack may be used and its footer is whole.
    fn sound_place(&self, id: ChunkId, at: Location) -> Result<Option<Place>> {
        let condemned = self.condemned.get(&at.pack);
        let going = |pack: &PackReader| condemned.is_some_and(|it| it.is(pack.identity()));
        let found = self.chunks().at_id(id, at).and_then(|place| match place {
            Some(place) if going(&place.pack) && !sim::on(Fault::CondemnedReused) => Ok(None),
            Some(place) if place.pack.is_sound()? => Ok(Some(place)),
            Some(_) => {
                self.distrust(at.pack);
                Ok(None)
            }
            None => Ok(None),
        });
        match found {
            Err(error) if error.is_lost() => {
                self.distrust(at.pack);
                Ok(None)
            }
            Ok(Some(place)) if matches!(place.slot.entry.encoding, Encoding::Unknown(_)) => {
                Ok(None)
            }
            other => other,
        }
    }

    /// Notes a pack that holds what this commit could use, and is damaged.
    fn distrust(&self, pack: PackNumber) {
        let known = self.notes.read().unwrap_or_else(PoisonError::into_inner);
        if known.packs.contains(&pack) || known.packs.len() >= MAX_NOTES {
            return;
        }
        drop(known);
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        notes.packs.insert(pack);
    }

    /// Notes what could not be read and is not needed.
    pub fn note(&self, error: Error) {
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        let message = error.to_string();
        let known = notes
            .errors
            .iter()
            .any(|other| other.to_string() == message);
        if !known && notes.errors.len() < MAX_NOTES {
            notes.errors.push(error);
        }
    }

    /// What was noted.
    pub fn take_notes(&self) -> Vec<Error> {
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        let Notes { packs, mut errors } = std::mem::take(&mut *notes);
        for number in packs {
            let pack = self.chunks().packs().get(number);
            match pack.and_then(|pack| pack.map_or(Ok(Vec::new()), |pack| pack.problems())) {
                Ok(problems) => errors.extend(problems.into_iter().map(Error::from)),
                Err(error) => errors.push(error),
            }
        }
        errors.truncate(MAX_NOTES);
        errors
    }

    pub(super) fn rely_on(&self, pack: &PackReader) {
        let relied = self.relied.read().unwrap_or_else(PoisonError::into_inner);
        if relied.contains_key(&pack.number()) {
            return;
        }
        drop(relied);
        let mut relied = self.relied.write().unwrap_or_else(PoisonError::into_inner);
        relied.insert(pack.number(), pack.stamp());
    }
}
