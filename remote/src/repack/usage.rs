//! How much of a pack is needed, as far as that can be seen from heads alone: so most packs
//! need no request to be left alone.
//!
//! A pack that a push wrote is needed whole as long as the change that the push made counts:
//! its snapshot has all that is in it. So is one of a repack all of whose heads count: they
//! have the numbers before its packs, so that one sees from names whether any is missing. Of
//! others the least that is needed is known where leaves that follow each other in an image
//! follow each other in the pack, too: packs are in the order of images, so nothing lies
//! between the two but the pages of the first. Where that is not so, too much is taken for
//! needed, and nothing is lost by it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::head::Head;
use crate::protocol::{Name, RefKey, Roots, Session};

/// A pack that is to be repacked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Use {
    pub len_bytes: u64,
    pub needed_bytes: u64,
}

/// The sessions whose packs are needed whole.
pub fn whole_sessions(roots: &Roots, packs: &BTreeMap<Name, u64>) -> BTreeSet<Session> {
    let all = || roots.movable.iter().chain(&roots.fixed);
    // Who made a change wrote its packs, whoever wrote them anew since.
    let mut whole: BTreeSet<Session> = all().map(|record| record.session).collect();
    let mut first: HashMap<Session, u32> = HashMap::new();
    for pack in packs.keys() {
        let least = first.entry(pack.session).or_insert(pack.number);
        *least = pack.number.min(*least);
    }
    let mut heads: BTreeMap<Session, BTreeSet<u32>> = BTreeMap::new();
    let rewritten = all().filter(|record| record.rev > 0);
    for RefKey { head, .. } in rewritten {
        heads.entry(head.session).or_default().insert(head.number);
    }
    for (session, numbers) in heads {
        if first
            .get(&session)
            .is_some_and(|first| numbers.into_iter().eq(0..*first))
        {
            whole.insert(session);
        }
    }
    whole
}

/// Parts of packs that are needed for sure.
#[derive(Default)]
pub struct Sure(BTreeMap<Name, BTreeMap<u32, u32>>);

impl Sure {
    /// Those that a head tells of.
    pub fn add(&mut self, head: &Head) {
        for tree in &head.trees {
            let leaves = head.leaves_of(&tree.image);
            let following = leaves.iter().zip(leaves.iter().skip(1));
            for ((number, id), (next_number, next_id)) in following {
                let places = (head.leaves.get(id), head.leaves.get(next_id));
                if let (Some(leaf), Some(next)) = places
                    && *next_number == number + 1
                    && leaf.pack == next.pack
                    && leaf.offset < next.offset
                {
                    let ends = self.0.entry(leaf.pack).or_default();
                    let end = ends.entry(leaf.offset).or_insert(next.offset);
                    *end = next.offset.min(*end);
                }
            }
        }
    }

    /// How many bytes of a pack are.
    pub fn bytes(&self, pack: Name) -> u64 {
        let (mut sum, mut until) = (0, 0);
        for (start, end) in self.0.get(&pack).into_iter().flatten() {
            let start = until.max(*start);
            sum += u64::from(end.saturating_sub(start));
            until = until.max(*end);
        }
        sum
    }
}

/// The parts of a pack that are needed.
#[derive(Default)]
pub struct Parts(BTreeMap<u32, u32>);

impl Parts {
    pub fn add(&mut self, offset: u32, len: u32) {
        let known = self.0.entry(offset).or_default();
        *known = len.max(*known);
    }

    /// How long they are together.
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|len| u64::from(*len)).sum()
    }
}
