//! What a repack writes: new packs with what is needed of the old ones, in the order of the
//! images, and for each snapshot a head with the new places. Pages are copied as they are
//! stored, each compared with its id; records of leaves are written anew, since they have the
//! places of their pages in them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;
use std::time::Instant;

use snapstore_store::Progress;

use crate::first::Apart;
use crate::head::{First, Head, LeafPlace, PagePlace, u32_of};
use crate::outgoing::{Outgoing, beat_at_times};
use crate::placed::Placed;
use crate::protocol::{
    Error, HeadSummary, Lease, Listing, Name, RefKey, Repacking, Result, Reuse, Stored, may_reuse,
    put_surely,
};
use crate::remote::Remote;
use crate::repack::damage::{if_damaged, told};
use crate::repack::plan::Plan;
use crate::repack::read::{self, Leaf, Reader};
use crate::repack::snapshot::{Snapshot, leaves_in, moves_first};

/// About so many bytes of pages are held beside the pack that they go to.
const HELD_BYTES: u64 = 8 << 20;
/// Leaves that are held at most: each takes about 60 KiB.
const HELD_LEAVES: usize = 256;
/// Leaves whose records are read before any of them is written.
const RECORDS_AT_ONCE: usize = 64;

/// The work of a repack.
pub struct Build<'a, 'b> {
    plan: &'a Plan,
    reader: &'a mut Reader<'b>,
    progress: &'a dyn Progress,
    /// Pages that were copied.
    pub pages: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// What cannot be read, and the packs that are left alone therefore.
    pub wrong: Option<(Error, Vec<Name>)>,
}

/// A leaf whose record is written anew.
struct Again {
    id: [u8; 32],
    canonical: Vec<u8>,
    places: Vec<([u8; 32], PagePlace)>,
}

impl Again {
    fn new(id: [u8; 32], leaf: Leaf, moved: &BTreeMap<Name, Name>) -> Self {
        Self {
            id,
            places: leaf.pages(moved).collect(),
            canonical: leaf.node.canonical,
        }
    }
}

/// A repack under way.
struct Run<'a> {
    out: Outgoing<'a>,
    /// Where pages are that were copied.
    placed: Placed,
    /// Where records are that were written.
    leaves: HashMap<[u8; 32], LeafPlace>,
    copied_bytes: u64,
    /// Packs of others that were looked at: they are there, and not condemned.
    usable: BTreeSet<Name>,
}

/// A working set that was laid apart anew.
struct Moved {
    pack: Name,
    end: u32,
    leaves: HashMap<[u8; 32], LeafPlace>,
}

impl<'a, 'b> Build<'a, 'b> {
    pub fn new(plan: &'a Plan, reader: &'a mut Reader<'b>, progress: &'a dyn Progress) -> Self {
        Self {
            plan,
            reader,
            progress,
            pages: 0,
            written_bytes: 0,
            wrong: None,
        }
    }

    fn is_old(&self, pack: Name) -> bool {
        self.plan.packs.contains_key(&pack)
    }

    /// What is damaged ends this repack: the next one leaves it alone.
    fn checked<T>(&mut self, read: Result<T>, packs: impl IntoIterator<Item = Name>) -> Result<T> {
        read.map_err(|error| match if_damaged(error) {
            Ok(damage) => {
                let told = told(&damage);
                self.wrong = Some((damage, packs.into_iter().collect()));
                Error::Work(format!("{}: {}", told.0, told.1).into())
            }
            Err(error) => error,
        })
    }

    /// The leaves of a snapshot that are written anew, in the order of its images; those of the
    /// working set if that is moved, or the others.
    fn leaves(
        &self,
        head: &Head,
        first: Option<Name>,
        of_first: bool,
    ) -> Vec<([u8; 32], LeafPlace)> {
        let old = leaves_in(head, &self.plan.packs);
        let old: HashSet<&[u8; 32]> = old.map(|it| it.0).collect();
        let mut seen = HashSet::new();
        let mut leaves = Vec::new();
        for tree in &head.trees {
            for id in head.leaves_of(&tree.image).into_values() {
                let Some(place) = head.leaves.get(&id) else {
                    continue;
                };
                let is_of_first = Some(place.pack) == first;
                let is_wanted = match of_first {
                    true => is_of_first,
                    false => !is_of_first && old.contains(&id),
                };
                if is_wanted && seen.insert(id) {
                    leaves.push((id, place.clone()));
                }
            }
        }
        leaves
    }

