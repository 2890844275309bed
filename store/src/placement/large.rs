//! Entering a pack of very many chunks while others wait for the publish lock for a
//! moment only.
//!
//! What [`super::enter_new`] looks up under the lock is looked up before it is taken, and
//! the entries are written to a file that the index only has to take over. Under the lock
//! the rule is applied anew to what may have changed since: to chunks whose entries
//! changed, and to those whose entries lead to a pack that was condemned, revived or
//! deleted since. A pack can be deleted only after it was condemned, and repair, which
//! sets packs aside, makes another index. So what is entered is what the rule says at that
//! moment. If too much has changed nothing is entered, and it is worked out again, or
//! the chunks are entered a few at a time: they need not all be entered at once, since
//! no snapshot needs them yet.

use std::collections::BTreeMap;

use super::worked_out::{LOOKED_UP, WorkedOut};
use super::{entered_at_once, leads_to_any, replaces};
use crate::chunks::Chunks;
use crate::error::{Error, Result};
use crate::gc::state::Condemned;
use crate::id::ChunkKey;
use crate::index::{IndexWriter, PreparedFor};
use crate::pack::PackNumber;
use crate::pack::writer::{SealedPack, StoredChunk};
use crate::sim::{self, Fault};

/// A pack whose entries are worked out.
pub(crate) struct LargePack<'a> {
    chunks: &'a Chunks,
    pack: &'a SealedPack,
    /// The entries that are taken, and what was condemned when that was worked out.
    worked_out: WorkedOut,
    condemned: BTreeMap<PackNumber, Condemned>,
    /// All chunks, by key.
    all: Vec<StoredChunk>,
    /// Chunks that the index leads to elsewhere, by the pack there.
    elsewhere: BTreeMap<PackNumber, Vec<StoredChunk>>,
}

impl<'a> LargePack<'a> {
    /// Works out what is to be entered. `condemned` is what was a moment ago. The caller
    /// has a writer's lease and no lock.
    pub fn prepare(
        chunks: &'a Chunks,
        condemned: BTreeMap<PackNumber, Condemned>,
        pack: &'a SealedPack,
    ) -> Result<Self> {
        let view = chunks.refresh_index()?;
        let mut all: Vec<StoredChunk> = pack.chunks().collect();
        all.sort_unstable_by_key(|chunk| chunk.key);
        let mut chosen = Vec::new();
        let mut elsewhere: BTreeMap<PackNumber, Vec<StoredChunk>> = BTreeMap::new();
        for part in all.chunks(LOOKED_UP) {
            let keys: Vec<ChunkKey> = part.iter().map(|chunk| chunk.key).collect();
            for (chunk, now) in part.iter().zip(view.get_many(&keys)?) {
                if replaces(chunks, &*view, &condemned, chunk, now)? {
                    chosen.push((chunk.key, Some(chunk.at)));
                }
                if let Some(now) = now {
                    elsewhere.entry(now.pack).or_default().push(*chunk);
                }
            }
        }
        Ok(Self {
            worked_out: WorkedOut::prepare(view, PreparedFor::Pack(pack.number), chosen)?,
            chunks,
            pack,
            condemned,
            all,
            elsewhere,
        })
    }

    /// Enters the chunks, durably. The caller holds the publish lock. False: too much has
    /// changed, and nothing was entered.
    pub fn enter(
        self,
        index: &IndexWriter,
        condemned: &BTreeMap<PackNumber, Condemned>,
    ) -> Result<bool> {
        let Some(again) = self.in_doubt(index, condemned)? else {
            return Ok(false);
        };
        let over = self
            .worked_out
            .look_again(index, again.keys().copied(), |key, now| {
                let Some(chunk) = again.get(&key) else {
                    return Ok(None);
                };
                let replaces = replaces(self.chunks, index, condemned, chunk, now)?;
                Ok(replaces.then_some(Some(chunk.at)))
            })?;
        let Some(over) = over else {
            return Ok(false);
        };
        if !sim::on(Fault::LargePackNotKept) {
            self.pack.keep();
        }
        let first = self.worked_out.first();
        let taken = self.worked_out.make(index, over);
        let is_full = taken.as_ref().is_err_and(Error::is_full_disk);
        // All of a file is taken, or nothing.
        let first: Vec<_> = first
            .and_then(|(key, at)| Some((key, at?)))
            .into_iter()
            .collect();
        if is_full && !leads_to_any(self.chunks, &first)? {
            self.pack.give_up();
        }
        taken
    }

    /// The chunks that the rule may say something else of by now; `None` if they are too
    /// many.
    fn in_doubt(
        &self,
        index: &IndexWriter,
        condemned: &BTreeMap<PackNumber, Condemned>,
    ) -> Result<Option<BTreeMap<ChunkKey, StoredChunk>>> {
        let changed = index.changed_since(&self.worked_out.view)?;
        let Some(changed) = changed else {
            return Ok(None);
        };
        let mut again: BTreeMap<ChunkKey, StoredChunk> = BTreeMap::new();
        for key in changed {
            if let Ok(at) = self.all.binary_search_by_key(&key, |chunk| chunk.key) {
                again.insert(key, self.all[at]);
            }
        }
        for (pack, there) in &self.elsewhere {
            if condemned.get(pack) != self.condemned.get(pack) {
                again.extend(there.iter().map(|chunk| (chunk.key, *chunk)));
            }
        }
        let few = again.len() <= entered_at_once();
        Ok(few.then_some(again))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::chunk_writer::ChunkWriter;
    use crate::id::{ChunkId, ChunkKind};
    use crate::page::PageSize;
    use crate::store::Store;

    /// Stores pages of these bytes; a writer and what it has sealed.
    fn sealed<'a>(store: &'a Store, fills: &[u8]) -> (ChunkWriter<'a>, SealedPack) {
        let mut sink = ChunkWriter::new(store).unwrap();
        for fill in fills {
            let page = [*fill; 4096];
            sink.put(ChunkKind::Page.hash(&page), &page, None).unwrap();
        }
        let pack = sink.seal().unwrap().unwrap();
        (sink, pack)
    }

