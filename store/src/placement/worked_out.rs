//! Very many changes of the index while others wait for the publish lock for a moment
//! only.
//!
//! What the changes are is worked out before the lock is taken, from a view of the index,
//! and they are written to a file that the index only has to take over. Under the lock the
//! rule is applied anew to the entries that may have changed since the view was opened. If
//! they have changed too much nothing is entered, and it is worked out again, or the
//! changes are made a few at a time.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Copies, copy_replaces};
use crate::chunks::Chunks;
use crate::error::Result;
use crate::id::ChunkKey;
use crate::index::{IndexReader, IndexWriter, Prepared, PreparedFor};
use crate::pack::{Location, PackNumber};

/// Keys that are looked up at a time.
pub(super) const LOOKED_UP: usize = 4096;
/// How often changes are worked out before they are made a few at a time: somebody else
/// changes the index all the time.
pub(crate) const PREPARED_AT_MOST: u32 = 2;

/// A change of an entry: where it is to lead; `None` removes it.
type Change = Option<Location>;

/// Changes that are worked out and written.
pub(super) struct WorkedOut {
    pub view: Arc<IndexReader>,
    /// By key, each once.
    changes: Vec<(ChunkKey, Change)>,
    prepared: Prepared,
}

impl WorkedOut {
    /// Writes changes that were worked out from this view.
    pub fn prepare(
        view: Arc<IndexReader>,
        made_for: PreparedFor,
        changes: Vec<(ChunkKey, Change)>,
    ) -> Result<Self> {
        Ok(Self {
            prepared: view.prepare(made_for, &changes)?,
            view,
            changes,
        })
    }

    /// The first change, if there is any.
    pub fn first(&self) -> Option<(ChunkKey, Change)> {
        self.changes.first().copied()
    }

    /// What is to lie over the changes, by the rule at this moment. `rule` says of each of
    /// the keys in `doubtful` what is to become of an entry that leads to a place now:
    /// `None` if it stays. The caller holds the publish lock. `None`: too much has changed.
    pub fn look_again(
        &self,
        index: &IndexWriter,
        doubtful: impl IntoIterator<Item = ChunkKey>,
        mut rule: impl FnMut(ChunkKey, Option<Location>) -> Result<Option<Change>>,
    ) -> Result<Option<Vec<(ChunkKey, Change)>>> {
        let mut over = Vec::new();
        for key in doubtful {
            match rule(key, index.get(key)?)? {
                Some(change) => over.push((key, change)),
                None if self.has(key) => return Ok(None),
                None => {}
            }
        }
        Ok(Some(over))
    }

    /// Makes the changes, durably, and those over them. The caller holds the publish lock
    /// since it has looked again. False: somebody is in the way, and nothing was done.
    pub fn make(self, index: &IndexWriter, over: Vec<(ChunkKey, Change)>) -> Result<bool> {
        if !index.take(self.prepared)? {
            return Ok(false);
        }
        if !over.is_empty() {
            let (put, removed): (Vec<_>, Vec<_>) = over.into_iter().partition(|it| it.1.is_some());
            index.put(put.into_iter().filter_map(|(key, to)| Some((key, to?))))?;
            index.remove_if(removed.into_iter().map(|(key, _)| key), |_| true)?;
            index.flush()?;
        }
        Ok(true)
    }

    fn has(&self, key: ChunkKey) -> bool {
        self.changes.binary_search_by_key(&key, |it| it.0).is_ok()
    }
}

/// The copies of a whole pack.
pub(crate) struct ManyCopies<'a> {
    chunks: &'a Chunks,
    copies: &'a Copies<'a>,
    worked_out: WorkedOut,
}

impl<'a> ManyCopies<'a> {
    /// Works out what [`super::enter_copies`] would do with the copies in pack `to`, whose
    /// file the caller holds locked. The caller collects, and has no lock beside that.
    pub fn prepare(chunks: &'a Chunks, to: PackNumber, copies: &'a Copies<'a>) -> Result<Self> {
        let view = chunks.refresh_index()?;
        let mut changes = Vec::new();
        for part in copies.moved().chunks(LOOKED_UP) {
            let keys: Vec<ChunkKey> = part.iter().map(|chunk| chunk.key).collect();
            for (chunk, now) in part.iter().zip(view.get_many(&keys)?) {
                if copy_replaces(chunks, chunk, copies.going, now)? {
                    changes.push((chunk.key, Some(chunk.to)));
                }
            }
        }
        Ok(Self {
            chunks,
            copies,
            worked_out: WorkedOut::prepare(view, PreparedFor::Pack(to), changes)?,
        })
    }