    /// Writes leaves with those of their pages that are in old packs. Most records are known
    /// from the plan; the others are read, some at a time.
    async fn write(
        &mut self,
        run: &mut Run<'_>,
        snapshot: &Snapshot,
        leaves: &[([u8; 32], LeafPlace)],
    ) -> Result<()> {
        let mut some = Vec::new();
        let mut wanted: BTreeMap<[u8; 32], PagePlace> = BTreeMap::new();
        let mut held = 0;
        for part in leaves.chunks(RECORDS_AT_ONCE) {
            let is_new = |(id, _): &&([u8; 32], LeafPlace)| !run.leaves.contains_key(id);
            let part: Vec<_> = part.iter().filter(is_new).cloned().collect();
            let wrong = self.reader.read_records(&part)?;
            if let Some((at, error)) = wrong.into_iter().next() {
                let packs = part[at].1.packs.iter().chain([&part[at].1.pack]);
                let packs: Vec<Name> = packs.filter(|it| self.is_old(**it)).copied().collect();
                self.checked(Err(error), packs)?;
            }
            for (id, place) in &part {
                let Some(leaf) = self.reader.known(id, place) else {
                    // What was read there is another leaf's.
                    let error = Error::Damaged {
                        key: place.pack.pack_key(),
                        reason: "two leaves have one record",
                    };
                    return self.checked(Err(error), [place.pack]);
                };
                let mut again = Again::new(*id, leaf, &snapshot.moved);
                self.look_up(run, &mut again);
                for (id, place) in &again.places {
                    if self.is_old(place.pack) && wanted.insert(*id, *place).is_none() {
                        held += u64::from(place.len);
                    }
                }
                some.push(again);
                if held >= HELD_BYTES || some.len() >= HELD_LEAVES {
                    held = 0;
                    let wanted = std::mem::take(&mut wanted).into_iter().collect();
                    self.write_some(run, std::mem::take(&mut some), wanted)
                        .await?;
                }
            }
            self.reader.forget(&part);
        }
        match some.is_empty() {
            true => Ok(()),
            false => {
                self.write_some(run, some, wanted.into_iter().collect())
                    .await
            }
        }
    }

    /// Those of its pages that were copied are where their copies are.
    fn look_up(&self, run: &mut Run<'_>, again: &mut Again) {
        for (id, place) in &mut again.places {
            if self.is_old(place.pack)
                && let Some(placed) = run.placed.get(id)
            {
                *place = placed;
            }
        }
    }

    /// Pages of old packs, as they are stored there.
    async fn read(
        &mut self,
        run: &mut Run<'_>,
        wanted: Vec<([u8; 32], PagePlace)>,
    ) -> Result<HashMap<[u8; 32], read::Stored>> {
        run.out.beat().await?;
        let packs: BTreeSet<Name> = wanted.iter().map(|(_, place)| place.pack).collect();
        let mut found = HashMap::new();
        // Pack by pack, so that it is known which one is damaged.
        for pack in packs {
            let pages = wanted.iter().filter(|(_, place)| place.pack == pack);
            let pages = self.reader.pages(pages.copied().collect());
            found.extend(self.checked(pages, [pack])?);
        }
        self.pages += found.len() as u64;
        run.copied_bytes += found
            .values()
            .map(|(_, bytes)| bytes.len() as u64)
            .sum::<u64>();
        self.progress.advance(run.copied_bytes);
        Ok(found)
    }

    async fn write_some(
        &mut self,
        run: &mut Run<'_>,
        leaves: Vec<Again>,
        wanted: Vec<([u8; 32], PagePlace)>,
    ) -> Result<()> {
        let found = self.read(run, wanted).await?;
        for mut again in leaves {
            if run.leaves.contains_key(&again.id) {
                continue;
            }
            // Others of these leaves may have the same pages.
            self.look_up(run, &mut again);
            let pages = again.places.iter();
            let pages: Vec<_> = pages
                .map(|(id, place)| match self.is_old(place.pack) {
                    false => (*id, Ok(*place)),
                    true => (*id, Err(found[id].clone())),
                })
                .collect();
            let (place, new) = run.out.pack.add(&again.canonical, &pages);
            for ((id, _), place) in pages.iter().zip(new) {
                // What stays where it is may be nothing that another head relies on.
                if place.pack == run.out.pack.name {
                    run.placed.insert(id, place);
                }
            }
            run.leaves.insert(again.id, place);
            if run.out.pack.is_full() {
                self.written_bytes += run.out.finish_pack().await?;
            }
        }
        Ok(())
    }

