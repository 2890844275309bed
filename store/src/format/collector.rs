//! The collector's state: its epoch, and the packs it has condemned.
//!
//! ```text
//!  8  epoch
//!  4  number of condemned packs; for each, ascending:
//!       4  pack number
//!      16  the pack's identity; not in version 1
//!       8  epoch it was condemned in
//! ```
//! in a sealed file. Numbers are little-endian. Stores of format 1 have version 1.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::format::config::StoreFormat;
use crate::format::sealed_file::Format;
use crate::pack::{PackIdentity, PackNumber};

const MAGIC: [u8; 8] = *b"SNAPGCST";
const VERSION_1: Format = Format {
    magic: MAGIC,
    version: 1,
};
pub(crate) const VERSION_2: Format = Format {
    magic: MAGIC,
    version: 2,
};

/// Counts collections. A writer's lease carries the epoch it began in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Epoch(u64);

impl Epoch {
    /// Before every collection: a lease at this epoch blocks all deletion.
    pub const FIRST: Self = Self(0);

    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }

    /// Whether there is none after it.
    pub fn is_last(self) -> bool {
        self.0 == u64::MAX
    }

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The collector's durable state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CollectorState {
    pub epoch: Epoch,
    pub condemned: BTreeMap<PackNumber, Condemned>,
}

/// A pack that is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Condemned {
    /// The epoch in which it was condemned.
    pub epoch: Epoch,
    /// Which pack was meant: another one may have its number by now. Not known in
    /// stores of format 1.
    pub identity: Option<PackIdentity>,
}

impl Condemned {
    /// Whether the pack of this identity is meant.
    pub fn is(&self, identity: PackIdentity) -> bool {
        self.identity.is_none_or(|condemned| condemned == identity)
    }
}

/// Replaces the file in a store of this format.
pub(crate) fn write(path: &Path, state: &CollectorState, format: StoreFormat) -> Result<()> {
    let version = match format {
        StoreFormat::One => VERSION_1,
        StoreFormat::Two => VERSION_2,
    };
    version.write(path, &encode(state, format))
}

fn encode(state: &CollectorState, format: StoreFormat) -> Vec<u8> {
    let mut payload = state.epoch.to_bytes().to_vec();
    // Who does not know which pack was meant has condemned none: it is condemned
    // again.
    let known = |condemned: &Condemned| format == StoreFormat::One || condemned.identity.is_some();
    let condemned = state.condemned.iter().filter(|(_, it)| known(it));
    let count = u32::try_from(condemned.clone().count()).expect("packs are counted in 32 bits");
    payload.extend_from_slice(&count.to_le_bytes());
    for (pack, condemned) in condemned {
        payload.extend_from_slice(&pack.0.to_le_bytes());
        if let (StoreFormat::Two, Some(identity)) = (format, condemned.identity) {
            payload.extend_from_slice(&identity.0);
        }
        payload.extend_from_slice(&condemned.epoch.to_bytes());
    }
    payload
}

/// The state in the payload of a file of this version.
pub(crate) fn decode(version: u32, payload: &[u8]) -> Option<CollectorState> {
    let (epoch, rest) = payload.split_first_chunk::<8>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let entries = rest.chunks_exact(if version == 1 { 12 } else { 28 });
    if usize::try_from(u32::from_le_bytes(*count)).ok()? != entries.len()
        || !entries.remainder().is_empty()
    {
        return None;
    }
    let condemned: Vec<(PackNumber, Condemned)> = entries
        .map(|entry| {
            let (pack, rest) = entry.split_first_chunk::<4>()?;
            let (rest, epoch) = rest.split_last_chunk::<8>()?;
            let identity = rest.try_into().ok().map(PackIdentity);
            let epoch = Epoch::from_bytes(*epoch);
            Some((
                PackNumber(u32::from_le_bytes(*pack)),
                Condemned { epoch, identity },
            ))
        })
        .collect::<Option<_>>()?;
    let epoch = Epoch::from_bytes(*epoch);
    let in_order = condemned.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let in_time = condemned.iter().all(|(_, it)| it.epoch <= epoch);
    // There is an epoch after it.
    if !in_order || !in_time || epoch.is_last() {
        return None;
    }
    Some(CollectorState {
        epoch,
        condemned: condemned.into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_read_back() {
        let mut state = CollectorState::new();
        let mut condemned = Condemned {
            epoch: Epoch::FIRST.next(),
            identity: Some(PackIdentity([7; 16])),
        };
        state.condemned.insert(PackNumber(3), condemned);
        let two = encode(&state, StoreFormat::Two);
        assert_eq!(decode(2, &two), Some(state.clone()));
        assert_eq!(decode(1, &two), None);
        let one = encode(&state, StoreFormat::One);
        condemned.identity = None;
        state.condemned.insert(PackNumber(3), condemned);
        assert_eq!(decode(1, &one), Some(state.clone()));
        assert_eq!(decode(2, &one), None);
        let none = decode(2, &encode(&state, StoreFormat::Two)).unwrap();
        assert!(none.condemned.is_empty());
    }
}