    /// Points the index at the copies, durably. The caller holds the publish lock. False:
    /// too much has changed, and nothing was entered.
    ///
    /// Where an entry leads to what it led to before, the rule says what it said: only
    /// this collection deletes packs, and a repair makes another index.
    pub fn enter(self, index: &IndexWriter) -> Result<bool> {
        let Some(changed) = index.changed_since(&self.worked_out.view)? else {
            return Ok(false);
        };
        let (chunks, copies) = (self.chunks, self.copies);
        let over = self.worked_out.look_again(index, changed, |key, now| {
            let Some(chunk) = copies.of(key) else {
                return Ok(None);
            };
            let replaces = copy_replaces(chunks, chunk, copies.going, now)?;
            Ok(replaces.then_some(Some(chunk.to)))
        })?;
        over.map_or(Ok(false), |over| self.worked_out.make(index, over))
    }
}

/// Entries that lead to packs which are gone.
pub(crate) struct ManyGone {
    packs: BTreeSet<PackNumber>,
    worked_out: WorkedOut,
}

impl ManyGone {
    /// Works out that the entries of `view` which lead to these packs are to be removed.
    /// They are sorted by key.
    pub fn prepare(view: Arc<IndexReader>, astray: &[(ChunkKey, PackNumber)]) -> Result<Self> {
        let changes = astray.iter().map(|(key, _)| (*key, None)).collect();
        Ok(Self {
            packs: astray.iter().map(|(_, pack)| *pack).collect(),
            worked_out: WorkedOut::prepare(view, PreparedFor::Removal, changes)?,
        })
    }

    /// Removes them, durably, if all those packs are gone still. The caller holds the
    /// publish lock. False: something has changed, and nothing was removed.
    pub fn remove(
        self,
        index: &IndexWriter,
        mut is_gone: impl FnMut(PackNumber) -> Result<bool>,
    ) -> Result<bool> {
        for pack in &self.packs {
            if !is_gone(*pack)? {
                return Ok(false);
            }
        }
        let Some(changed) = index.changed_since(&self.worked_out.view)? else {
            return Ok(false);
        };
        let packs = &self.packs;
        let over = self.worked_out.look_again(index, changed, |_, now| {
            let leads_there = now.is_some_and(|at| packs.contains(&at.pack));
            Ok(leads_there.then_some(None))
        })?;
        over.map_or(Ok(false), |over| self.worked_out.make(index, over))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::chunk_writer::ChunkWriter;
    use crate::id::{ChunkId, ChunkKind};
    use crate::index::Lookup as _;
    use crate::pack::EntryNumber;
    use crate::pack::writer::SealedPack;
    use crate::page::PageSize;
    use crate::placement::Moved;
    use crate::store::Store;

    /// Stores pages of these bytes, and has them entered by a commit.
    fn entered(store: &Store, fills: &[u8]) -> SealedPack {
        let mut sink = ChunkWriter::new(store).unwrap();
        for fill in fills {
            let page = [*fill; 4096];
            sink.put(ChunkKind::Page.hash(&page), &page, None).unwrap();
        }
        let pack = sink.seal().unwrap().unwrap();
        let _publish = store.publish_lock().unwrap();
        sink.publish_pack(Some(&pack)).unwrap();
        pack
    }

    fn key(store: &Store, fill: u8) -> ChunkKey {
        let id: ChunkId = ChunkKind::Page.hash(&[fill; 4096]);
        store.chunks.keys().of(id)
    }

    fn leads_to(store: &Store, fill: u8) -> Option<Location> {
        let index = store.chunks.refresh_index().unwrap();
        index.look_up(key(store, fill)).unwrap()
    }

    fn new_store(dir: &tempfile::TempDir) -> Store {
        Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap()
    }

    const TO: PackNumber = PackNumber(900);

    fn moved(store: &Store, fill: u8, from: Location, standalone: bool) -> Moved {
        let to = Location {
            pack: TO,
            entry: EntryNumber(u32::from(fill) + 100 * u32::from(standalone)),
        };
        Moved {
            key: key(store, fill),
            from,
            to,
            standalone,
        }
    }

    fn enter(store: &Store, many: ManyCopies<'_>) -> bool {
        let _publish = store.publish_lock().unwrap();
        many.enter(&store.index_writer().unwrap()).unwrap()
    }

    #[test]
    fn copies_take_the_entries_of_what_they_were_copied_from_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (from, other) = (entered(&store, &[1, 2]), entered(&store, &[3, 4]));
        let at = |fill| leads_to(&store, fill).unwrap();
        let elsewhere = Location {
            pack: from.number,
            entry: EntryNumber(77),
        };
        let all = vec![
            moved(&store, 1, at(1), true),
            // Its entry leads to another copy, which stays.
            moved(&store, 3, elsewhere, true),
            // Two copies: the one that decodes alone counts.
            moved(&store, 2, at(2), true),
            moved(&store, 2, elsewhere, false),
            // It has no entry.
            moved(&store, 9, elsewhere, true),
        ];
        let stays = at(3);
        let going = BTreeSet::from([from.number]);
        let copies = Copies::new(all.clone(), &going);
        let many = ManyCopies::prepare(&store.chunks, TO, &copies).unwrap();
        assert!(enter(&store, many));
        for fill in [1, 2, 9] {
            let to = leads_to(&store, fill).unwrap();
            assert_eq!((to.pack, to.entry.0), (TO, u32::from(fill) + 100));
        }
        assert_eq!(leads_to(&store, 3), Some(stays));
        // That pack goes, too.
        let going = BTreeSet::from([from.number, other.number]);
        let copies = Copies::new(all, &going);
        let many = ManyCopies::prepare(&store.chunks, TO, &copies).unwrap();
        assert!(enter(&store, many));
        assert_eq!(leads_to(&store, 3).unwrap().pack, TO);
    }