    /// Lays a working set apart once more, in the same order, with records that have the new
    /// places.
    async fn move_first(
        &mut self,
        run: &mut Run<'_>,
        (snapshot, head): (&Snapshot, &Head),
        first: Name,
    ) -> Result<Moved> {
        let end = head.first.as_ref().map_or(0, |first| first.end);
        run.out.beat().await?;
        let packs: Vec<Name> = self.plan.packs.keys().copied().collect();
        let read = self.reader.beginning(first, end);
        let bytes = self.checked(read, packs.clone())?;
        run.copied_bytes += u64::from(end);
        let mut apart = Apart::default();
        for (id, place) in self.leaves(head, Some(first), true) {
            let leaf = Reader::leaf_of(&bytes, &id, &place);
            let leaf = self.checked(leaf, packs.clone())?;
            let mut again = Again::new(id, leaf, &snapshot.moved);
            self.look_up(run, &mut again);
            let places = again.places;
            let wanted = places.iter();
            let wanted = wanted.filter(|(_, it)| it.pack != first && self.is_old(it.pack));
            let found = self.read(run, wanted.copied().collect()).await?;
            let mut new = Vec::with_capacity(places.len());
            for (id, place) in places {
                if place.pack == first {
                    let page = self.reader.page_of(&bytes, &id, &place);
                    let (encoding, bytes) = self.checked(page, packs.clone())?;
                    self.pages += 1;
                    apart.add_page(place.offset as usize, id, encoding, bytes);
                    new.push((id, None));
                } else if !self.is_old(place.pack) {
                    new.push((id, Some(place)));
                } else {
                    let placed = run.placed.get(&id).unwrap_or_else(|| {
                        let (encoding, bytes) = &found[&id];
                        run.out.pack.add_page(id, *encoding, bytes)
                    });
                    run.placed.insert(&id, placed);
                    new.push((id, Some(placed)));
                }
            }
            apart.add_leaf(id, again.canonical, new);
            if run.out.pack.is_full() {
                self.written_bytes += run.out.finish_pack().await?;
            }
        }
        let (pack, leaves) = apart.into_pack(run.out.lease.next_name());
        let moved = Moved {
            pack: pack.name,
            end: u32_of(pack.groups_end()),
            leaves: leaves.into_iter().collect(),
        };
        self.written_bytes += run.out.upload(pack).await?;
        Ok(moved)
    }

    /// The same head with the new places.
    fn head(&self, run: &Run<'_>, mut head: Head, moved: Option<&Moved>) -> Head {
        let old = leaves_in(&head, &self.plan.packs).map(|(id, _)| *id);
        let mut again: Vec<[u8; 32]> = old.collect();
        again.extend(moved.iter().flat_map(|moved| moved.leaves.keys()));
        for id in again {
            let of_set = moved.and_then(|moved| moved.leaves.get(&id));
            if let Some(place) = of_set.or_else(|| run.leaves.get(&id)) {
                head.leaves.insert(id, place.clone());
            }
        }
        if let Some(first) = &mut head.first {
            first.lengths.extend(&run.out.lengths);
            if let Some(moved) = moved {
                *first = First {
                    pack: moved.pack,
                    end: moved.end,
                    ..first.clone()
                };
            }
        }
        head
    }

