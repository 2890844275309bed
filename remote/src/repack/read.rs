//! Parts of packs, read and checked: records of leaves, and pages as they are stored.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use snapstore_store::{NodeParts, PageSize, decode_page};

use crate::head::{LeafPlace, PagePlace, decode_leaf, read_together, u32_of};
use crate::protocol::{Error, Malformed, Name, Result};
use crate::remote::Remote;
use crate::repack::damage::if_damaged;

/// Requests that are under way at once.
const AT_ONCE: usize = 8;
/// Places that are so near each other are read with one request.
const GAP_BYTES: u32 = 16 << 10;
const MOST_AT_ONCE_BYTES: u32 = 4 << 20;
/// A record or a page that is longer is none.
const LONGEST_BYTES: u32 = 128 << 10;

/// Records that are kept: what is written in one session needs so many at most.
const MOST_RECORDS: usize = 4096;

/// Where a record is: in which pack, and where there.
pub type RecordAt = (Name, u32);

/// A leaf, and where its record says that its pages are.
#[derive(Debug)]
pub struct Leaf {
    pub node: NodeParts,
    pub places: Vec<PagePlace>,
}

impl Leaf {
    /// Its pages, where some packs were copied: each one's id and place.
    pub fn pages<'a>(
        &'a self,
        moved: &'a BTreeMap<Name, Name>,
    ) -> impl Iterator<Item = ([u8; 32], PagePlace)> + 'a {
        let children = self.node.children.iter().zip(&self.places);
        children.map(|((_, id), place)| {
            let pack = *moved.get(&place.pack).unwrap_or(&place.pack);
            (*id, PagePlace { pack, ..*place })
        })
    }
}

/// A page as it is stored: encoding and bytes.
pub type Stored = (u8, Vec<u8>);

/// What reads a bucket's packs, and counts what was read.
pub struct Reader<'a> {
    remote: &'a Remote,
    page_size: PageSize,
    /// As they are stored: that takes a third of what they say.
    records: HashMap<RecordAt, Box<[u8]>>,
    /// Records that are needed later, too.
    kept: HashSet<RecordAt>,
    read_bytes: AtomicU64,
}

impl<'a> Reader<'a> {
    pub fn new(remote: &'a Remote, page_size: PageSize) -> Self {
        Self {
            remote,
            page_size,
            records: HashMap::new(),
            kept: HashSet::new(),
            read_bytes: AtomicU64::new(0),
        }
    }

