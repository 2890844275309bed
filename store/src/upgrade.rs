//! Upgrading a store of format 1 to format 2, where it is.
//!
//! 1. Nothing is touched if the store holds what is damaged, what a newer version
//!    wrote, or a snapshot that cannot be read whole.
//! 2. The configuration becomes that of format 2, with the feature *upgrading*. It is
//!    done while nobody has a lease: programs that know format 1 only, and processes
//!    that have opened the store before, would not understand what comes. From here on
//!    new chunks go to packs of version 2, and whoever looks for a chunk asks the index
//!    for both of its keys.
//! 3. Pack after pack is written anew under its own number, with every chunk at the
//!    same position, and renamed over the old one. So hints, index entries, and what
//!    readers and writers beside it rely on stay right, and it takes the room of one
//!    pack.
//! 4. The index gets entries with the keys of format 2, then loses those of format 1.
//! 5. The feature *upgrading* goes.
//!
//! Wherever this is interrupted, the store is whole, and the next upgrade goes on: what
//! is done is seen from the packs. No pack of version 2 is begun before the configuration
//! of step 2 is durable, whoever begins it: who wrote that may have been killed too early. Ids do not change, nor do manifests.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::chunks::Place;
use crate::error::{Damage, Error, Result};
use crate::format::config::{Config, StoreFormat};
use crate::format::entry;
use crate::gc::mark::{Marks, Reachability};
use crate::gc::{index_batch, mark_roots};
use crate::id::{ChunkKey, SnapshotId};
use crate::index::IndexReader;
use crate::lease;
use crate::lock::{self, LockKind};
use crate::pack::codec::Encoding;
use crate::pack::reader::{PackReader, Slot};
use crate::pack::writer::EncodedChunk;
use crate::pack::{Location, PackNumber, PackVersion};
use crate::placement;
use crate::progress::Progress;
use crate::repair::refuse_unknown;
use crate::rewrite::rewrite;
use crate::store::Store;
use crate::threads;

/// Chunks that are rewritten at the same time.
const BATCH_CHUNKS: usize = 1024;

/// What an upgrade did, or would do.
///
/// ```
/// use snapstore_store::{PageSize, Silent, Store, StoreFormat};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("store");
/// Store::create_in_format(&path, PageSize::default(), StoreFormat::One)?;
/// Store::upgrade(&path, false, &Silent)?;
/// assert_eq!(Store::open(&path)?.format(), StoreFormat::Two);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct UpgradeReport {
    /// The store was in the newest format already.
    pub nothing_to_do: bool,
    /// It went on with an upgrade that had been interrupted.
    pub resumed: bool,
    /// Packs that were rewritten, or are to be.
    pub packs: u64,
    /// The bytes of their files.
    pub pack_bytes: u64,
    /// The most room that is needed at a time.
    pub needs_bytes: u64,
    /// Deltas that nothing needs, and whose bases are gone: they were left out.
    pub left_out_chunks: u64,
    /// Who has to end before it can begin.
    pub in_the_way: Vec<String>,
}

impl UpgradeReport {
    fn forget_packs(&mut self) {
        self.packs = 0;
        self.pack_bytes = 0;
        self.needs_bytes = 0;
    }
}

