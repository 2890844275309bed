//! The collector's state: its epoch, and the packs it has condemned.
//!
//! ```text
//!  8  epoch
//!  4  number of condemned packs; for each: 4 pack number, 8 epoch it was
//!     condemned in
//! ```
//! in a sealed file. Numbers are little-endian.

use crate::format::sealed_file::Format;
use crate::gc::state::{CollectorState, Epoch};
use crate::pack::PackNumber;

pub(crate) const FORMAT: Format = Format {
    magic: *b"SNAPGCST",
    version: 1,
};

pub(crate) fn encode(state: &CollectorState) -> Vec<u8> {
    let mut payload = state.epoch.to_bytes().to_vec();
    let count = u32::try_from(state.condemned.len()).expect("packs are counted in 32 bits");
    payload.extend_from_slice(&count.to_le_bytes());
    for (pack, epoch) in &state.condemned {
        payload.extend_from_slice(&pack.0.to_le_bytes());
        payload.extend_from_slice(&epoch.to_bytes());
    }
    payload
}

pub(crate) fn decode(payload: &[u8]) -> Option<CollectorState> {
    let (epoch, rest) = payload.split_first_chunk::<8>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let entries = rest.chunks_exact(12);
    if usize::try_from(u32::from_le_bytes(*count)).ok()? != entries.len()
        || !entries.remainder().is_empty()
    {
        return None;
    }
    let condemned: Vec<(PackNumber, Epoch)> = entries
        .map(|entry| {
            let (pack, epoch) = entry.split_first_chunk::<4>()?;
            let pack = PackNumber(u32::from_le_bytes(*pack));
            Some((pack, Epoch::from_bytes(epoch.try_into().ok()?)))
        })
        .collect::<Option<_>>()?;
    let epoch = Epoch::from_bytes(*epoch);
    let in_order = condemned.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let in_time = condemned.iter().all(|(_, condemned)| *condemned <= epoch);
    // There is an epoch after it.
    if !in_order || !in_time || epoch.is_last() {
        return None;
    }
    Some(CollectorState {
        epoch,
        condemned: condemned.into_iter().collect(),
    })
}
