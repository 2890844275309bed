//! The collector's durable state: an epoch, and the packs it has condemned.
//!
//! A missing file is epoch 1 with nothing condemned: losing it delays deletion and
//! loses nothing.

use std::collections::BTreeMap;

use crate::error::{Damage, Result};
pub(crate) use crate::format::collector::{CollectorState, Condemned, Epoch};
use crate::format::collector::{VERSION_2, decode, write};
use crate::format::config::StoreFormat;
use crate::layout::Layout;

impl CollectorState {
    /// The state of a store that was never collected.
    pub fn new() -> Self {
        Self {
            epoch: Epoch::FIRST.next(),
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