impl Store {
    /// Upgrades the store at `path` to the newest format, or only says what there is
    /// to do: then it looks at all that an upgrade would look at first.
    ///
    /// # Errors
    /// [`Error::Busy`] while somebody reads, mounts or writes a store of format 1;
    /// [`Error::Damaged`] and [`Error::Newer`] if there is anything that it cannot
    /// read: then it has not begun, or stops where it is. I/O errors such as a full
    /// disk; then it can be continued.
    pub fn upgrade(path: &Path, dry_run: bool, progress: &dyn Progress) -> Result<UpgradeReport> {
        threads::start_pool(path)?;
        let store = Self::open(path)?;
        let _collect = match dry_run {
            true => store.collect_lock_to_read()?,
            false => Some(store.collect_lock()?),
        };
        // Somebody else may have done it meanwhile.
        let store = Self::open(path)?;
        let mut report = UpgradeReport {
            resumed: store.is_upgrading(),
            ..UpgradeReport::default()
        };
        if store.format() == StoreFormat::Two && !store.is_upgrading() {
            report.nothing_to_do = true;
            return Ok(report);
        }
        // Looked at before anything is touched.
        store.packs_to_upgrade(&mut report)?;
        // Tags first: what is published between the two would be missing from the
        // index as it was seen.
        let tagged = store.tagged()?;
        let mut reach = Reachability::of_store(&store.chunks)?;
        let mut marked = BTreeSet::new();
        // All of it has to be there: what cannot be read may be what a repair mends.
        mark_roots(&mut reach, &tagged, &mut marked, progress)?;
        if dry_run {
            if store.format() == StoreFormat::One {
                let leases = lease::live(&store.layout)?;
                report.in_the_way = leases.into_iter().map(|lease| lease.holder).collect();
            }
            return Ok(report);
        }
        if store.format() == StoreFormat::One {
            store.begin_upgrade(&mut reach, &mut marked)?;
        }
        let needed = reach.into_marks();
        let store = Self::open(path)?;
        report.forget_packs();
        let packs = store.packs_to_upgrade(&mut report)?;
        progress.begin("packs", packs.len() as u64);
        for (done, number) in (1..).zip(packs) {
            store.upgrade_pack(number, &needed, &mut report)?;
            progress.advance(done);
        }
        store.upgrade_index(progress)?;
        let _publish = store.publish_lock()?;
        let done = store.config.with_upgrading(false);
        done.write(&store.layout.config(), &store.layout.config_copy())?;
        Ok(report)
    }

    /// The packs of version 1, ascending. All have to be whole and known.
    fn packs_to_upgrade(&self, report: &mut UpgradeReport) -> Result<Vec<PackNumber>> {
        let mut old = Vec::new();
        for number in self.chunks.packs().sealed()? {
            let Some(pack) = self.chunks.packs().get(number)? else {
                continue;
            };
            if let Some(damage) = pack.problems()?.into_iter().next() {
                return Err(damage.into());
            }
            refuse_unknown(&pack)?;
            if pack.version() == PackVersion::One {
                old.push(number);
                report.packs += 1;
                report.pack_bytes += pack.file_len();
                report.needs_bytes = report.needs_bytes.max(pack.file_len());
            }
        }
        Ok(old)
    }

    fn tagged(&self) -> Result<BTreeSet<SnapshotId>> {
        Ok(self.tags()?.into_values().collect())
    }

    /// Makes the store one of format 2 that has packs of format 1.
    ///
    /// The allocate lock is held, under which leases are taken: who takes one later
    /// finds out that the format is another one than the store was opened in
    /// ([`Store::check_format`]). What was committed since the first look is marked.
    fn begin_upgrade(
        &self,
        reach: &mut Reachability<'_>,
        marked: &mut BTreeSet<SnapshotId>,
    ) -> Result<()> {
        let _publish = self.publish_lock()?;
        let allocate = lock::acquire(&self.layout, LockKind::Allocate, lock::DEFAULT_TIMEOUT)?;
        let leases = lease::live_under(&self.layout, &allocate)?;
        let holders: Vec<String> = leases.into_iter().map(|lease| lease.holder).collect();
        if !holders.is_empty() {
            return Err(Error::Busy {
                path: self.layout.leases(),
                holder: format!(
                    "{}, beside which an upgrade cannot begin: commits have to end, mounts to be undone, machines to be stopped",
                    holders.join(", ")
                ),
            });
        }
        reach.refresh()?;
        mark_roots(reach, &self.tagged()?, marked, &crate::Silent)?;
        let config = Config::new(self.page_size(), StoreFormat::Two)?;
        let config = config.with_upgrading(true);
        config.write(&self.layout.config(), &self.layout.config_copy())
    }

