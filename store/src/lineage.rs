//! What chains of snapshots have in common: how much is stored for each of them, and how
//! much of that for no other one.

use std::collections::HashMap;
use std::sync::Arc;

use crate::chunks::Place;
use crate::error::{Error, Result};
use crate::format::entry::ENTRY_LEN;
use crate::format::node::Child;
use crate::gc::mark::ChunkLocator;
use crate::id::ChunkId;
use crate::pack::{Location, PackNumber};
use crate::retention::Group;
use crate::snapshots::TaggedSnapshot;
use crate::store::Store;
use crate::tree::read::node_id;

/// Numbers about one chain: snapshots with the same oldest known ancestor.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct ChainStats {
    /// The chain's name: the first tag of its oldest snapshot.
    pub chain: String,
    /// Its tags, oldest snapshot first.
    pub tags: Vec<String>,
    /// Bytes in pages that are not zero, of all its snapshots added up.
    pub nonzero_bytes: u64,
    /// Bytes in packs that it needs.
    pub needed_stored_bytes: u64,
    /// Of these, bytes that no other chain needs.
    pub exclusive_stored_bytes: u64,
}

/// What [`Store::lineages`] found.
#[derive(Debug, Default)]
pub struct Lineages {
    /// The chains, oldest first.
    pub chains: Vec<ChainStats>,
    /// Tags of snapshots that cannot be read whole. What they need is counted as far as it
    /// can be seen.
    pub unreadable: Vec<(String, Arc<Error>)>,
}

impl Store {
    /// What each chain needs of what is stored, and what of that no other one needs. Takes time
    /// in proportion to the chunks of all chains.
    ///
    /// ```
    /// use snapstore_store::{PageSize, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
    /// for chain in store.lineages()?.chains {
    ///     let shared = chain.needed_stored_bytes - chain.exclusive_stored_bytes;
    ///     println!("{} shares {shared} bytes with others", chain.chain);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// I/O errors, and damage of the index or of the directory of tags.
    pub fn lineages(&self) -> Result<Lineages> {
        // A collection moves chunks while they are counted.
        let _collect = self.collect_lock_to_read()?;
        let listing = self.listing()?;
        let unreadable = listing.unreadable.into_iter();
        let unreadable = unreadable.map(|(tag, error)| (tag, Arc::new(error)));
        let mut found = Lineages {
            chains: Vec::new(),
            unreadable: unreadable.collect(),
        };
        let mut members: Vec<Vec<&TaggedSnapshot>> = Vec::new();
        let mut numbers: HashMap<String, usize> = HashMap::new();
        let groups = Group::Chain.of_each(&listing.snapshots);
        for (snapshot, chain) in listing.snapshots.iter().zip(groups) {
            let number = *numbers.entry(chain.clone()).or_insert_with(|| {
                found.chains.push(ChainStats {
                    chain,
                    ..ChainStats::default()
                });
                members.push(Vec::new());
                members.len() - 1
            });
            members[number].push(snapshot);
        }
        let mut count = Count::new(self, members.len())?;
        for (number, snapshots) in members.iter().enumerate() {
            for snapshot in snapshots {
                self.cancel.check()?;
                let stats = &mut found.chains[number];
                stats.tags.push(snapshot.tag.clone());
                let images = snapshot.manifest.images.iter();
                let pages: u64 = images.map(|image| image.nonzero_pages).sum();
                stats.nonzero_bytes += pages * self.page_size().bytes();
                let chain = u32::try_from(number).expect("tags are counted in 32 bits");
                match count.visit(snapshot, chain) {
                    Err(error) if error.is_of_what_is_stored() => {
                        found
                            .unreadable
                            .push((snapshot.tag.clone(), Arc::new(error)));
                    }
                    other => other?,
                }
            }
        }
        for (number, stats) in found.chains.iter_mut().enumerate() {
            stats.needed_stored_bytes = count.needed[number];
            stats.exclusive_stored_bytes = count.exclusive[number];
        }
        Ok(found)
    }
}

const SEVERAL: u32 = u32::MAX;
const NONE: u32 = u32::MAX - 1;

/// Which chains need an entry of a pack.
#[derive(Clone, Copy)]
struct Needs {
    /// The only one, or several.
    by: u32,
    /// The one that is counted now, if it needs the entry. Chains are counted one after
    /// the other.
    counted: u32,
    /// The one whose walk has been below this node.
    entered: u32,
}

struct Count<'a> {
    places: ChunkLocator<'a>,
    entries: HashMap<PackNumber, Vec<Needs>>,
    needed: Vec<u64>,
    exclusive: Vec<u64>,
}

impl<'a> Count<'a> {
    fn new(store: &'a Store, chains: usize) -> Result<Self> {
        Ok(Self {
            places: ChunkLocator::all(&store.chunks)?,
            entries: HashMap::new(),
            needed: vec![0; chains],
            exclusive: vec![0; chains],
        })
    }

