//! What a lease's file says.
//!
//! ```text
//!    1  1 for a writer, 0 for a viewer
//!    8  the writer's epoch
//!  32k  ids of pinned snapshots
//! ```
//! in a sealed file.

use crate::format::collector::Epoch;
use crate::format::sealed_file::Format;
use crate::id::SnapshotId;

/// What the holder of a lease needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct LeaseTerms {
    /// A writer's epoch; `None` for one who only reads.
    pub writing_since: Option<Epoch>,
    /// Snapshots that are roots while the lease lives.
    pub pins: Vec<SnapshotId>,
}

impl LeaseTerms {
    /// Blocks every deletion.
    pub const EVERYTHING: Self = Self {
        writing_since: Some(Epoch::FIRST),
        pins: Vec::new(),
    };

    pub fn viewer(pins: Vec<SnapshotId>) -> Self {
        Self {
            writing_since: None,
            pins,
        }
    }
}

pub(crate) const FORMAT: Format = Format {
    magic: *b"SNAPLEAS",
    version: 1,
};

pub(crate) fn encode(claim: &LeaseTerms) -> Vec<u8> {
    let mut bytes = vec![u8::from(claim.writing_since.is_some())];
    bytes.extend_from_slice(&claim.writing_since.unwrap_or(Epoch::FIRST).to_bytes());
    claim
        .pins
        .iter()
        .for_each(|id| bytes.extend_from_slice(id.as_bytes()));
    bytes
}

pub(crate) fn decode(payload: &[u8]) -> Option<LeaseTerms> {
    let (writing, rest) = payload.split_first()?;
    let (epoch, pins) = rest.split_first_chunk::<8>()?;
    let pins = pins.chunks_exact(32);
    if !pins.remainder().is_empty() {
        return None;
    }
    Some(LeaseTerms {
        writing_since: match writing {
            0 => None,
            1 => Some(Epoch::from_bytes(*epoch)),
            _ => return None,
        },
        pins: pins
            .map(|id| SnapshotId::from_bytes(id.try_into().expect("chunks of 32 bytes")))
            .collect(),
    })
}
