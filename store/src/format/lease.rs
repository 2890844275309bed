//! What a lease's file says.
//!
//! ```text
//!    1  1 for a writer, 0 for a viewer
//!    8  the writer's epoch
//!  32k  ids of pinned snapshots
//! ```
//! in a sealed file.

use crate::format::sealed_file::Format;
use crate::gc::state::Epoch;
use crate::id::SnapshotId;
use crate::lease::Claim;

pub(crate) const FORMAT: Format = Format {
    magic: *b"SNAPLEAS",
    version: 1,
};

pub(crate) fn encode(claim: &Claim) -> Vec<u8> {
    let mut bytes = vec![u8::from(claim.writing_since.is_some())];
    bytes.extend_from_slice(&claim.writing_since.unwrap_or(Epoch::FIRST).to_bytes());
    claim
        .pins
        .iter()
        .for_each(|id| bytes.extend_from_slice(id.as_bytes()));
    bytes
}

pub(crate) fn decode(payload: &[u8]) -> Option<Claim> {
    let (writing, rest) = payload.split_first()?;
    let (epoch, pins) = rest.split_first_chunk::<8>()?;
    let pins = pins.chunks_exact(32);
    if !pins.remainder().is_empty() {
        return None;
    }
    Some(Claim {
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