    fn key(store: &Store, fill: u8) -> ChunkKey {
        let id: ChunkId = ChunkKind::Page.hash(&[fill; 4096]);
        store.chunks.keys().of(id)
    }

    fn leads_to(store: &Store, fill: u8) -> u32 {
        let index = store.chunks.refresh_index().unwrap();
        index.get(key(store, fill)).unwrap().unwrap().pack.0
    }

    fn new_store(dir: &tempfile::TempDir) -> Store {
        Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap()
    }

    #[test]
    fn what_another_commit_has_entered_since_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (_sink, pack) = sealed(&store, &[1, 2, 3]);
        let large = LargePack::prepare(&store.chunks, BTreeMap::new(), &pack).unwrap();
        let (other, others) = sealed(&store, &[2, 4]);
        let publish = store.publish_lock().unwrap();
        other.publish_pack(Some(&others)).unwrap();
        let index = store.index_writer().unwrap();
        assert!(!large.enter(&index, &BTreeMap::new()).unwrap());
        drop((index, publish));
        let large = LargePack::prepare(&store.chunks, BTreeMap::new(), &pack).unwrap();
        let publish = store.publish_lock().unwrap();
        // This has to lie over what is taken.
        let (last, lasts) = sealed(&store, &[5]);
        last.publish_pack(Some(&lasts)).unwrap();
        let index = store.index_writer().unwrap();
        assert!(large.enter(&index, &BTreeMap::new()).unwrap());
        drop((index, publish));
        assert_eq!(leads_to(&store, 5), lasts.number.0);
        let found = [1, 2, 3, 4].map(|fill| leads_to(&store, fill));
        let (ours, theirs) = (pack.number.0, others.number.0);
        assert_eq!(found, [ours, theirs, ours, theirs]);
    }

    #[test]
    fn what_has_gone_since_is_looked_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (other, others) = sealed(&store, &[2, 4]);
        let (_sink, pack) = sealed(&store, &[1, 2]);
        let publish = store.publish_lock().unwrap();
        other.publish_pack(Some(&others)).unwrap();
        drop(publish);
        let state = Condemned {
            epoch: crate::gc::state::Epoch::FIRST,
            identity: None,
        };
        let condemned = BTreeMap::from([(others.number, state)]);
        // It was condemned and is not any more, or the other way round.
        for (before, now, expected) in [
            (condemned.clone(), BTreeMap::new(), None),
            (BTreeMap::new(), BTreeMap::new(), Some(others.number.0)),
            (BTreeMap::new(), condemned, Some(pack.number.0)),
        ] {
            let large = LargePack::prepare(&store.chunks, before, &pack).unwrap();
            let _publish = store.publish_lock().unwrap();
            let index = store.index_writer().unwrap();
            let entered = large.enter(&index, &now).unwrap();
            assert_eq!(entered, expected.is_some());
            if let Some(expected) = expected {
                assert_eq!(leads_to(&store, 2), expected);
            }
        }
    }

    #[test]
    fn where_too_much_has_changed_nothing_is_entered_and_nothing_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (_sink, pack) = sealed(&store, &[1, 2]);
        let large = LargePack::prepare(&store.chunks, BTreeMap::new(), &pack).unwrap();
        let _publish = store.publish_lock().unwrap();
        let (_other, others) = sealed(&store, &[9]);
        let second = LargePack::prepare(&store.chunks, BTreeMap::new(), &others).unwrap();
        let index = store.index_writer().unwrap();
        assert!(second.enter(&index, &BTreeMap::new()).unwrap());
        let index = store.index_writer().unwrap();
        assert!(!large.enter(&index, &BTreeMap::new()).unwrap());
        let index = store.chunks.refresh_index().unwrap();
        assert_eq!(index.get(key(&store, 1)).unwrap(), None);
        assert_eq!(written(&store), 0);
    }

    /// How many files of entries there are that the index has not taken over.
    fn written(store: &Store) -> usize {
        let files = std::fs::read_dir(store.path().join("index")).unwrap();
        let names = files.map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.to_string_lossy().starts_with("entries-"))
            .count()
    }

    #[test]
    fn what_a_killed_commit_has_written_is_swept_once_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (sink, pack) = sealed(&store, &[1, 2]);
        let large = LargePack::prepare(&store.chunks, BTreeMap::new(), &pack).unwrap();
        // Its process is killed: nothing is dropped.
        let _killed = std::mem::ManuallyDrop::new(large);
        let gc = || store.gc(crate::GcOptions::default(), &crate::Silent);
        gc().unwrap();
        assert_eq!(written(&store), 1, "its pack is locked");
        drop((pack, sink));
        gc().unwrap();
        assert_eq!(written(&store), 0);
    }
}
