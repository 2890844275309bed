//! What hosts do in a history.

use std::collections::{BTreeMap, BTreeSet};

use super::bucket::SimBucket;
use super::world::World;
use crate::protocol::{
    Bucket, Current, Error, HeadSummary, Lease, Listing, Mode, Name, Options, Part, Pushed, RefKey,
    Repacking, Reuse, Roots, Rule, State, Stored, Work, collect, finish_cut_off, may_reuse, push,
    put_surely, remove, repack, view,
};

/// A push that is offered whatever pack there is.
pub const ANYTHING: &str = "*";

/// A push that looks for packs by hooks, and writes hooks of its own.
pub const HOOKS: &str = "#";

/// What one host does.
#[derive(Clone, Debug)]
pub enum Act {
    Push {
        tag: &'static str,
        replace: bool,
        contents: u8,
        like: Option<&'static str>,
    },
    Remove(&'static str),
    View(&'static str),
    Collect,
    /// All that one tag needs, as a push that moves its working set.
    Rewrite(&'static str),
    /// What tags need of packs that are only partly needed.
    Repack,
}

/// Adds a host that does these things one after the other.
pub fn add(world: &mut World, name: &str, acts: Vec<Act>) {
    world.add(name, |bucket| async move {
        for act in acts {
            perform(&bucket, &act).await;
        }
    });
}

async fn perform(bucket: &SimBucket, act: &Act) {
    match act {
        Act::Push {
            tag,
            replace,
            contents,
            like,
        } => {
            let mode = if *replace { Mode::Replace } else { Mode::New };
            let mut offered = Vec::new();
            if *like == Some(ANYTHING) {
                // From an index that is older than the push.
                for listed in bucket.list("packs/").await.unwrap_or_default() {
                    if let Some(Part::Pack(name)) = Part::parse(&listed.key) {
                        offered.push(name);
                    }
                }
                bucket.pause().await;
            }
            let mut work = Upload {
                contents: *contents,
                like: *like,
                offered,
            };
            let pushed = push(bucket, tag, &mode, id(*contents), "", &mut work).await;
            if let (Ok(Pushed::Now(record)), false) = (pushed, *replace) {
                bucket.oracle.borrow_mut().was_new(&record);
            }
        }
        Act::Remove(tag) => {
            let _ = remove(bucket, tag, 0, "").await;
        }
        Act::View(tag) => {
            let Ok(view) = view(bucket, tag, "").await else {
                return;
            };
            let session = view.lease.session();
            let mine = (session, view.record.head, None);
            bucket.oracle.borrow_mut().views.push(mine);
            for _ in 0..4 {
                bucket.pause().await;
            }
            bucket.oracle.borrow_mut().views.retain(|one| *one != mine);
            let _ = view.lease.end(bucket).await;
        }
        Act::Collect => {
            if let Err(error @ Error::Missing { .. }) = collect(bucket, Options::default()).await {
                bucket.oracle.borrow_mut().damage = Some(error.to_string());
            }
        }
        Act::Rewrite(tag) => rewrite(bucket, tag).await,
        Act::Repack => {
            let _ = repack_all(bucket).await;
        }
    }
}

fn id(contents: u8) -> [u8; 32] {
    [contents; 32]
}

/// A push: what another tag's packs have is reused, the rest is one pack.
struct Upload {
    contents: u8,
    like: Option<&'static str>,
    offered: Vec<Name>,
}

impl Work<SimBucket> for Upload {
    async fn is_whole(
        &mut self,
        bucket: &SimBucket,
        _: &mut Lease,
        record: &RefKey,
    ) -> Result<bool, Error> {
        let key = record.head.head_key();
        let head = bucket.get(&key).await?;
        let head = head.and_then(|bytes| Some(HeadSummary::decode(&key, &bytes).ok()?.0));
        let Some(head) = head else {
            return Ok(false);
        };
        for pack in &head.packs {
            if !bucket.exists(&pack.pack_key()).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn store(&mut self, bucket: &SimBucket, lease: &mut Lease) -> Result<Stored, Error> {
        let mut left = self.contents;
        let mut packs = Vec::new();
        let mut relied = BTreeSet::new();
        if self.like == Some(HOOKS) {
            for run in bucket.list("hooks/").await? {
                let run = bucket.get(&run.key).await?.unwrap_or_default();
                let names = run.as_chunks().0.iter().map(Name::from_bytes);
                self.offered.extend(names);
            }
        }
        if [Some(ANYTHING), Some(HOOKS)].contains(&self.like) {
            let listing = Listing::of_tag(bucket, "").await?;
            for pack in &self.offered {
                // What an index of hooks says that it holds.
                let held = bucket.get(&pack.pack_key()).await?;
                let held = held.map_or(self.contents, |bytes| bytes[0]);
                let may = may_reuse(bucket, lease, &listing, *pack, None).await?;
                if held & left != 0 && may == Reuse::Yes {
                    packs.push(*pack);
                    left &= !held;
                }
            }
        } else if let Some(tag) = self.like {
            let listing = Listing::of_tag(bucket, tag).await?;
            let record = match listing.current(tag, &BTreeSet::new()) {
                Current::Settled(record) => Some(record),
                Current::Active(record) if bucket.is_without(Rule::RootIsSettled) => Some(record),
                _ => None,
            };
            if let Some(record) = record {
                let key = record.head.head_key();
                let head = bucket.get(&key).await?;
                let head = head.and_then(|bytes| Some(HeadSummary::decode(&key, &bytes).ok()?.0));
                for pack in head.iter().flat_map(|head| &head.packs) {
                    // What a pack holds is known from its head and leaves.
                    let held = bucket.get(&pack.pack_key()).await?;
                    let held = held.map_or(self.contents, |bytes| bytes[0]);
                    if held & left == 0 {
                        continue;
                    }
                    match may_reuse(bucket, lease, &listing, *pack, Some(&record)).await? {
                        Reuse::No => continue,
                        Reuse::Yes => {}
                        Reuse::OnTheWordOf(root) => {
                            relied.insert(root);
                        }
                    }
                    packs.push(*pack);
                    left &= !held;
                }
            }
        }
        let mut own = Vec::new();
        if left != 0 {
            let name = lease.next_name();
            put_surely(bucket, &name.pack_key(), &[left]).await?;
            own.push(name);
            if self.like == Some(HOOKS) {
                let run = lease.next_name().hooks_key();
                put_surely(bucket, &run, &name.to_bytes()).await?;
            }
        }
        if bucket.is_without(Rule::HeadListsAll) && !own.is_empty() {
            packs.clear();
        }
        packs.extend(own);
        store_head(bucket, lease, self.contents, packs, relied).await
    }
}

async fn store_head(
    bucket: &SimBucket,
    lease: &mut Lease,
    contents: u8,
    packs: Vec<Name>,
    relied: BTreeSet<RefKey>,
) -> Result<Stored, Error> {
    let head = lease.next_name();
    let key = head.head_key();
    let snapshot = id(contents);
    let summary = HeadSummary {
        version: 1,
        snapshot,
        packs,
        moved: Vec::new(),
    };
    put_surely(bucket, &key, &summary.encode(&key, &[contents])).await?;
    Ok(Stored {
        snapshot,
        head,
        relied,
    })
}

/// All that a snapshot needs in one new pack.
struct Rewrite(u8);

impl Work<SimBucket> for Rewrite {
    async fn store(&mut self, bucket: &SimBucket, lease: &mut Lease) -> Result<Stored, Error> {
        let name = lease.next_name();
        put_surely(bucket, &name.pack_key(), &[self.0]).await?;
        let stored = store_head(bucket, lease, self.0, vec![name], BTreeSet::new()).await?;
        bucket.oracle.borrow_mut().moved.insert(stored.head);
        Ok(stored)
    }
}

/// What a head needs: the contents, and the packs.
type Need = (u8, Vec<Name>);

async fn need(bucket: &SimBucket, head: Name) -> Result<Option<Need>, Error> {
    let key = head.head_key();
    let Some(bytes) = bucket.get(&key).await? else {
        return Ok(None);
    };
    match HeadSummary::decode(&key, &bytes) {
        Ok((summary, [contents])) => Ok(Some((*contents, summary.packs))),
        _ => Ok(None),
    }
}

/// Packs of which only a part is needed, and which part.
#[derive(Default)]
struct Partly(BTreeMap<Name, u8>);

/// Looks which packs are needed in parts, and by which records; then repacks them.
async fn repack_all(bucket: &SimBucket) -> Result<(), Error> {
    finish_cut_off(bucket, "").await?;
    let listing = Listing::of_all(bucket).await?;
    let roots = Roots::of(bucket, &listing);
    let mut fixed = BTreeSet::new();
    for record in &roots.fixed {
        let need = need(bucket, record.head).await?;
        fixed.extend(need.map(|(_, packs)| packs).unwrap_or_default());
    }
    let mut needs = Vec::new();
    let mut of_packs: BTreeMap<Name, u8> = BTreeMap::new();
    for record in roots.movable {
        let Some(need) = need(bucket, record.head).await? else {
            continue;
        };
        for pack in &need.1 {
            *of_packs.entry(*pack).or_default() |= need.0;
        }
        needs.push((record, need));
    }
    let mut partly = Partly::default();
    for (pack, needed) in of_packs {
        let held = bucket.get(&pack.pack_key()).await?;
        let Some(held) = held.and_then(|bytes| bytes.first().copied()) else {
            continue;
        };
        if held & !needed != 0 && !fixed.contains(&pack) {
            partly.0.insert(pack, held & needed);
        }
    }
    let has_any = |need: &Need| need.1.iter().any(|pack| partly.0.contains_key(pack));
    let records = needs.iter().filter(|(_, need)| has_any(need));
    let records: Vec<RefKey> = records.map(|(record, _)| record.clone()).collect();
    if records.is_empty() {
        return Ok(());
    }
    repack(bucket, &records, "", &mut partly).await?;
    Ok(())
}

impl Repacking<SimBucket> for Partly {
    async fn store(
        &mut self,
        bucket: &SimBucket,
        lease: &mut Lease,
        listing: &Listing,
        records: &[RefKey],
    ) -> Result<Vec<(RefKey, Stored)>, Error> {
        let mut copies: BTreeMap<Name, Option<Name>> = BTreeMap::new();
        for (pack, needed) in &self.0 {
            let key = pack.pack_key();
            let held = bucket.get(&key).await?;
            if held.is_none_or(|bytes| needed & !bytes[0] != 0) {
                // It was collected: what needed it counts no more.
                return Err(Error::Gone { name: key });
            }
            let copy = match needed {
                0 => None,
                _ => Some(lease.next_name()),
            };
            if let Some(copy) = copy {
                put_surely(bucket, &copy.pack_key(), &[*needed]).await?;
            }
            copies.insert(*pack, copy);
        }
        let mut stored = Vec::new();
        'records: for record in records {
            let Some((contents, packs)) = need(bucket, record.head).await? else {
                continue;
            };
            let mut relied = BTreeSet::new();
            let mut new = Vec::new();
            for pack in packs {
                if let Some(copy) = copies.get(&pack) {
                    new.extend(*copy);
                    continue;
                }
                match may_reuse(bucket, lease, listing, pack, Some(record)).await? {
                    Reuse::No => continue 'records,
                    Reuse::Yes => {}
                    Reuse::OnTheWordOf(root) => {
                        relied.insert(root);
                    }
                }
                new.push(pack);
            }
            let head = store_head(bucket, lease, contents, new, relied).await?;
            bucket.oracle.borrow_mut().moved.insert(head.head);
            stored.push((record.clone(), head));
        }
        Ok(stored)
    }
}

async fn rewrite(bucket: &SimBucket, tag: &str) {
    let Ok(listing) = Listing::of_tag(bucket, tag).await else {
        return;
    };
    let Current::Settled(record) = listing.current(tag, &BTreeSet::new()) else {
        return;
    };
    debug_assert_eq!(listing.state(&record), State::Settled);
    let key = record.head.head_key();
    let Ok(Some(bytes)) = bucket.get(&key).await else {
        return;
    };
    let Ok((_, [contents])) = HeadSummary::decode(&key, &bytes) else {
        return;
    };
    let contents = *contents;
    let mode = Mode::Repack(record);
    let _ = push(bucket, tag, &mode, id(contents), "", &mut Rewrite(contents)).await;
}
