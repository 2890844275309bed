//! What a push lays apart: the working set, in a pack of its own, which is read from one end
//! to the other before anybody asks for it: pages in the order in which those who restored
//! the snapshot touched them, and before the first page of each leaf the leaf's record.
//!
//! A page in it is nowhere else in the bucket for its snapshot's sake, but an ancestor may
//! have it in another pack, too: a pack that is read as a whole is worth these bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use snapstore_store::{Parts, SnapshotId, Store};

use crate::head::{First, Head, LeafPlace, PagePlace, most_record_len, record_len};
use crate::pack::{PACK_HEAD_LEN, PackBytes};
use crate::protocol::Name;

/// The most of a working set that is laid apart.
const MOST_BYTES: u64 = 64 << 20;
/// Pages of a leaf.
const FAN_OUT: u64 = 512;

/// Which pages are to be laid apart.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Of leaves, by image and number: slots, and when each is touched.
    leaves: HashMap<(String, u64), BTreeMap<usize, usize>>,
    /// What the store has recorded, by image.
    pub sets: Vec<(String, Vec<u8>)>,
}

/// A leaf that is laid apart.
#[derive(Debug)]
struct Leaf {
    id: [u8; 32],
    canonical: Vec<u8>,
    /// Where its pages are; `None` for those that are laid apart, too.
    places: Vec<([u8; 32], Option<PagePlace>)>,
}

/// What is laid apart so far.
#[derive(Debug, Default)]
pub struct Apart {
    leaves: Vec<Leaf>,
    ids: HashSet<[u8; 32]>,
    /// By when they are touched: the number of the leaf, and the page's id.
    pages: BTreeMap<usize, (usize, [u8; 32])>,
    bytes: HashMap<[u8; 32], (u8, Vec<u8>)>,
}

impl Wanted {
    /// What the store has recorded of a snapshot, if it is of use. A record that cannot be
    /// read is as good as none.
    pub fn of(store: &Store, parts: &Parts<'_>) -> Self {
        let mut wanted = Self::default();
        let (mut left_bytes, mut touched) = (MOST_BYTES, 0);
        let page_bytes = store.page_size().bytes();
        for image in parts.manifest().images.iter().map(|image| &image.name) {
            let Some(set) = trusted(store, parts.id(), image) else {
                continue;
            };
            for page in set.pages().map(u64::from) {
                let key = (image.clone(), page / FAN_OUT);
                let is_new = !wanted.leaves.contains_key(&key);
                let takes = page_bytes + if is_new { most_record_len() } else { 0 };
                if takes > left_bytes {
                    break;
                }
                left_bytes -= takes;
                let slot = usize::try_from(page % FAN_OUT).expect("below 512");
                wanted.leaves.entry(key).or_default().insert(slot, touched);
                touched += 1;
            }
            wanted.sets.push((image.clone(), set.to_bytes()));
        }
        wanted
    }

    /// Whether a push of the snapshot with this head would lay something apart.
    pub fn is_of(&self, head: &Head) -> bool {
        let images = self.sets.iter().map(|(image, _)| image);
        images.into_iter().any(|image| {
            let leaves = head.leaves_of(image);
            let mut numbers = leaves.keys();
            numbers.any(|leaf| self.slots(image, *leaf).is_some())
        })
    }

    /// Of a leaf, the slots of pages that are laid apart, and when each is touched.
    pub fn slots(&self, image: &str, leaf: u64) -> Option<&BTreeMap<usize, usize>> {
        self.leaves.get(&(image.to_owned(), leaf))
    }
}

fn trusted(store: &Store, id: SnapshotId, image: &str) -> Option<snapstore_store::WorkingSet> {
    let set = store.working_set(id, image);
    let warn = |error: &_| tracing::warn!(%error, "a working set is not pushed");
    let set = set.inspect_err(warn).ok().flatten()?;
    // One of parts alone is too little to be read first.
    let is_whole = set.recordings() > 0;
    (is_whole && set.is_trusted() && set.pages().next().is_some()).then_some(set)
}

impl Apart {
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Whether this leaf is.
    pub fn has(&self, id: &[u8; 32]) -> bool {
        self.ids.contains(id)
    }

    /// A page that is touched then, of the leaf that is added next.
    pub fn add_page(&mut self, touched: usize, id: [u8; 32], encoding: u8, bytes: Vec<u8>) {
        self.pages.insert(touched, (self.leaves.len(), id));
        self.bytes.insert(id, (encoding, bytes));
    }

    /// A leaf, with the places of those pages that are elsewhere.
    pub fn add_leaf(
        &mut self,
        id: [u8; 32],
        canonical: Vec<u8>,
        places: Vec<([u8; 32], Option<PagePlace>)>,
    ) {
        self.ids.insert(id);
        self.leaves.push(Leaf {
            id,
            canonical,
            places,
        });
    }

    /// The pack, and where its leaves are.
    pub fn into_pack(self, name: Name) -> (PackBytes, Vec<([u8; 32], LeafPlace)>) {
        let mut order = Vec::new();
        let mut places: HashMap<[u8; 32], PagePlace> = HashMap::new();
        let mut is_placed = vec![false; self.leaves.len()];
        let mut end = PACK_HEAD_LEN;
        let touched = self.pages.values().map(|(leaf, id)| (*leaf, Some(*id)));
        // Of the last ones nothing is there to be touched.
        let all = (0..self.leaves.len()).map(|leaf| (leaf, None));
        for (leaf, page) in touched.chain(all) {
            if !std::mem::replace(&mut is_placed[leaf], true) {
                order.push(Part::Record(leaf));
                end += self.leaves[leaf].record_len(name);
            }
            if let Some(id) = page.filter(|id| !places.contains_key(id)) {
                let (encoding, bytes) = &self.bytes[&id];
                places.insert(id, PagePlace::new(name, end, bytes.len(), *encoding));
                order.push(Part::Page(id));
                end += bytes.len();
            }
        }
        let mut pack = PackBytes::new(name);
        let mut leaves = Vec::new();
        for part in order {
            match part {
                Part::Record(leaf) => {
                    let leaf = &self.leaves[leaf];
                    let pages = leaf.places.iter();
                    let pages: Vec<_> = pages
                        .map(|(id, place)| (*id, Ok(place.unwrap_or_else(|| places[id]))))
                        .collect();
                    leaves.push((leaf.id, pack.add(&leaf.canonical, &pages).0));
                }
                Part::Page(id) => {
                    let (encoding, bytes) = &self.bytes[&id];
                    let at = pack.add_page(id, *encoding, bytes);
                    debug_assert_eq!(at, places[&id]);
                }
            }
        }
        (pack, leaves)
    }
}

/// What a pack holds.
enum Part {
    /// Of the leaf with this number.
    Record(usize),
    Page([u8; 32]),
}

impl Leaf {
    /// How long its record is, if what is laid apart of it is in this pack.
    fn record_len(&self, name: Name) -> usize {
        let elsewhere = self.places.iter().filter_map(|(_, place)| *place);
        let mut packs: BTreeSet<Name> = elsewhere.map(|place| place.pack).collect();
        if self.places.iter().any(|(_, place)| place.is_none()) {
            packs.insert(name);
        }
        record_len(self.canonical.len(), packs.len(), self.places.len())
    }
}

/// What a head says of it.
pub fn first(pack: &PackBytes, wanted: &Wanted) -> First {
    First {
        pack: pack.name,
        end: u32::try_from(pack.groups_end()).expect("a pack is far below 4 GiB"),
        lengths: BTreeMap::new(),
        sets: wanted.sets.clone(),
    }
}
