//! Which packs are worth to be repacked: those of which less than a share is needed, as far as
//! what is written for them is no larger a share of what goes.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Result, of_bucket};
use crate::head::LeafPlace;
use crate::protocol::{self, Heads, Listing, Name, Part, Roots};
use crate::remote::{Remote, block_on};
use crate::repack::damage::{Damage, if_damaged, told};
use crate::repack::options::RepackOptions;
use crate::repack::read::Reader;
use crate::repack::snapshot::{Snapshot, counts, is_overtaken, leaves_in, moves_first};
use crate::repack::usage::{Parts, Sure, Use, whole_sessions};

/// What is to be repacked.
#[derive(Default)]
pub struct Plan {
    pub packs: BTreeMap<Name, Use>,
    /// All that need any of them.
    pub snapshots: Vec<Snapshot>,
    /// Packs that would be, but for the limit or since it costs too much.
    pub left: u64,
    /// Whether the rest is for another repack, and not for a later collection.
    pub has_more: bool,
    /// Whether nothing is worth it of what was looked at, and there is more to look at.
    pub looks_on: bool,
}

/// What there is, before anything is chosen.
struct Looked {
    sizes: BTreeMap<Name, u64>,
    /// Packs that are left alone.
    stay: BTreeSet<Name>,
    /// How many records need a pack.
    needed_by: BTreeMap<Name, u32>,
    snapshots: Vec<Snapshot>,
    /// What of packs is needed for sure, by heads alone.
    sure: Sure,
}

/// A leaf that may need something of a pack.
struct NeededLeaf {
    /// A snapshot with it, by its number.
    of: usize,
    id: [u8; 32],
    len: u32,
}

/// By the places of their records, and by their snapshot if packs of that were copied: other
/// snapshots' leaves are the same ones.
type NeededLeaves = BTreeMap<(Name, u32, Option<usize>), NeededLeaf>;

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty()
    }

    /// Looks what there is to repack. Packs of which something cannot be read are left alone,
    /// and so is what `damage` has already.
    pub fn of(
        reader: &mut Reader<'_>,
        heads: &mut Heads,
        options: &RepackOptions,
        most_bytes: (u64, u64),
        damage: &mut Damage,
    ) -> Result<Self> {
        let looked = Looked::at(reader.remote(), heads, damage)?;
        let (mut found, is_cut_off) = looked.partly_needed(reader, options, damage)?;
        found.retain(|(pack, _)| !damage.packs.contains(pack));
        let share = |one: &Use| one.needed_bytes as f64 / one.len_bytes.max(1) as f64;
        found.sort_by(|(_, one), (_, other)| share(one).total_cmp(&share(other)));
        let all = found.len();
        let seen: Vec<Name> = found.iter().map(|(pack, _)| *pack).collect();
        let (session_bytes, left_bytes) = most_bytes;
        let limit = session_bytes.min(left_bytes);
        let mut chosen;
        loop {
            chosen = looked.worth(
                reader.remote(),
                &found.iter().copied().collect(),
                options.percent,
            )?;
            let cost: u64 = chosen.iter().map(|one| one.cost_bytes).sum();
            // One pack is not too much for a session, whatever its heads cost.
            if cost <= limit || found.is_empty() || found.len() == 1 && cost <= left_bytes {
                break;
            }
            // The others are for later.
            let fit = found.len() as f64 * limit as f64 / cost as f64;
            found.truncate((fit as usize).max(1).min(found.len() - 1));
        }
        let mut plan = Self {
            has_more: is_cut_off || found.len() < all && session_bytes <= left_bytes,
            packs: chosen.into_iter().flat_map(|one| one.packs).collect(),
            ..Self::default()
        };
        plan.left = (all - plan.packs.len()) as u64;
        if plan.is_empty() && is_cut_off {
            // The next look is at others.
            plan.looks_on = !seen.is_empty();
            damage.passed.extend(seen);
        }
        let snapshots = looked.snapshots.into_iter();
        plan.snapshots = snapshots.filter(|one| one.touches(&plan.packs)).collect();
        Ok(plan)
    }
}

/// Packs that belong together, since the same heads need them.
struct Group {
    packs: BTreeMap<Name, Use>,
    /// What would be written for them.
    cost_bytes: u64,
}