    #[test]
    fn what_a_commit_has_entered_since_is_looked_at_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let from = entered(&store, &[1, 2]);
        let at = |fill| leads_to(&store, fill).unwrap();
        let gone = Location {
            pack: PackNumber(800),
            entry: EntryNumber(0),
        };
        let all = vec![moved(&store, 1, at(1), true), moved(&store, 5, gone, true)];
        let going = BTreeSet::from([from.number]);
        let copies = Copies::new(all, &going);
        let many = ManyCopies::prepare(&store.chunks, TO, &copies).unwrap();
        let since = entered(&store, &[5]);
        assert!(!enter(&store, many), "the commit's own copy is there");
        assert_eq!(at(1).pack, from.number, "all or nothing");
        let many = ManyCopies::prepare(&store.chunks, TO, &copies).unwrap();
        assert!(enter(&store, many));
        assert_eq!((at(1).pack, at(5).pack), (TO, since.number));
    }

    #[test]
    fn only_entries_that_lead_to_what_is_gone_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let (one, two) = (entered(&store, &[1, 2]), entered(&store, &[3]));
        let mut astray = [1, 2].map(|fill| (key(&store, fill), one.number));
        astray.sort_unstable();
        let remove = |is_gone: bool| {
            let view = store.chunks.refresh_index().unwrap();
            let many = ManyGone::prepare(view, &astray).unwrap();
            let _publish = store.publish_lock().unwrap();
            let index = store.index_writer().unwrap();
            many.remove(&index, |_| Ok(is_gone)).unwrap()
        };
        assert!(!remove(false), "the pack is there again");
        assert!(leads_to(&store, 1).is_some());
        assert!(remove(true));
        assert_eq!([1, 2].map(|fill| leads_to(&store, fill)), [None, None]);
        assert_eq!(leads_to(&store, 3).unwrap().pack, two.number);
        let left = std::fs::read_dir(store.path().join("index")).unwrap();
        let left = left.filter(|it| {
            let name = it.as_ref().unwrap().file_name();
            name.to_string_lossy().starts_with("entries-")
        });
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn an_entry_that_leads_elsewhere_by_now_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        let astray = vec![(key(&store, 5), PackNumber(800))];
        let view = store.chunks.refresh_index().unwrap();
        let many = ManyGone::prepare(view, &astray).unwrap();
        let since = entered(&store, &[5]);
        let publish = store.publish_lock().unwrap();
        let index = store.index_writer().unwrap();
        assert!(!many.remove(&index, |_| Ok(true)).unwrap());
        drop((index, publish));
        assert_eq!(leads_to(&store, 5).unwrap().pack, since.number);
    }
}