    fn visit(&mut self, snapshot: &TaggedSnapshot, chain: u32) -> Result<()> {
        self.chunk(snapshot.id.chunk(), None, chain)?;
        for image in &snapshot.manifest.images {
            let tree = image.tree();
            if let Some(root) = tree.root() {
                self.walk(root, tree.shape().root_level(), chain)?;
            }
        }
        Ok(())
    }

    fn walk(&mut self, child: Child, level: u8, chain: u32) -> Result<()> {
        let at = self.chunk(node_id(child), child.hint, chain)?;
        if self.entry(at).entered == chain {
            return Ok(());
        }
        let node = self.places.chunks().node(child, level)?;
        for (_, below) in node.present() {
            if level == 0 {
                self.chunk(node.child_id(below), below.hint, chain)?;
            } else {
                self.walk(below, level - 1, chain)?;
            }
        }
        self.entry(at).entered = chain;
        Ok(())
    }

    /// Counts a chunk and its base. Returns where the chunk is.
    fn chunk(&mut self, id: ChunkId, hint: Option<Location>, chain: u32) -> Result<Location> {
        let found = self.places.find(id, hint)?;
        for place in found.base.iter().chain([&found.place]) {
            self.place(place, chain);
        }
        Ok(found.place.location())
    }

    fn place(&mut self, place: &Place, chain: u32) {
        let bytes = place.slot.stored_len() + ENTRY_LEN as u64;
        let needs = self.entry(place.location());
        if needs.counted == chain {
            return;
        }
        needs.counted = chain;
        let before = needs.by;
        needs.by = match before {
            NONE => chain,
            _ => SEVERAL,
        };
        self.needed[chain as usize] += bytes;
        match before {
            NONE => self.exclusive[chain as usize] += bytes,
            SEVERAL => {}
            other => self.exclusive[other as usize] -= bytes,
        }
    }

    fn entry(&mut self, at: Location) -> &mut Needs {
        let position = at.entry.0 as usize;
        let entries = self.entries.entry(at.pack).or_default();
        if entries.len() <= position {
            let nobody = Needs {
                by: NONE,
                counted: NONE,
                entered: NONE,
            };
            entries.resize(position + 1, nobody);
        }
        &mut entries[position]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::input::{Input, InputData, InputKind};
    use crate::commit::{CommitRequest, ParentChoice};
    use crate::manifest::ImageRole;
    use crate::page::PageSize;
    use crate::progress::Silent;

    fn commit(store: &Store, tag: &str, parent: Option<&str>, fills: &[u64]) {
        let page = |seed: &u64| {
            let mut bytes = vec![0; 4096];
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes());
            hasher.finalize_xof().fill(&mut bytes);
            bytes
        };
        let bytes: Vec<u8> = fills.iter().flat_map(page).collect();
        let request = CommitRequest {
            tag: tag.to_owned(),
            parent: match parent {
                Some(parent) => ParentChoice::Named(parent.to_owned()),
                None => ParentChoice::Nothing,
            },
            inputs: vec![Input {
                name: "memory".to_owned(),
                role: ImageRole::Memory,
                data: InputData::Bytes(bytes.into()),
                kind: InputKind::Full,
            }],
            ..CommitRequest::default()
        };
        store.commit(&request, &Silent).unwrap();
    }

    #[test]
    fn chains_share_what_both_need_and_own_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        commit(&store, "a", None, &[1, 2, 3]);
        commit(&store, "a+1", Some("a"), &[1, 2, 4]);
        commit(&store, "b", None, &[1, 5]);
        commit(&store, "c", None, &[1, 6]);
        let found = store.lineages().unwrap();
        assert!(found.unreadable.is_empty());
        let [a, b, c] = &found.chains[..] else {
            panic!("{found:?}");
        };
        assert_eq!((a.chain.as_str(), a.tags.len()), ("a", 2));
        assert_eq!(a.nonzero_bytes, 6 * 4096);
        // Noise does not get smaller: page 1 is shared by all three, by b and c too,
        // which come after it was known to be shared.
        let pages = |bytes: u64| bytes / 4096;
        for (chain, needed, exclusive) in [(a, 4, 3), (b, 2, 1), (c, 2, 1)] {
            assert_eq!(pages(chain.needed_stored_bytes), needed, "{chain:?}");
            assert_eq!(pages(chain.exclusive_stored_bytes), exclusive, "{chain:?}");
        }
        let stats = store.stats().unwrap();
        let needed = stats.page_stored_bytes + stats.metadata_stored_bytes;
        let exclusive: u64 = found
            .chains
            .iter()
            .map(|it| it.exclusive_stored_bytes)
            .sum();
        let shared = b.needed_stored_bytes - b.exclusive_stored_bytes;
        assert_eq!(exclusive + shared, needed);
    }
}