impl Looked {
    fn at(remote: &Remote, heads: &mut Heads, damage: &mut Damage) -> Result<Self> {
        let listing = block_on(Listing::of_all(remote))?;
        let roots = Roots::of(remote, &listing);
        let mut looked = Self {
            sizes: BTreeMap::new(),
            stay: damage.packs.union(&damage.passed).copied().collect(),
            needed_by: BTreeMap::new(),
            snapshots: Vec::new(),
            sure: Sure::default(),
        };
        let mut left = remote.kept_leaves;
        for listed in remote.bucket.list("packs/")? {
            if let Some(Part::Pack(pack)) = Part::parse(&listed.key) {
                looked.sizes.insert(pack, listed.len_bytes);
            }
        }
        let whole = whole_sessions(&roots, &looked.sizes);
        let packs = looked.sizes.keys().copied();
        let whole: BTreeSet<Name> = packs.filter(|it| whole.contains(&it.session)).collect();
        for record in &roots.fixed {
            if let Some(packs) = block_on(heads.packs(remote, record.head))? {
                looked.needs(packs);
                looked.stay.extend(packs);
            }
        }
        for record in roots.movable {
            // The collection has told of a head that is gone while its tag counts.
            let Some(packs) = block_on(heads.packs(remote, record.head))? else {
                continue;
            };
            looked.needs(packs);
            let missing = packs.iter().filter(|it| !looked.sizes.contains_key(it));
            let missing: Vec<Name> = missing.copied().collect();
            if !missing.is_empty() {
                looked.stay.extend(packs);
                if counts(remote, &record)? {
                    for pack in missing {
                        let problem = "it is missing".to_owned();
                        damage.add((pack.pack_key(), problem), [record.tag.clone()]);
                    }
                }
                continue;
            }
            if packs.iter().all(|pack| whole.contains(pack)) {
                continue;
            }
            let opened = match remote.open_head(&record) {
                Ok(opened) => opened,
                Err(error) => {
                    looked.stay.extend(packs);
                    let error = if_damaged(of_bucket(error))?;
                    if !is_overtaken(remote, &record, &error)? {
                        damage.add(told(&error), [record.tag.clone()]);
                    }
                    continue;
                }
            };
            // Its own working set is needed whole.
            let first = opened.head.first.as_ref().map(|first| first.pack);
            looked.stay.extend(first);
            looked.sure.add(&opened.head);
            let leaves = opened.head.leaves.len();
            let keeps = leaves <= left;
            left -= if keeps { leaves } else { 0 };
            looked.snapshots.push(Snapshot::of(record, opened, keeps));
        }
        looked.stay.extend(whole);
        Ok(looked)
    }

    fn needs(&mut self, packs: &[Name]) {
        for pack in packs {
            *self.needed_by.entry(*pack).or_default() += 1;
        }
    }

    /// The packs of which less than a share is needed, and whether not all were looked at.
    fn partly_needed(
        &self,
        reader: &mut Reader<'_>,
        options: &RepackOptions,
        damage: &mut Damage,
    ) -> Result<(Vec<(Name, Use)>, bool)> {
        let keeps = !options.dry_run;
        let is_enough =
            |bytes: u64, of_bytes: u64| bytes * 100 >= of_bytes * u64::from(options.percent);
        let sizes = self.sizes.iter();
        let sizes = sizes.filter(|(pack, len_bytes)| {
            let is_needed = self.needed_by.contains_key(pack) && !self.stay.contains(pack);
            is_needed && !is_enough(self.sure.bytes(**pack), **len_bytes)
        });
        let mut of_packs: BTreeMap<Name, NeededLeaves> = BTreeMap::new();
        of_packs.extend(sizes.map(|(pack, _)| (*pack, NeededLeaves::new())));
        for (of, snapshot) in self.snapshots.iter().enumerate() {
            if !snapshot.packs.iter().any(|it| of_packs.contains_key(it)) {
                continue;
            }
            let Some(head) = snapshot.head(reader.remote())? else {
                continue;
            };
            let alone = (!snapshot.moved.is_empty()).then_some(of);
            for (id, leaf) in &head.leaves {
                for pack in leaf.packs.iter().chain([&leaf.pack]) {
                    if let Some(leaves) = of_packs.get_mut(pack) {
                        let (id, len) = (*id, leaf.len);
                        let at = (leaf.pack, leaf.offset, alone);
                        leaves.entry(at).or_insert(NeededLeaf { of, id, len });
                    }
                }
            }
        }
        let mut found = Vec::new();
        for (pack, leaves) in of_packs {
            if leaves.is_empty() {
                continue;
            }
            if reader.is_full() {
                return Ok((found, true));
            }
            let len_bytes = self.sizes[&pack];
            let is_enough = |bytes| is_enough(bytes, len_bytes);
            let needed = self.needed(reader, pack, leaves, (&is_enough, keeps), damage)?;
            if let Some(needed_bytes) = needed {
                let one = Use {
                    len_bytes,
                    needed_bytes,
                };
                found.push((pack, one));
            }
        }
        Ok((found, false))
    }

