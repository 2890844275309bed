//! What a push reuses: what the bucket has is known from the head of the nearest ancestor
//! there, else of the snapshot that the tag named, and then of pages that were found by hooks.
//! What is damaged is nothing that it has.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use snapstore_store::{SnapshotId, Store};

use crate::error::{of_bucket, usable};
use crate::head::{Head, LeafPlace, PagePlace, decode_leaf};
use crate::hooks::Finding;
use crate::intact::Intact;
use crate::kin::{Chain, Named};
use crate::protocol::{Error, Lease, Listing, Name, RefKey, Result, Reuse, may_reuse};
use crate::remote::Remote;

/// What is in the bucket already.
#[derive(Default)]
pub struct There {
    /// What was looked at, of a push that mends.
    pub intact: Option<Intact>,
    /// Pages of snapshots that this one has nothing to do with.
    pub found: Finding,
    /// Whose head it is.
    root: Option<RefKey>,
    /// Whether that is the snapshot itself, or one that it came from.
    is_kin: bool,
    head: Head,
    /// All that the head needs.
    packs: BTreeSet<Name>,
    moved: BTreeMap<Name, Name>,
    listing: Option<Listing>,
    judged: HashMap<Name, bool>,
    relied: BTreeSet<RefKey>,
}

impl There {
    /// Finds the head whose leaves and packs a push of this snapshot reuses.
    pub async fn look(remote: &Remote, store: &Store, tag: &str, id: SnapshotId) -> Result<Self> {
        let listing = match usable(Listing::of_all(remote).await)? {
            Some(listing) => listing,
            None => Listing::of_tag(remote, tag).await?,
        };
        let mut there = Self::default();
        let mut named = Named::of(remote, &listing);
        there.find_kin(&mut named, store, tag, id).await?;
        if there.root.is_none()
            && let Some(root) = named.record(tag).await?
        {
            there.open(remote, &root, None)?;
        }
        there.listing = Some(listing);
        Ok(there)
    }

    /// Finds the head of the snapshot itself, or of the nearest one that it came from.
    async fn find_kin(
        &mut self,
        named: &mut Named<'_>,
        store: &Store,
        tag: &str,
        id: SnapshotId,
    ) -> Result<()> {
        let mut chain = Vec::new();
        for (id, mut names) in Chain::of(store, id) {
            chain.push(id);
            // Another one's is as good, and not what is to be mended.
            names.retain(|name| name != tag);
            names.push(tag.to_owned());
            if self.open_first(named, id, names).await? {
                return Ok(());
            }
        }
        named.look_at_like(tag).await?;
        for id in chain {
            let others = named.looked_at().into_iter().filter(|name| name != tag);
            if self.open_first(named, id, others.collect()).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Opens the first of these tags that names this snapshot.
    async fn open_first(
        &mut self,
        named: &mut Named<'_>,
        id: SnapshotId,
        names: Vec<String>,
    ) -> Result<bool> {
        for root in named.naming(id.as_bytes(), names).await? {
            if self.open(named.remote, &root, Some(id))? {
                self.is_kin = true;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes this record's head as what is reused, if that can be read, and is of this
    /// snapshot.
    fn open(&mut self, remote: &Remote, root: &RefKey, id: Option<SnapshotId>) -> Result<bool> {
        let opened = remote.open_head_of(root.head, &root.key());
        let Some(opened) = usable(opened.map_err(of_bucket))? else {
            return Ok(false);
        };
        if id.is_some_and(|id| *id.as_bytes() != opened.snapshot) {
            return Ok(false);
        }
        self.head = opened.head;
        self.packs = opened.packs.into_iter().collect();
        self.moved = opened.moved;
        self.root = Some(root.clone());
        Ok(true)
    }

    /// With what was looked at before.
    pub fn with(mut self, intact: Option<Intact>) -> Self {
        self.intact = intact;
        if let Some(intact) = &mut self.intact {
            let moved = self.moved.iter();
            intact.origins.learn(moved.map(|(from, to)| (*from, *to)));
        }
        self
    }

    /// Whether an ancestor is there.
    pub fn is_kin(&self) -> bool {
        self.is_kin
    }

    /// The ids of an image's leaves there, by their numbers in it.
    pub fn leaves_of(&self, image: &str) -> BTreeMap<u64, [u8; 32]> {
        self.head.leaves_of(image)
    }

    /// Where a leaf is.
    pub fn leaf(&self, id: &[u8; 32]) -> Option<LeafPlace> {
        self.head.leaves.get(id).cloned()
    }

    /// The records on whose word packs were reused.
    pub fn into_relied(self) -> BTreeSet<RefKey> {
        self.relied
    }

    /// Whether a pack may be relied on. Its own ones may.
    pub async fn may_use(&mut self, remote: &Remote, lease: &Lease, pack: Name) -> Result<bool> {
        if pack.session == lease.session() {
            return Ok(true);
        }
        if let Some(known) = self.judged.get(&pack) {
            return Ok(*known);
        }
        let Some(listing) = &self.listing else {
            return Ok(false);
        };
        // That record says nothing of packs that were found by hooks.
        let root = self.root.as_ref().filter(|_| self.packs.contains(&pack));
        let reuse = may_reuse(remote, lease, listing, pack, root).await?;
        let may = match &mut self.intact {
            _ if reuse == Reuse::No => false,
            Some(intact) => intact.is_whole(remote, pack).map_err(of_bucket)?,
            None => true,
        };
        if let (true, Reuse::OnTheWordOf(root)) = (may, reuse) {
            self.relied.insert(root);
        }
        self.judged.insert(pack, may);
        Ok(may)
    }

    /// Whether a leaf's record may be used as it is.
    pub async fn may_use_all(
        &mut self,
        remote: &Remote,
        lease: &Lease,
        leaf: &LeafPlace,
    ) -> Result<bool> {
        // Its record says where its pages were before packs were copied.
        if !self.moved.is_empty() {
            return Ok(false);
        }
        for pack in leaf.packs.iter().chain([&leaf.pack]) {
            if !self.may_use(remote, lease, *pack).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The pages of a leaf in the bucket, and where they are.
    pub fn known(
        &mut self,
        remote: &Remote,
        leaf: Option<&[u8; 32]>,
    ) -> Result<HashMap<[u8; 32], PagePlace>> {
        let mut known = HashMap::new();
        let place = leaf.and_then(|id| Some((id, self.head.leaves.get(id)?)));
        let Some((id, place)) = place else {
            return Ok(known);
        };
        let pack = place.pack;
        let range = (u64::from(place.offset), place.len as usize);
        let record = remote.bucket.get(&pack.pack_key(), Some(range));
        let record = usable(record.map_err(Error::from))?.flatten();
        let leaf = record.and_then(|record| decode_leaf(id, &record).ok());
        let Some((node, places)) = leaf else {
            // It is not what was written.
            self.judged.insert(pack, false);
            return Ok(known);
        };
        for ((_, id), mut place) in node.children.iter().zip(places) {
            if let Some(to) = self.moved.get(&place.pack) {
                place.pack = *to;
            }
            known.insert(*id, place);
        }
        Ok(known)
    }
}
