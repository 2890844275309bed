//! Which packs are worth to be repacked: those of which less than a share is needed, as far as
//! what is written for them is no larger a share of what goes.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Result, of_bucket};
use crate::head::{Head, LeafPlace};
use crate::opened::Opened;
use crate::protocol::{self, Heads, Listing, Name, Part, RefKey, Roots};
use crate::remote::{Remote, block_on};
use crate::repack::damage::{Damage, if_damaged, told};
use crate::repack::options::RepackOptions;
use crate::repack::read::Reader;
use crate::repack::usage::{Parts, Sure, whole_sessions};

/// A pack that is to be repacked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Use {
    pub len_bytes: u64,
    pub needed_bytes: u64,
}

/// A snapshot of a record that counts.
pub struct Snapshot {
    pub record: RefKey,
    pub opened: Opened,
}

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
}

impl Snapshot {
    /// Its leaves that have something in any of these packs.
    pub fn leaves_in<'a>(
        &'a self,
        packs: &'a BTreeMap<Name, Use>,
    ) -> impl Iterator<Item = (&'a [u8; 32], &'a LeafPlace)> {
        let is_in = |leaf: &LeafPlace| {
            packs.contains_key(&leaf.pack) || leaf.packs.iter().any(|it| packs.contains_key(it))
        };
        let leaves = self.opened.head.leaves.iter();
        leaves.filter(move |(_, leaf)| is_in(leaf))
    }

    /// The pack with its working set, if records in it have to be written anew: then all of it
    /// is, so that it is still read from one end to the other.
    pub fn moves_first(&self, packs: &BTreeMap<Name, Use>) -> Option<Name> {
        let first = self.opened.head.first.as_ref()?.pack;
        let mut leaves = self.leaves_in(packs);
        leaves.any(|(_, leaf)| leaf.pack == first).then_some(first)
    }
}

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
            chosen = looked.worth(&found.iter().copied().collect(), options.percent);
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
        plan.snapshots = snapshots
            .filter(|one| one.leaves_in(&plan.packs).next().is_some())
            .collect();
        Ok(plan)
    }
}

/// Whether a record is the one that counts of its tag.
pub fn counts(remote: &Remote, record: &RefKey) -> Result<bool> {
    let listing = block_on(Listing::of_tag(remote, &record.tag))?;
    Ok(listing.judge(&record.tag).winner.as_ref() == Some(record))
}

/// Whether what a record needs is gone since its tag was changed meanwhile, which is no damage.
fn is_overtaken(remote: &Remote, record: &RefKey, error: &protocol::Error) -> Result<bool> {
    Ok(matches!(error, protocol::Error::Missing { .. }) && !counts(remote, record)?)
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
        };
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
            looked.snapshots.push(Snapshot { record, opened });
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
        let mut sure = Sure::default();
        let mut of_packs: BTreeMap<Name, Vec<(usize, [u8; 32])>> = BTreeMap::new();
        for (at, Snapshot { opened, .. }) in self.snapshots.iter().enumerate() {
            sure.add(&opened.head);
            for (id, leaf) in &opened.head.leaves {
                for pack in leaf.packs.iter().chain([&leaf.pack]) {
                    if !self.stay.contains(pack) {
                        let leaves = of_packs.entry(*pack).or_default();
                        if leaves.last() != Some(&(at, *id)) {
                            leaves.push((at, *id));
                        }
                    }
                }
            }
        }
        let mut found = Vec::new();
        for (pack, leaves) in of_packs {
            let Some(len_bytes) = self.sizes.get(&pack).copied() else {
                continue;
            };
            if reader.is_full() {
                return Ok((found, true));
            }
            let is_enough = |bytes: u64| bytes * 100 >= len_bytes * u64::from(options.percent);
            if is_enough(sure.bytes(pack)) {
                continue;
            }
            let needed = self.needed(reader, pack, &leaves, (&is_enough, keeps), damage)?;
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
        leaves: &[(usize, [u8; 32])],
        (is_enough, keeps): (&dyn Fn(u64) -> bool, bool),
        damage: &mut Damage,
    ) -> Result<Option<u64>> {
        let mut parts = Parts::default();
        let mut read: Vec<([u8; 32], LeafPlace)> = Vec::new();
        let head = |at: usize| &self.snapshots[at].opened;
        // A few at a time: most packs are needed enough.
        for some in leaves.chunks(8) {
            let places = some.iter();
            let places = places.map(|(at, id)| (*id, head(*at).head.leaves[id].clone()));
            let places: Vec<([u8; 32], LeafPlace)> = places.collect();
            let wrong = reader.read_records(&places)?;
            for ((at, _), (_, place)) in some.iter().zip(&places) {
                let Some(leaf) = reader.known(place) else {
                    continue;
                };
                if place.pack == pack {
                    parts.add(place.offset, place.len);
                }
                for (_, page) in leaf.pages(&head(*at).moved) {
                    if page.pack == pack {
                        parts.add(page.offset, page.len);
                    }
                }
            }
            for (at, error) in &wrong {
                let record = &self.snapshots[some[*at].0].record;
                if !is_overtaken(reader.remote(), record, error)? {
                    damage.add(told(error), [record.tag.clone()]);
                }
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

    /// Those that are worth what they cost, with the others that their heads need.
    fn worth(&self, packs: &BTreeMap<Name, Use>, percent: u8) -> Vec<Group> {
        // Which of them each snapshot needs.
        let mut touched: Vec<BTreeSet<Name>> = Vec::new();
        for snapshot in &self.snapshots {
            let leaves = snapshot.opened.head.leaves.values();
            let named = leaves.flat_map(|leaf| leaf.packs.iter().chain([&leaf.pack]));
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
            let (cost_bytes, gain_bytes) = self.costs(&group, &heads);
            if cost_bytes * 100 <= gain_bytes * u64::from(percent) {
                groups.push(Group {
                    packs: group,
                    cost_bytes,
                });
            }
        }
        groups
    }

    /// What is written for these packs, and what goes.
    fn costs(&self, packs: &BTreeMap<Name, Use>, heads: &BTreeSet<usize>) -> (u64, u64) {
        let mut cost: u64 = packs.values().map(|one| one.needed_bytes).sum();
        let mut gain: u64 = packs.values().map(|one| one.len_bytes).sum();
        let mut records = BTreeSet::new();
        for at in heads {
            let snapshot = &self.snapshots[*at];
            cost += snapshot.opened.len_bytes;
            gain += snapshot.opened.len_bytes;
            let first = snapshot.moves_first(packs);
            if let Some(pack) = first {
                let head: &Head = &snapshot.opened.head;
                cost += head.first.as_ref().map_or(0, |first| u64::from(first.end));
                if self.needed_by.get(&pack) == Some(&1) {
                    gain += self.sizes.get(&pack).copied().unwrap_or(0);
                }
            }
            for (_, leaf) in snapshot.leaves_in(packs) {
                let is_counted = packs.contains_key(&leaf.pack) || Some(leaf.pack) == first;
                if !is_counted && records.insert((leaf.pack, leaf.offset)) {
                    cost += u64::from(leaf.len);
                }
            }
        }
        (cost, gain)
    }
}
