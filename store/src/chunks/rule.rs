//! The rule for "readable", and why nothing was.

use std::sync::Arc;

use crate::error::{Damage, Error, Result};
use crate::id::{ChunkId, ChunkKind};
use crate::pack::Location;
use crate::pack::codec::{Encoding, Needs};
use crate::pack::reader::{BaseRef, PackReader, Slot};

/// One place where a chunk is stored.
#[derive(Clone)]
pub(crate) struct Place {
    pub pack: Arc<PackReader>,
    pub slot: Slot,
}

impl Place {
    pub fn location(&self) -> Location {
        Location {
            pack: self.pack.number(),
            entry: self.slot.number,
        }
    }

    /// Whether it is a delta that needs one copy of its base, whatever has the
    /// same id: an older version made such deltas of nodes.
    pub fn needs_one_copy(&self) -> bool {
        let entry = self.slot.entry;
        entry.encoding == Encoding::Delta && entry.key.kind == ChunkKind::Node
    }

    /// Whether what is damaged is the chunk here, and not another one.
    pub fn is_told_by(&self, damage: &Damage) -> bool {
        let Error::Damaged(here) = self.pack.damaged(self.slot.entry, "") else {
            return false;
        };
        match (here, damage) {
            (
                Damage::Chunk {
                    path, offset_bytes, ..
                },
                Damage::Chunk {
                    path: other,
                    offset_bytes: there,
                    ..
                },
            ) => path == *other && offset_bytes == *there,
            (Damage::Chunk { path, .. }, Damage::Pack { path: other, .. }) => path == *other,
            _ => false,
        }
    }

    /// Whether the chunk decodes here without another one.
    pub fn is_standalone(&self) -> bool {
        self.slot.entry.encoding.is_standalone()
    }
}

/// A place that counts, and that of the base if the chunk is a delta there.
pub(crate) struct Readable {
    pub place: Place,
    pub base: Option<Place>,
}

/// The first of `places` that counts. `fits` tells whether a delta that needs one copy of
/// its base decodes with this one.
pub(crate) fn first_readable<P, B>(
    fits: impl Fn(&Place, &Place, ChunkId) -> bool,
    places: P,
    id: ChunkId,
    bases: impl Fn(BaseRef) -> B,
) -> Result<Readable>
where
    P: Iterator<Item = Result<Place>>,
    B: Iterator<Item = Result<Place>>,
{
    let mut failure = Failure::default();
    for place in places {
        let found = place.and_then(|place| match place.slot.entry.encoding.needs() {
            Needs::Nothing => Ok(Readable { place, base: None }),
            Needs::Newer(encoding) => Err(place.pack.newer(place.slot.entry, encoding)),
            Needs::Absent => Err(missing(id)),
            Needs::Base => {
                let base = place.pack.base(&place.slot)?;
                let base = base.ok_or_else(|| {
                    place
                        .pack
                        .damaged(place.slot.entry, "its footer entry is damaged")
                })?;
                let base_id = base.id;
                let fitting = bases(base).filter(|candidate| match candidate {
                    Ok(candidate) if place.needs_one_copy() => fits(&place, candidate, base_id),
                    _ => true,
                });
                let base = first_standalone(fitting, base_id)?;
                Ok(Readable {
                    place,
                    base: Some(base),
                })
            }
        });
        match found {
            Ok(found) => return Ok(found),
            Err(error) => failure.add(error),
        }
    }
    Err(failure.or_missing(id))
}

/// The first of `places` where the chunk is stored standalone.
fn first_standalone(places: impl Iterator<Item = Result<Place>>, id: ChunkId) -> Result<Place> {
    let mut failure = Failure::default();
    for place in places {
        match place {
            Ok(place) if place.is_standalone() => return Ok(place),
            Ok(place) => failure.add(no_base(&place, id)),
            Err(error) => failure.add(error),
        }
    }
    Err(failure.or_missing(id))
}

/// Why a place that is not standalone cannot be a base: a delta there is as good
/// as nothing.
pub(super) fn no_base(place: &Place, id: ChunkId) -> Error {
    match place.slot.entry.encoding {
        Encoding::Unknown(encoding) => place.pack.newer(place.slot.entry, encoding),
        _ => missing(id),
    }
}

/// Why no place has served: damage only if nothing else stood in the way.
#[derive(Default)]
pub(super) struct Failure(Option<Error>);

impl Failure {
    pub(super) fn add(&mut self, error: Error) {
        let replaces = match &self.0 {
            None => true,
            Some(first) => first.is_damage() && !error.is_damage(),
        };
        if replaces {
            self.0 = Some(error);
        }
    }

    pub(super) fn or_missing(self, id: ChunkId) -> Error {
        self.0.unwrap_or_else(|| missing(id))
    }
}

pub(crate) fn missing(id: ChunkId) -> Error {
    Damage::Missing {
        chunk: id.to_string(),
    }
    .into()
}
