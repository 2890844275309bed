//! All that a snapshot needs, brought leaf by leaf while there is nothing else to do, until
//! it is here or the cache is full.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::head::decode_leaf;
use crate::lazy::blocks::{AHEAD_BLOCKS, Blocks, Brought, Read};
use crate::lazy::cache::{BLOCK_BYTES, blocks_of};
use crate::lazy::counts::Cause;
use crate::lazy::places::Places;

/// What a step came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// There is more to do.
    More,
    /// The bucket does not answer.
    Unanswered,
    /// All is here that has room.
    Done,
}

/// What is still to be brought.
#[derive(Debug)]
pub struct Fill {
    places: Arc<Places>,
    leaves: VecDeque<[u8; 32]>,
    /// Of the leaf before these, what is still to be brought beside its record.
    parts: VecDeque<(usize, Range<u64>)>,
}

impl Fill {
    /// All of a head, in the order in which it lies in the packs.
    pub fn new(places: &Arc<Places>) -> Self {
        Self {
            leaves: places.leaves_in_order().into(),
            parts: VecDeque::new(),
            places: places.clone(),
        }
    }

    /// Makes at most one request.
    pub fn step(&mut self, blocks: &Blocks) -> Step {
        if !blocks.has_room() {
            tracing::info!(
                leaves = self.leaves.len(),
                "the cache is full: the rest is read when it is asked for"
            );
            return Step::Done;
        }
        if let Some((pack, part)) = self.parts.front().cloned() {
            let brought = blocks.bring(&self.places.packs[pack].pack, part, Cause::Fill);
            if brought == Brought::Nothing {
                return Step::Unanswered;
            }
            if brought == Brought::All {
                self.parts.pop_front();
            }
            return Step::More;
        }
        let Some(id) = self.leaves.front().copied() else {
            tracing::info!("all of the snapshot is in the cache");
            return Step::Done;
        };
        if let Some(step) = self.record(blocks, &id) {
            return step;
        }
        self.leaves.pop_front();
        Step::More
    }

    /// Brings a leaf's record, and finds what else it needs. `None` once that is known, or
    /// if it cannot be: whoever needs the leaf is told.
    fn record(&mut self, blocks: &Blocks, id: &[u8; 32]) -> Option<Step> {
        let leaf = self.places.leaves.get(id)?;
        let pack = &self.places.packs[leaf.pack].pack.clone();
        let start = u64::from(leaf.offset);
        let record = start..start + u64::from(leaf.len);
        // What follows it belongs to it, as far as the next one is known.
        let group = match leaf.next {
            u64::MAX => record.clone(),
            next => start..next.min(start + AHEAD_BLOCKS * BLOCK_BYTES).max(record.end),
        };
        match blocks.read(pack, &record, &record, false).ok()? {
            Read::Bytes { bytes, .. } => {
                let (_, pages) = decode_leaf(id, &bytes).ok()?;
                self.parts = self.places.parts_of(pages.into_iter()).into();
                None
            }
            Read::NotAtHand => {
                let wanted = *blocks_of(&group).start()..*blocks_of(&group).end() + 1;
                match blocks.bring(pack, wanted, Cause::Fill) {
                    Brought::Nothing => Some(Step::Unanswered),
                    Brought::Some | Brought::All => Some(Step::More),
                }
            }
        }
    }
}