    pub fn remote(&self) -> &'a Remote {
        self.remote
    }

    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// A leaf whose record was read.
    pub fn known(&self, id: &[u8; 32], leaf: &LeafPlace) -> Option<Leaf> {
        let record = self.records.get(&(leaf.pack, leaf.offset))?;
        let (node, places) = decode_leaf(id, record).ok()?;
        Some(Leaf { node, places })
    }

    /// Nobody needs the records of these leaves any more.
    pub fn forget(&mut self, leaves: &[([u8; 32], LeafPlace)]) {
        for (_, leaf) in leaves {
            self.records.remove(&(leaf.pack, leaf.offset));
        }
    }

    /// Whether so many records are kept that no more are to be: one takes about 22 KiB.
    pub fn is_full(&self) -> bool {
        self.kept.len() >= MOST_RECORDS
    }

    /// Keeps the records of these leaves, or forgets those that nobody keeps.
    pub fn done_with(&mut self, leaves: &[([u8; 32], LeafPlace)], keep: bool) {
        for (_, leaf) in leaves {
            let at = (leaf.pack, leaf.offset);
            if keep {
                self.kept.insert(at);
            } else if !self.kept.contains(&at) {
                self.records.remove(&at);
            }
        }
    }

    /// Reads the records of these leaves that were not read yet. What is wrong with the others.
    pub fn read_records(
        &mut self,
        leaves: &[([u8; 32], LeafPlace)],
    ) -> Result<Vec<(usize, Error)>> {
        let unknown = leaves.iter().enumerate();
        let unknown: Vec<_> = unknown
            .filter(|(_, (_, leaf))| !self.records.contains_key(&(leaf.pack, leaf.offset)))
            .collect();
        let mut wrong = Vec::new();
        for some in unknown.chunks(AT_ONCE) {
            let read: Vec<Result<Vec<u8>>> = thread::scope(|scope| {
                let reader = &*self;
                let threads = some
                    .iter()
                    .map(|(_, (id, leaf))| scope.spawn(move || reader.record(id, leaf)));
                let threads: Vec<_> = threads.collect();
                let joined = threads.into_iter().map(|thread| match thread.join() {
                    Ok(read) => read,
                    Err(panic) => std::panic::resume_unwind(panic),
                });
                joined.collect()
            });
            for ((at, (_, leaf)), read) in some.iter().zip(read) {
                match read {
                    Ok(read) => {
                        let at = (leaf.pack, leaf.offset);
                        self.records.insert(at, read.into());
                    }
                    Err(error) => wrong.push((*at, if_damaged(error)?)),
                }
            }
        }
        Ok(wrong)
    }

    /// A record, compared with the leaf's id.
    fn record(&self, id: &[u8; 32], leaf: &LeafPlace) -> Result<Vec<u8>> {
        let bytes = self.range(leaf.pack, leaf.offset, leaf.len)?;
        decode_leaf(id, &bytes).map_err(|error| error.of(&leaf.pack.pack_key()))?;
        Ok(bytes)
    }

    /// Reads the beginning of a pack.
    pub fn beginning(&self, pack: Name, end: u32) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while u32_of(bytes.len()) < end {
            let start = u32_of(bytes.len());
            let len = MOST_AT_ONCE_BYTES.min(end - start);
            bytes.extend(self.range(pack, start, len)?);
        }
        Ok(bytes)
    }

    /// A leaf whose record is in the beginning of its pack.
    pub fn leaf_of(bytes: &[u8], id: &[u8; 32], leaf: &LeafPlace) -> Result<Leaf> {
        let record = part(bytes, leaf.offset, leaf.len).unwrap_or_default();
        let read = decode_leaf(id, record);
        let (node, places) = read.map_err(|error| error.of(&leaf.pack.pack_key()))?;
        Ok(Leaf { node, places })
    }

    /// A page of the beginning of a pack as it is stored, compared with its id.
    pub fn page_of(&self, bytes: &[u8], id: &[u8; 32], place: &PagePlace) -> Result<Stored> {
        let stored = part(bytes, place.offset, place.len);
        let stored = stored.filter(|it| self.is_page(id, place.encoding, it));
        let stored = stored.ok_or_else(|| other_page(place.pack))?;
        Ok((place.encoding, stored.to_vec()))
    }

    fn is_page(&self, id: &[u8; 32], encoding: u8, stored: &[u8]) -> bool {
        decode_page(id, encoding, stored, self.page_size).is_some()
    }

    /// Reads these pages as they are stored, those near each other together. Each is compared
    /// with its id.
    pub fn pages(
        &self,
        mut wanted: Vec<([u8; 32], PagePlace)>,
    ) -> Result<HashMap<[u8; 32], Stored>> {
        wanted.sort_by_key(|(_, place)| (place.pack, place.offset));
        let mut found = HashMap::with_capacity(wanted.len());
        let mut rest = &wanted[..];
        while let Some((_, first)) = rest.first() {
            let (start, end, count) = read_together(rest, GAP_BYTES, MOST_AT_ONCE_BYTES);
            let bytes = self.range(first.pack, start, end - start)?;
            for (id, place) in &rest[..count] {
                let stored = part(&bytes, place.offset - start, place.len);
                let stored = stored.filter(|it| self.is_page(id, place.encoding, it));
                let stored = stored.ok_or_else(|| other_page(place.pack))?;
                found.insert(*id, (place.encoding, stored.to_vec()));
            }
            rest = &rest[count..];
        }
        Ok(found)
    }

    /// A part of a pack.
    fn range(&self, pack: Name, offset: u32, len: u32) -> Result<Vec<u8>> {
        let key = pack.pack_key();
        if len > MOST_AT_ONCE_BYTES + LONGEST_BYTES {
            let reason = "what names a place in it names one that is longer than any";
            return Err(Malformed::Wrong(reason).of(&key));
        }
        let part = (u64::from(offset), len as usize);
        let bytes = self.remote.bucket.get(&key, Some(part))?;
        let bytes = bytes.ok_or_else(|| Error::Missing {
            key: key.clone(),
            needed_by: "a head".to_owned(),
        })?;
        if bytes.len() != len as usize {
            return Err(Malformed::Wrong("it is too short").of(&key));
        }
        self.read_bytes.fetch_add(u64::from(len), Ordering::Relaxed);
        Ok(bytes)
    }
}

fn part(bytes: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    bytes.get(offset as usize..)?.get(..len as usize)
}

fn other_page(pack: Name) -> Error {
    let reason = "a page in it is not the one that its leaf names";
    Malformed::Wrong(reason).of(&pack.pack_key())
}