    /// Writes a pack of version 1 anew. Every chunk keeps its position.
    fn upgrade_pack(
        &self,
        number: PackNumber,
        needed: &Marks,
        report: &mut UpgradeReport,
    ) -> Result<()> {
        let Some(pack) = self.chunks.packs().get(number)? else {
            return Ok(());
        };
        let index = self.chunks.index()?;
        let mut writer = self.chunks.packs().create_instead(&pack)?;
        let slots = pack.scan().collect::<Result<Vec<_>>>()?;
        for batch in slots.chunks(BATCH_CHUNKS) {
            let rewritten: Vec<(EncodedChunk, Vec<u8>)> = batch
                .par_iter()
                .map(|slot| self.upgrade_chunk(&pack, *slot, &index, needed))
                .collect::<Result<_>>()?;
            let mut chunks = Vec::new();
            let mut bytes = Vec::new();
            for (chunk, stored) in rewritten {
                report.left_out_chunks += u64::from(chunk.encoding == Encoding::Absent);
                bytes.extend_from_slice(&stored);
                chunks.push(chunk);
            }
            writer.append(&chunks, bytes)?;
        }
        // Its name is taken by a rename: what it replaces is whole until then.
        let sealed = writer.seal()?;
        sealed.keep();
        self.chunks.packs().forget(number);
        Ok(())
    }

    fn upgrade_chunk(
        &self,
        pack: &Arc<PackReader>,
        slot: Slot,
        index: &IndexReader,
        needed: &Marks,
    ) -> Result<(EncodedChunk, Vec<u8>)> {
        let place = Place {
            pack: pack.clone(),
            slot,
        };
        let mut stored = Vec::new();
        match rewrite(
            &self.chunks,
            self.format(),
            &place,
            Some(index),
            &mut stored,
        ) {
            // It is dead. What it is cannot be known any more, and so not its key.
            Err(Error::Damaged(Damage::Missing { .. })) if !needed.has(place.location()) => {
                let chunk = EncodedChunk {
                    key: ChunkKey {
                        kind: slot.entry.key.kind,
                        prefix: [0; 16],
                    },
                    encoding: Encoding::Absent,
                    check: entry::stored_check(&[]),
                    len: 0,
                };
                Ok((chunk, Vec::new()))
            }
            rewritten => rewritten.map(|chunk| (chunk, stored)),
        }
    }

    /// Makes the index lead to every chunk by its new key, and then by no other. A few
    /// entries at a time: commits go on beside it.
    fn upgrade_index(&self, progress: &dyn Progress) -> Result<()> {
        let numbers = self.chunks.packs().sealed()?;
        progress.begin("index", numbers.len() as u64);
        for (done, number) in (1..).zip(numbers) {
            let Some(pack) = self.chunks.packs().get(number)? else {
                continue;
            };
            let slots = pack.scan().collect::<Result<Vec<_>>>()?;
            for slots in slots.chunks(index_batch()) {
                let found: Vec<(ChunkKey, Location)> = slots
                    .iter()
                    .map(|slot| {
                        let at = Location {
                            pack: number,
                            entry: slot.number,
                        };
                        (slot.entry.key, at)
                    })
                    .collect();
                let _publish = self.publish_lock()?;
                let index = self.index_writer()?;
                placement::enter_found(&self.chunks, &index, &found)?;
            }
            progress.advance(done);
        }
        let mut strays = Vec::new();
        for entry in self.chunks.refresh_index()?.entries() {
            let (key, at) = entry?;
            if self.chunks.at(key, at)?.is_none() {
                strays.push(key);
            }
        }
        for keys in strays.chunks(index_batch()) {
            let _publish = self.publish_lock()?;
            let index = self.index_writer()?;
            placement::remove_strays(&self.chunks, &index, keys)?;
        }
        Ok(())
    }
}