    /// Writes a head under this name, if all that it needs of others is there.
    async fn store_head(
        &mut self,
        run: &mut Run<'_>,
        listing: &Listing,
        (snapshot, name): (&Snapshot, Name),
        moved: Option<&Moved>,
    ) -> Result<Option<Stored>> {
        let Some(head) = snapshot.head(run.out.remote)? else {
            return Ok(None);
        };
        let head = self.head(run, Rc::unwrap_or_clone(head), moved);
        let packs = head.packs();
        let own: HashSet<&Name> = snapshot.packs.iter().collect();
        let mut relied = BTreeSet::new();
        for pack in packs
            .iter()
            .filter(|it| it.session != run.out.lease.session())
        {
            if run.usable.contains(pack) {
                continue;
            }
            // A record speaks for what its own head needs. A leaf that was written for another
            // snapshot may have pages elsewhere.
            let root = Some(&snapshot.record).filter(|_| own.contains(pack));
            match may_reuse(run.out.remote, run.out.lease, listing, *pack, root).await? {
                Reuse::No => return Ok(None),
                Reuse::Yes => {
                    run.usable.insert(*pack);
                }
                Reuse::OnTheWordOf(root) => {
                    relied.insert(root);
                }
            }
        }
        let copies = snapshot.moved.iter();
        let copies = copies.filter(|(_, to)| packs.binary_search(to).is_ok());
        let summary = HeadSummary {
            version: head.version(),
            snapshot: snapshot.id,
            moved: copies.map(|(from, to)| (*from, *to)).collect(),
            packs,
        };
        let key = name.head_key();
        let bytes = summary.encode(&key, &head.encode(&summary.packs));
        put_surely(run.out.remote, &key, &bytes).await?;
        self.written_bytes += bytes.len() as u64;
        Ok(Some(Stored {
            snapshot: summary.snapshot,
            head: name,
            relied,
        }))
    }
}

impl Repacking<Remote> for Build<'_, '_> {
    async fn store(
        &mut self,
        remote: &Remote,
        lease: &mut Lease,
        listing: &Listing,
        records: &[RefKey],
    ) -> Result<Vec<(RefKey, Stored)>> {
        let plan = self.plan;
        let snapshots = plan.snapshots.iter();
        let snapshots = snapshots.filter(|one| records.contains(&one.record));
        // Heads have the numbers before packs: who reads names sees whether any is missing.
        let mut named: Vec<(&Snapshot, Name, Option<Name>)> = Vec::new();
        let mut firsts: u64 = 0;
        let mut last_beat = Instant::now();
        for snapshot in snapshots {
            beat_at_times(remote, lease, &mut last_beat).await?;
            let name = lease.next_name();
            if let Some(head) = snapshot.head(remote)? {
                let moves = moves_first(&head, &plan.packs);
                let first = head.first.as_ref().filter(|_| moves.is_some());
                firsts += first.map_or(0, |first| u64::from(first.end));
                named.push((snapshot, name, moves));
            }
        }
        // Records that are with a working set are where others find them, too.
        named.sort_by_key(|(_, _, moves)| moves.is_none());
        let mut run = Run {
            out: Outgoing::new(remote, lease),
            placed: Placed::default(),
            leaves: HashMap::new(),
            copied_bytes: 0,
            usable: BTreeSet::new(),
        };
        let needed: u64 = plan.packs.values().map(|one| one.needed_bytes).sum();
        self.progress.begin("repack", needed + firsts);
        let mut firsts = Vec::new();
        for (snapshot, _, first) in &named {
            run.out.beat().await?;
            let Some(head) = snapshot.head(remote)? else {
                firsts.push(None);
                continue;
            };
            let moved = match *first {
                Some(first) => {
                    let of = (*snapshot, &*head);
                    Some(self.move_first(&mut run, of, first).await?)
                }
                None => None,
            };
            for (id, place) in moved.iter().flat_map(|moved| &moved.leaves) {
                run.leaves.entry(*id).or_insert_with(|| place.clone());
            }
            let leaves = self.leaves(&head, *first, false);
            drop(head);
            self.write(&mut run, snapshot, &leaves).await?;
            firsts.push(moved);
        }
        if !run.out.pack.is_empty() {
            self.written_bytes += run.out.finish_pack().await?;
        }
        self.written_bytes += run.out.write_hooks().await?;
        let mut stored = Vec::new();
        for ((snapshot, name, _), moved) in named.into_iter().zip(&firsts) {
            run.out.beat().await?;
            let head = (snapshot, name);
            let head = self
                .store_head(&mut run, listing, head, moved.as_ref())
                .await?;
            stored.extend(head.map(|head| (snapshot.record.clone(), head)));
        }
        Ok(stored)
    }
}
