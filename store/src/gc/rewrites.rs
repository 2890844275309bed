//! How much collections may still write, and what need not be rewritten.
//!
//! > Whatever collections do over a store's life, they write at most twice what
//! > commits wrote.
//!
//! Copying what is live in packs that are mostly dead is always allowed: it frees at
//! least as many bytes as it writes, and a byte dies once. So all that is still to come
//! of it is at most what the store holds. The rest, merging and optimising, is allowed as
//! long as twice what commits wrote is enough for that, for what was written already, and
//! for itself ([`Ledger::allowance`]). (`--keep-percent` above 50 is the user's own choice.)
//!
//! What is written is charged, and its pack known for what it is, before the pack gets
//! its name: a collection that is killed in between has been charged for what is then
//! not there. The other way round its pack would be taken for a commit's. A lost file
//! loses the count: all that is there then counts as written by commits.

use std::collections::BTreeSet;

use crate::error::{Damage, Result};
use crate::format::rewrites::{FORMAT, Known, Rewrites, Tier, decode, encode};
use crate::gc::plan::{GcPlan, PackPlan};
use crate::layout::Layout;
use crate::pack::PackNumber;
use crate::pack::writer::PackWriter;
use crate::sim::{self, Fault};

/// The account of a store's collections. Who has it holds the collect lock.
pub(crate) struct Ledger {
    layout: Layout,
    known: Rewrites,
}

impl Ledger {
    pub fn read(layout: &Layout) -> Result<Self> {
        let path = layout.rewrites();
        let known = match FORMAT.read(&path)? {
            None => Rewrites::default(),
            Some(payload) => decode(&payload).ok_or(Damage::File {
                path,
                reason: "malformed",
            })?,
        };
        Ok(Self {
            layout: layout.clone(),
            known,
        })
    }

    /// Learns which packs there are: those that are not known are commits'.
    pub fn see(&mut self, plan: &GcPlan) {
        let there: BTreeSet<PackNumber> = plan.packs.iter().map(|pack| pack.number).collect();
        self.known.packs.retain(|number, _| there.contains(number));
        for pack in &plan.packs {
            if self.tier(pack).is_none() {
                self.known.committed_bytes += pack.file_bytes;
                let known = Known {
                    identity: pack.identity,
                    tier: Tier::New,
                };
                self.known.packs.insert(pack.number, known);
            }
        }
    }

    /// Whether the pack is as an optimisation leaves it.
    pub fn is_kept(&self, pack: &PackPlan) -> bool {
        self.tier(pack) == Some(Tier::Kept)
    }

    fn tier(&self, pack: &PackPlan) -> Option<Tier> {
        let known = self.known.packs.get(&pack.number)?;
        (known.identity == pack.identity).then_some(known.tier)
    }

    /// How many bytes may be written that free nothing.
    pub fn allowance(&self, plan: &GcPlan) -> u64 {
        let held: u64 = plan.packs.iter().map(|pack| pack.live_bytes).sum();
        let spent = self.known.rewritten_bytes.saturating_add(held);
        self.known
            .committed_bytes
            .saturating_mul(2)
            .saturating_sub(spent)
    }

    /// Charges a pack that is to be sealed next, durably.
    pub fn charge(&mut self, writer: &PackWriter, tier: Tier) -> Result<()> {
        let Some(identity) = writer.identity() else {
            return Ok(());
        };
        self.known.rewritten_bytes += writer.sealed_len_bytes();
        let known = Known { identity, tier };
        self.known.packs.insert(writer.next_location().pack, known);
        match sim::on(Fault::RewriteNotCharged) {
            true => Ok(()),
            false => self.write(),
        }
    }

    /// These packs need not be looked at again, durably.
    pub fn keep(&mut self, packs: &BTreeSet<PackNumber>) -> Result<()> {
        for (number, known) in &mut self.known.packs {
            if packs.contains(number) {
                known.tier = Tier::Kept;
            }
        }
        self.write()
    }

    pub fn committed_bytes(&self) -> u64 {
        self.known.committed_bytes
    }

    pub fn rewritten_bytes(&self) -> u64 {
        self.known.rewritten_bytes
    }

    fn write(&self) -> Result<()> {
        FORMAT.write(&self.layout.rewrites(), &encode(&self.known))
    }
}
