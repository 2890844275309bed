//! Which tags of a bucket name a snapshot or one that it came from: few records are read for
//! it, however many tags there are.
//!
//! A tag's name there is the one that it had here when it was pushed. So the names that a
//! snapshot has, or was first committed under, are looked for first, and then those most like
//! the tag that is pushed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use snapstore_store::{SnapshotId, Store};

use crate::error::usable;
use crate::protocol::{Bucket as _, Current, Error, Listing, RefKey, RefRecord, Result};
use crate::remote::Remote;

/// How far back an ancestor is looked for.
const MOST_ANCESTORS: usize = 1000;
/// Records that are read of tags with the names of ancestors, and then of others.
const MOST_NAMED: usize = 64;
const MOST_OTHERS: usize = 32;

/// A snapshot and those that it came from, the nearest first, with their names here. An
/// ancestor that is gone here ends the way there.
pub struct Chain<'a> {
    store: &'a Store,
    names: HashMap<SnapshotId, Vec<String>>,
    next: Option<SnapshotId>,
    left: usize,
}

impl<'a> Chain<'a> {
    pub fn of(store: &'a Store, id: SnapshotId) -> Self {
        let mut names: HashMap<SnapshotId, Vec<String>> = HashMap::new();
        // Without them there are the names that ancestors were first committed under.
        for (tag, named) in store.tags().unwrap_or_default() {
            names.entry(named).or_default().push(tag);
        }
        Self {
            store,
            names,
            next: Some(id),
            left: MOST_ANCESTORS,
        }
    }
}

impl Iterator for Chain<'_> {
    type Item = (SnapshotId, Vec<String>);

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.next.take()?;
        self.left = self.left.checked_sub(1)?;
        let mut names = self.names.remove(&id).unwrap_or_default();
        if let Ok(manifest) = self.store.manifest(id) {
            if !names.contains(&manifest.first_tag) {
                names.push(manifest.first_tag);
            }
            self.next = manifest.parent;
        }
        Some((id, names))
    }
}

/// What tags of the bucket name, as far as that was read.
pub struct Named<'a> {
    pub remote: &'a Remote,
    listing: &'a Listing,
    tags: BTreeSet<String>,
    /// Of tags that were looked at: records that count and are whole, and which snapshots they
    /// name.
    known: BTreeMap<String, Option<(RefKey, [u8; 32])>>,
    reads: usize,
}

impl<'a> Named<'a> {
    /// Nothing was read yet.
    pub fn of(remote: &'a Remote, listing: &'a Listing) -> Self {
        Self {
            remote,
            listing,
            tags: listing.tags(),
            known: BTreeMap::new(),
            reads: 0,
        }
    }

    /// A tag's record, if it counts and can be read.
    pub async fn record(&mut self, tag: &str) -> Result<Option<RefKey>> {
        self.look(tag).await?;
        let known = self.known.get(tag).and_then(Option::as_ref);
        Ok(known.map(|(record, _)| record.clone()))
    }

    /// The records of these tags that name this snapshot.
    pub async fn naming(&mut self, id: &[u8; 32], tags: Vec<String>) -> Result<Vec<RefKey>> {
        let mut found = Vec::new();
        for tag in tags {
            if self.reads < MOST_NAMED {
                self.look(&tag).await?;
            }
            match self.known.get(&tag) {
                Some(Some((record, named))) if named == id => found.push(record.clone()),
                _ => {}
            }
        }
        Ok(found)
    }

    /// Looks at others, first at those whose names begin as this one does.
    pub async fn look_at_like(&mut self, tag: &str) -> Result<()> {
        let alike = |other: &&String| {
            let both = other.bytes().zip(tag.bytes());
            both.take_while(|(one, other)| one == other).count()
        };
        let others = self.tags.iter();
        let mut others: Vec<&String> = others
            .filter(|other| !self.known.contains_key(*other))
            .collect();
        others.sort_by_key(|other| Reverse(alike(other)));
        others.truncate(MOST_OTHERS);
        for other in others.into_iter().cloned().collect::<Vec<_>>() {
            self.look(&other).await?;
        }
        Ok(())
    }

    /// All tags that were looked at.
    pub fn looked_at(&self) -> Vec<String> {
        self.known.keys().cloned().collect()
    }

    async fn look(&mut self, tag: &str) -> Result<()> {
        if self.known.contains_key(tag) || !self.tags.contains(tag) {
            return Ok(());
        }
        let known = match self.listing.current(tag, &BTreeSet::new()) {
            Current::Settled(record) => self.read(record).await?,
            _ => None,
        };
        self.known.insert(tag.to_owned(), known);
        Ok(())
    }

    async fn read(&mut self, record: RefKey) -> Result<Option<(RefKey, [u8; 32])>> {
        self.reads += 1;
        let key = record.key();
        let bytes = usable(self.remote.get(&key).await.map_err(Error::from))?.flatten();
        let body = bytes.map(|bytes| RefRecord::decode(&key, &bytes));
        let body = body.map(|body| body.map_err(|error| error.of(&key)));
        let body = usable(body.transpose())?.flatten();
        Ok(body.map(|body| (record, body.snapshot)))
    }
}
