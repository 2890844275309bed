//! The collector's durable state: an epoch, and the packs it has condemned.
//!
//! A missing file is epoch 1 with nothing condemned: losing it delays deletion and
//! loses nothing.

use std::collections::BTreeMap;

use crate::error::{Damage, Result};
use crate::format::collector::{VERSION_2, decode, write};
use crate::format::config::StoreFormat;
use crate::layout::Layout;
use crate::pack::{PackIdentity, PackNumber};

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
        let Some((version, payload)) = VERSION_2.read_versioned(&path)? else {
            return Ok(Self::new());
        };
        decode(version, &payload).ok_or_else(|| {
            Damage::File {
                path,
                reason: "malformed",
            }
            .into()
        })
    }

    /// Replaces the state, durably. The caller holds the publish lock.
    pub fn write(&self, layout: &Layout, format: StoreFormat) -> Result<()> {
        write(&layout.collector(), self, format)
    }
}