    /// How much of a pack these leaves need, unless that is enough, or cannot be told.
    fn needed(
        &self,
        reader: &mut Reader<'_>,
        pack: Name,
        leaves: NeededLeaves,
        (is_enough, keeps): (&dyn Fn(u64) -> bool, bool),
        damage: &mut Damage,
    ) -> Result<Option<u64>> {
        let mut parts = Parts::default();
        let mut read: Vec<([u8; 32], LeafPlace)> = Vec::new();
        let leaves = leaves.into_iter();
        let leaves: Vec<(usize, ([u8; 32], LeafPlace))> = leaves
            .map(|((pack, offset, _), NeededLeaf { of, id, len })| {
                let packs = Box::default();
                let place = LeafPlace {
                    pack,
                    offset,
                    len,
                    packs,
                };
                (of, (id, place))
            })
            .collect();
        // A few at a time: most packs are needed enough.
        for some in leaves.chunks(8) {
            let places: Vec<_> = some.iter().map(|(_, place)| place.clone()).collect();
            let wrong = reader.read_records(&places)?;
            for (of, (id, place)) in some {
                let Some(leaf) = reader.known(id, place) else {
                    continue;
                };
                if place.pack == pack {
                    parts.add(place.offset, place.len);
                }
                for (_, page) in leaf.pages(&self.snapshots[*of].moved) {
                    if page.pack == pack {
                        parts.add(page.offset, page.len);
                    }
                }
            }
            for (at, error) in &wrong {
                self.is_wrong(reader.remote(), &places[*at], error, damage)?;
            }
            read.extend(places);
            if !wrong.is_empty() || is_enough(parts.bytes()) {
                if !wrong.is_empty() {
                    damage.packs.insert(pack);
                }
                reader.done_with(&read, false);
                return Ok(None);
            }
        }
        reader.done_with(&read, keeps);
        Ok(Some(parts.bytes()))
    }

    /// The record of a leaf is damaged or gone: that is told of all that need it still.
    fn is_wrong(
        &self,
        remote: &Remote,
        (id, place): &([u8; 32], LeafPlace),
        error: &protocol::Error,
        damage: &mut Damage,
    ) -> Result<()> {
        for snapshot in &self.snapshots {
            let Some(head) = snapshot.head(remote)? else {
                continue;
            };
            let leaf = head.leaves.get(id);
            let has_it =
                leaf.is_some_and(|leaf| (leaf.pack, leaf.offset) == (place.pack, place.offset));
            if has_it && !is_overtaken(remote, &snapshot.record, error)? {
                damage.add(told(error), [snapshot.record.tag.clone()]);
            }
        }
        Ok(())
    }

    /// Those that are worth what they cost, with the others that their heads need.
    fn worth(
        &self,
        remote: &Remote,
        packs: &BTreeMap<Name, Use>,
        percent: u8,
    ) -> Result<Vec<Group>> {
        // Which of them each snapshot needs.
        let mut touched: Vec<BTreeSet<Name>> = Vec::new();
        for snapshot in &self.snapshots {
            let named = snapshot.packs.iter();
            touched.push(named.filter(|it| packs.contains_key(it)).copied().collect());
        }
        let mut left: BTreeSet<usize> = (0..touched.len()).collect();
        left.retain(|at| !touched[*at].is_empty());
        let mut groups = Vec::new();
        while let Some(at) = left.pop_first() {
            let mut heads = BTreeSet::from([at]);
            let mut names = touched[at].clone();
            loop {
                let others = left.iter().copied();
                let others = others.filter(|at| !touched[*at].is_disjoint(&names));
                let others: Vec<usize> = others.collect();
                if others.is_empty() {
                    break;
                }
                for at in others {
                    left.remove(&at);
                    heads.insert(at);
                    names.extend(&touched[at]);
                }
            }
            let of_names = names.into_iter().map(|name| (name, packs[&name]));
            let group: BTreeMap<Name, Use> = of_names.collect();
            let (cost_bytes, gain_bytes) = self.costs(remote, &group, &heads)?;
            if cost_bytes * 100 <= gain_bytes * u64::from(percent) {
                groups.push(Group {
                    packs: group,
                    cost_bytes,
                });
            }
        }
        Ok(groups)
    }

    /// What is written for these packs, and what goes.
    fn costs(
        &self,
        remote: &Remote,
        packs: &BTreeMap<Name, Use>,
        heads: &BTreeSet<usize>,
    ) -> Result<(u64, u64)> {
        let mut cost: u64 = packs.values().map(|one| one.needed_bytes).sum();
        let mut gain: u64 = packs.values().map(|one| one.len_bytes).sum();
        let mut records = BTreeSet::new();
        for at in heads {
            let snapshot = &self.snapshots[*at];
            let Some(head) = snapshot.head(remote)? else {
                continue;
            };
            cost += snapshot.head_bytes;
            gain += snapshot.head_bytes;
            let first = moves_first(&head, packs);
            if let Some(pack) = first {
                cost += head.first.as_ref().map_or(0, |first| u64::from(first.end));
                if self.needed_by.get(&pack) == Some(&1) {
                    gain += self.sizes.get(&pack).copied().unwrap_or(0);
                }
            }
            for (_, leaf) in leaves_in(&head, packs) {
                let is_counted = packs.contains_key(&leaf.pack) || Some(leaf.pack) == first;
                if !is_counted && records.insert((leaf.pack, leaf.offset)) {
                    cost += u64::from(leaf.len);
                }
            }
        }
        Ok((cost, gain))
    }
}
