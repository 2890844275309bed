//! What a collection would do, pack by pack, before it does anything.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use crate::error::{Damage, Error, Result};
use crate::format::entry::ENTRY_LEN;
use crate::gc::mark::Marks;
use crate::pack::reader::PackReader;
use crate::pack::set::PackSet;
use crate::pack::{Location, PackIdentity, PackNumber};

/// Packs of this size and more are not merged.
const MERGE_BELOW_BYTES: u64 = 32 << 20;
/// A size class spans a factor of eight.
const CLASS_BITS: u32 = 3;
/// How many packs of a class are merged.
const MERGE_PACKS: usize = 24;

/// What happens to a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It stays as it is.
    Keep,
    /// What is live in it is copied to a new pack, then it is deleted: mostly it
    /// is dead, or it is one of many small packs.
    Repack,
    /// Nothing in it is live: it is deleted.
    Delete,
}

/// The plan for one pack.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PackPlan {
    /// The pack's number.
    #[serde(skip)]
    pub(crate) number: PackNumber,
    /// What tells it from another one of its number.
    #[serde(skip)]
    pub(crate) identity: PackIdentity,
    /// Whether its chunks may be copied to another pack.
    #[serde(skip)]
    pub(crate) mergeable: bool,
    /// The pack's file name, without its extension.
    pub pack: String,
    /// The length of its file.
    pub file_bytes: u64,
    /// How many chunks it holds.
    pub chunks: u64,
    /// How many of them a snapshot needs.
    pub live_chunks: u64,
    /// How many bytes those take, footer entries included.
    pub live_bytes: u64,
    /// What happens to it.
    pub decision: Decision,
}

/// The plan of a collection.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct GcPlan {
    /// One line per pack that was sealed when the collection began.
    pub packs: Vec<PackPlan>,
    /// Packs that cannot be opened. No reader finds anything in them, and they stay.
    pub damaged: Vec<Damage>,
    /// The files of packs that this process may not read. They stay.
    pub denied: Vec<PathBuf>,
}

impl GcPlan {
    /// Decides for each of `numbers`: without live chunks it is deleted, below
    /// `keep_percent` of live bytes it is repacked. A pack that holds what only a newer
    /// version can read is kept.
    pub(crate) fn make(
        packs: &PackSet,
        numbers: &[PackNumber],
        live: &Marks,
        keep_percent: u8,
    ) -> Result<Self> {
        let mut plan = Self::default();
        for number in numbers {
            match packs.get(*number) {
                Ok(Some(pack)) => plan.packs.push(plan_pack(&pack, live, keep_percent)?),
                Ok(None) => {}
                Err(Error::Damaged(damage)) => plan.damaged.push(damage),
                Err(Error::Denied { path }) => plan.denied.push(path),
                Err(other) => return Err(other),
            }
        }
        Ok(plan)
    }

    /// Keeps the packs that were to be deleted and have got live chunks since, and
    /// those of which something must not be moved.
    pub(crate) fn spare_marked(&mut self, live: &Marks, exact: &HashSet<PackNumber>) {
        for pack in &mut self.packs {
            let revived = pack.decision == Decision::Delete && live.has_any(pack.number);
            if revived || exact.contains(&pack.number) {
                pack.decision = Decision::Keep;
            }
        }
    }

    /// The packs with this decision.
    pub(crate) fn with(&self, decision: Decision) -> impl Iterator<Item = &PackPlan> {
        self.packs
            .iter()
            .filter(move |plan| plan.decision == decision)
    }

    /// The packs that do not stay.
    pub(crate) fn going(&self) -> impl Iterator<Item = &PackPlan> {
        self.packs
            .iter()
            .filter(|plan| plan.decision != Decision::Keep)
    }

    /// How many bytes of packs the plan frees in the end.
    #[must_use]
    pub fn freed_bytes(&self) -> u64 {
        self.going()
            .map(|plan| plan.file_bytes.saturating_sub(plan.live_bytes))
            .sum()
    }

