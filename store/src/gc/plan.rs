//! What a collection would do, pack by pack, before it does anything.

use crate::error::Result;
use crate::gc::mark::Marks;
use crate::pack::format::ENTRY_LEN;
use crate::pack::reader::PackReader;
use crate::pack::set::PackSet;
use crate::pack::{Location, PackNumber};

/// What happens to a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// It stays as it is.
    Keep,
    /// What is live in it is copied to a new pack, then it is deleted.
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
}

impl GcPlan {
    /// Decides for each of `numbers`: without live chunks it is deleted, below
    /// `keep_percent` of live bytes it is repacked.
    pub(crate) fn make(
        packs: &PackSet,
        numbers: &[PackNumber],
        live: &Marks,
        keep_percent: u8,
    ) -> Result<Self> {
        let mut plan = Self::default();
        for number in numbers {
            if let Some(pack) = packs.get(*number)? {
                plan.packs.push(plan_pack(&pack, live, keep_percent));
            }
        }
        Ok(plan)
    }

    /// The packs with this decision.
    pub(crate) fn with(&self, decision: Decision) -> impl Iterator<Item = &PackPlan> {
        self.packs
            .iter()
            .filter(move |plan| plan.decision == decision)
    }

    /// How many bytes of packs the plan frees in the end.
    #[must_use]
    pub fn freed_bytes(&self) -> u64 {
        self.packs
            .iter()
            .filter(|plan| plan.decision != Decision::Keep)
            .map(|plan| plan.file_bytes.saturating_sub(plan.live_bytes))
            .sum()
    }
}

fn plan_pack(pack: &PackReader, live: &Marks, keep_percent: u8) -> PackPlan {
    let mut live_chunks = 0;
    let mut live_bytes = 0;
    for (number, entry) in pack.entries() {
        let at = Location {
            pack: pack.number(),
            entry: number,
        };
        if live.has(at) {
            live_chunks += 1;
            live_bytes += (pack.stored_bytes(number, entry).bytes.len() + ENTRY_LEN) as u64;
        }
    }
    let file_bytes = pack.file_len();
    let decision = if live_chunks == 0 {
        Decision::Delete
    } else if live_bytes * 100 < file_bytes * u64::from(keep_percent) {
        Decision::Repack
    } else {
        Decision::Keep
    };
    PackPlan {
        number: pack.number(),
        pack: pack.number().to_string(),
        file_bytes,
        chunks: pack.entry_count() as u64,
        live_chunks,
        live_bytes,
        decision,
    }
}
