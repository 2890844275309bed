//! The collector's durable state: an epoch, and the packs it has condemned.
//!
//! ```text
//!  8  epoch
//!  4  number of condemned packs; for each: 4 pack number, 8 epoch it was
//!     condemned in
//! ```
//! in a sealed file. Numbers are little-endian. A missing file is epoch 1 with
//! nothing condemned: losing it delays deletion and loses nothing.

use std::collections::BTreeMap;

use crate::error::{Damage, Result};
use crate::layout::Layout;
use crate::pack::PackNumber;
use crate::sealed_file::Format;

const FORMAT: Format = Format {
    magic: *b"SNAPGCST",
    version: 1,
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

    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// See the module's documentation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CollectorState {
    pub epoch: Epoch,
    pub condemned: BTreeMap<PackNumber, Epoch>,
}

impl CollectorState {
    /// The state of a store that was never collected.
    pub fn new() -> Self {
        Self {
            epoch: Epoch(1),
            condemned: BTreeMap::new(),
        }
    }

    pub fn read(layout: &Layout) -> Result<Self> {
        let path = layout.collector();
        let Some(payload) = FORMAT.read(&path)? else {
            return Ok(Self::new());
        };
        decode(&payload).ok_or_else(|| {
            Damage::File {
                path,
                reason: "malformed",
            }
            .into()
        })
    }

    /// Replaces the state, durably. The caller holds the publish lock.
    pub fn write(&self, layout: &Layout) -> Result<()> {
        let mut payload = self.epoch.to_bytes().to_vec();
        let count = u32::try_from(self.condemned.len()).expect("packs are counted in 32 bits");
        payload.extend_from_slice(&count.to_le_bytes());
        for (pack, epoch) in &self.condemned {
            payload.extend_from_slice(&pack.0.to_le_bytes());
            payload.extend_from_slice(&epoch.to_bytes());
        }
        FORMAT.write(&layout.collector(), &payload)
    }
}

fn decode(payload: &[u8]) -> Option<CollectorState> {
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
    // There is one after it.
    if !in_order || !in_time || epoch == Epoch(u64::MAX) {
        return None;
    }
    Some(CollectorState {
        epoch,
        condemned: condemned.into_iter().collect(),
    })
}