    /// Every commit makes a pack, so very many tiny commits would make very many
    /// files. Packs of one size class are merged once there are enough of them;
    /// the merged pack belongs to a higher class. So a byte is rewritten at most
    /// once a class, and no more than `allowance` bytes are rewritten now. The smallest
    /// come first: of them there are most.
    pub(crate) fn merge_small(&mut self, mut allowance: u64) {
        let mut classes: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (position, pack) in self.packs.iter().enumerate() {
            if pack.decision == Decision::Keep
                && pack.mergeable
                && pack.file_bytes < MERGE_BELOW_BYTES
            {
                let class = pack.file_bytes.max(1).ilog2() / CLASS_BITS;
                classes.entry(class).or_default().push(position);
            }
        }
        for members in classes.into_values() {
            let bytes: u64 = members.iter().map(|at| self.packs[*at].live_bytes).sum();
            if members.len() >= MERGE_PACKS && bytes <= allowance {
                allowance -= bytes;
                for position in members {
                    self.packs[position].decision = Decision::Repack;
                }
            }
        }
    }
}

fn plan_pack(pack: &PackReader, live: &Marks, keep_percent: u8) -> Result<PackPlan> {
    // What is deleted is decided by the footer alone: it has to be whole.
    pack.check_if_one()?;
    let mut live_chunks = 0;
    let mut live_bytes = 0;
    let mut is_whole = true;
    let mut scan = pack.scan();
    for slot in scan.by_ref() {
        let slot = match slot {
            // Nothing that is known to be needed is under it, and nothing is known of
            // what is: that the pack can be done without, least of all.
            Err(Error::Damaged(_)) => {
                is_whole = false;
                continue;
            }
            other => other?,
        };
        let at = Location {
            pack: pack.number(),
            entry: slot.number,
        };
        if live.has(at) {
            live_chunks += 1;
            live_bytes += slot.stored_len() + ENTRY_LEN as u64;
        }
    }
    let file_bytes = pack.file_len();
    let movable = is_whole && !scan.has_unknown();
    let decision = if !movable {
        Decision::Keep
    } else if live_chunks == 0 {
        Decision::Delete
    } else if live_chunks < u64::from(pack.entry_count())
        && live_bytes * 100 < file_bytes * u64::from(keep_percent)
    {
        // Were it live as a whole, what is written anew would be what there is: the rest
        // of a small pack's file is header and seals.
        Decision::Repack
    } else {
        Decision::Keep
    };
    Ok(PackPlan {
        number: pack.number(),
        identity: pack.identity(),
        mergeable: movable,
        pack: pack.number().to_string(),
        file_bytes,
        chunks: u64::from(pack.entry_count()),
        live_chunks,
        live_bytes,
        decision,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(number: u32, file_bytes: u64) -> PackPlan {
        PackPlan {
            number: PackNumber(number),
            identity: PackIdentity([0; 16]),
            mergeable: true,
            pack: number.to_string(),
            file_bytes,
            chunks: 1,
            live_chunks: 1,
            live_bytes: file_bytes,
            decision: Decision::Keep,
        }
    }

    fn decisions(mut plan: GcPlan) -> Vec<Decision> {
        plan.merge_small(u64::MAX);
        plan.packs.iter().map(|pack| pack.decision).collect()
    }

    #[test]
    fn no_more_is_merged_than_is_allowed_and_the_smallest_first() {
        let packs = |bytes| (0..MERGE_PACKS as u32).map(move |n| pack(n, bytes));
        let mut plan = GcPlan {
            packs: packs(5000).chain(packs(500_000)).collect(),
            ..GcPlan::default()
        };
        plan.merge_small(MERGE_PACKS as u64 * 500_000);
        let merged = plan.with(Decision::Repack).map(|pack| pack.file_bytes);
        assert!(merged.eq([5000; MERGE_PACKS]));
    }

    #[test]
    fn many_packs_of_a_size_are_merged_and_few_or_large_ones_are_not() {
        let few = (0..MERGE_PACKS as u32 - 1).map(|n| pack(n, 5000)).collect();
        assert!(
            decisions(GcPlan {
                packs: few,
                ..GcPlan::default()
            })
            .iter()
            .all(|it| *it == Decision::Keep)
        );
        let many = (0..MERGE_PACKS as u32)
            .map(|n| pack(n, 5000 + u64::from(n)))
            .collect();
        assert!(
            decisions(GcPlan {
                packs: many,
                ..GcPlan::default()
            })
            .iter()
            .all(|it| *it == Decision::Repack)
        );
        let large = (0..100).map(|n| pack(n, MERGE_BELOW_BYTES)).collect();
        assert!(
            decisions(GcPlan {
                packs: large,
                ..GcPlan::default()
            })
            .iter()
            .all(|it| *it == Decision::Keep)
        );
    }
}
