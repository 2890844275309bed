//! The collector's durable state: an epoch, and the packs it has condemned.
//!
//! A missing file is epoch 1 with nothing condemned: losing it delays deletion and
//! loses nothing.

use std::collections::BTreeMap;

use crate::error::{Damage, Result};
use crate::format::collector::{FORMAT, decode, encode};
use crate::layout::Layout;
use crate::pack::PackNumber;

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
        FORMAT.write(&layout.collector(), &encode(self))
    }
}
