//! Checking a store: naming what is damaged, and which snapshots it touches.
//!
//! What a snapshot needs is looked at as a reader would look at it, by the rule
//! of [`crate::chunks`]: what the reader returns is whole, and what it does not
//! return is a finding. Then the packs are looked at for their own sake: bytes
//! that do not match are a finding even if no snapshot needs them. What is left of
//! snapshots that were collected is none: a dead delta may have lost its base, and
//! an entry of the index may lead to a pack that is gone.

mod report;
mod walker;

use std::collections::HashMap;

use rayon::prelude::*;

use crate::chunks::Place;
use crate::error::{Damage, Error, Result};
use crate::format::config::Config;
use crate::gc::mark::Marks;
use crate::gc::rewrites::Ledger;
use crate::gc::state::CollectorState;
use crate::id::ChunkKey;
use crate::lock::{self, LockKind};
use crate::opening;
use crate::pack::reader::PackReader;
use crate::pack::{Location, PackNumber};
use crate::progress::Progress;
use crate::regular;
use crate::store::Store;
use crate::tags;
use crate::users::Users;
pub use report::{Finding, NotChecked, VerifyReport};
use walker::Walker;

/// Entries of the index that are looked up together, in 28 MiB.
const INDEX_ENTRIES_AT_ONCE: usize = 1 << 20;

impl Store {
    /// Checks every footer, every index entry and every reference; with
    /// `read_data` also every stored byte.
    ///
    /// # Errors
    /// I/O errors and [`Error::Busy`]; damage is not an error but a finding.
    pub fn verify(&self, read_data: bool, progress: &dyn Progress) -> Result<VerifyReport> {
        self.in_pool(|| self.verify_in_pool(read_data, progress))
    }

    fn verify_in_pool(&self, read_data: bool, progress: &dyn Progress) -> Result<VerifyReport> {
        // A collection moves and deletes packs: what it does must not look like
        // damage.
        let _collect = self.collect_lock_to_read()?;
        // What another process has deleted is not there, though it may be open here.
        self.chunks.packs().reopen_all();
        let mut report = VerifyReport::default();
        self.verify_state(&mut report)?;
        let mut walker = Walker {
            chunks: &self.chunks,
            cancel: &self.cancel,
            read_data,
            whole: Marks::default(),
            clean: Marks::default(),
            failed: HashMap::new(),
            lost: Vec::new(),
            harmless: Vec::new(),
        };
        self.verify_snapshots(&mut walker, &mut report, progress)?;
        let bad = self.verify_packs(&walker, &mut report, progress)?;
        self.name_users(bad, &mut report)?;
        self.verify_index(&mut report)?;
        Ok(report)
    }

    fn verify_state(&self, report: &mut VerifyReport) -> Result<()> {
        if let Err(error) = CollectorState::read(&self.layout) {
            report.add(error, &[])?;
        }
        if let Err(error) = Ledger::read(&self.layout) {
            report.add(error, &[])?;
        }
        self.verify_config(report)?;
        self.verify_counter(report)?;
        for path in opening::no_directories_beside(&self.layout) {
            let reason = opening::NO_DIRECTORY;
            report.add(Damage::File { path, reason }.into(), &[])?;
        }
        for lock in LockKind::ALL {
            if let Err(error) = lock::check(&self.layout, lock) {
                report.add(error, &[])?;
            }
        }
        let tags = match tags::each(&self.layout) {
            // Which tags there were is not known.
            Err(error @ Error::Damaged(_)) => return report.add(error, &[]),
            other => other?,
        };
        for (name, id) in tags {
            if let Err(error) = id {
                report.add(error, &[name])?;
            }
        }
        Ok(())
    }

    /// The configuration is whole, or the store would not have been opened.
    fn verify_config(&self, report: &mut VerifyReport) -> Result<()> {
        if self.config.two.is_none() {
            return Ok(());
        }
        let path = self.layout.config_copy();
        let wrong = match Config::read(&path) {
            // An upgrade that ends changes one after the other.
            Ok(Some(copy)) if copy.with_upgrading(false) == self.config.with_upgrading(false) => {
                return Ok(());
            }
            Ok(Some(_)) => "it is not what the configuration is",
            Ok(None) => "it is missing",
            Err(error) => return report.add(error, &[]),
        };
        report.add(
            Damage::File {
                path,
                reason: wrong,
            }
            .into(),
            &[],
        )
    }

    /// That the counter of packs is a file. What is in it does no harm.
    fn verify_counter(&self, report: &mut VerifyReport) -> Result<()> {
        let path = self.layout.locks().join("next-pack");
        match regular::oddity(&path) {
            Some(reason) => report.add(Damage::File { path, reason }.into(), &[]),
            None => Ok(()),
        }
    }

    /// Follows every reference of every tagged snapshot.
    fn verify_snapshots(
        &self,
        walker: &mut Walker<'_>,
        report: &mut VerifyReport,
        progress: &dyn Progress,
    ) -> Result<()> {
        let tags = match tags::each(&self.layout) {
            // It is a finding already.
            Err(Error::Damaged(_)) => return Ok(()),
            other => other?,
        };
        if let Err(error) = self.chunks.refresh_index() {
            let names: Vec<_> = tags.iter().map(|(name, _)| name.clone()).collect();
            return report.add(error, &names);
        }
        progress.begin("snapshots", tags.len() as u64);
        for (done, (tag, id)) in (1..).zip(tags) {
            let Ok(id) = id else { continue };
            walker.snapshot(id)?;
            for (error, chunk) in walker.lost.drain(..) {
                report.add_loss(error.into_error(), chunk, std::slice::from_ref(&tag))?;
            }
            for damage in walker.harmless.drain(..) {
                report.add_harmless(damage.into(), std::slice::from_ref(&tag))?;
            }
            report.snapshots += 1;
            progress.advance(done);
        }
        Ok(())
    }

    /// Checks footers, and with `read_data` the chunks that no snapshot has shown
    /// to be whole. Returns the packs that are damaged as a whole.
    fn verify_packs(
        &self,
        walker: &Walker<'_>,
        report: &mut VerifyReport,
        progress: &dyn Progress,
    ) -> Result<Vec<(PackNumber, Error)>> {
        let mut bad = Vec::new();
        let numbers = self.chunks.packs().sealed()?;
        progress.begin("packs", numbers.len() as u64);
        for (done, number) in (1..).zip(numbers) {
            self.cancel.check()?;
            report.packs += 1;
            match self.chunks.packs().get(number) {
                Ok(Some(pack)) => {
                    for damage in pack.problems()? {
                        match damage {
                            // The tags that lose something by it are known.
                            Damage::Footer { .. } => report.add(damage.into(), &[])?,
                            damage => bad.push((number, damage.into())),
                        }
                    }
                    if walker.read_data {
                        self.verify_chunks(&pack, walker, report)?;
                    }
                }
                Ok(None) => {}
                Err(error) => bad.push((number, error)),
            }
            progress.advance(done);
        }
        Ok(bad)
    }

    /// Reports damaged packs, with the tags of the snapshots that have parts there.
    fn name_users(&self, bad: Vec<(PackNumber, Error)>, report: &mut VerifyReport) -> Result<()> {
        if bad.is_empty() {
            return Ok(());
        }
        let numbers = bad.iter().map(|(number, _)| *number).collect();
        let mut users = Users::new(&self.chunks, &numbers);
        let mut tags_of: HashMap<PackNumber, Vec<String>> = HashMap::new();
        let mut tags = match tags::each(&self.layout) {
            Err(Error::Damaged(_)) => Vec::new(),
            other => other?,
        };
        tags.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (tag, id) in tags {
            let Ok(id) = id else { continue };
            for number in users.snapshot(id)? {
                tags_of.entry(number).or_default().push(tag.clone());
            }
        }
        for (number, error) in bad {
            let tags = tags_of.get(&number).map_or(&[][..], Vec::as_slice);
            report.add(error, tags)?;
        }
        Ok(())
    }

    fn verify_chunks(
        &self,
        pack: &std::sync::Arc<PackReader>,
        walker: &Walker<'_>,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let mut places = Vec::new();
        for slot in pack.scan() {
            match slot {
                Ok(slot) => {
                    report.chunks_read += 1;
                    report.bytes_read += slot.stored_len();
                    places.push(Place {
                        pack: pack.clone(),
                        slot,
                    });
                }
                // That of the footer is a finding already.
                Err(Error::Damaged(_)) => {}
                Err(other) => return Err(other),
            }
        }
        let errors: Vec<(&Place, Error)> = places
            .par_iter()
            .filter(|place| !walker.whole.has(place.location()))
            .filter_map(|place| Some((place, self.chunks.check_at(place).err()?)))
            .collect();
        for (place, error) in errors {
            match error {
                // Of the base, which has a finding of its own.
                Error::Damaged(damage) if !place.is_told_by(&damage) => {}
                other => report.add(other, &[])?,
            }
        }
        Ok(())
    }

    /// Reads the whole index, which RocksDB checks, and counts what leads nowhere.
    fn verify_index(&self, report: &mut VerifyReport) -> Result<()> {
        let index = match self.chunks.refresh_index() {
            Ok(index) => index,
            Err(error) => return report.add(error, &[]),
        };
        let mut entries = index.entries();
        let mut batch: Vec<(ChunkKey, Location)> = Vec::new();
        loop {
            let mut broken = None;
            batch.clear();
            for entry in entries.by_ref().take(INDEX_ENTRIES_AT_ONCE) {
                match entry {
                    Ok(entry) => batch.push(entry),
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
            }
            if batch.is_empty() && broken.is_none() {
                return Ok(());
            }
            report.stale_index_entries += self.count_stale(&mut batch)?;
            if let Some(error) = broken {
                return report.add(error, &[]);
            }
        }
    }

    /// How many of these entries lead nowhere. The index is sorted by key, which is in
    /// no order of the packs: here each block of a footer is read once for all of them.
    fn count_stale(&self, entries: &mut [(ChunkKey, Location)]) -> Result<u64> {
        entries.sort_unstable_by_key(|(_, at)| *at);
        let mut stale = 0;
        for (key, at) in entries {
            self.cancel.check()?;
            match self.chunks.at(*key, *at) {
                Ok(None) => stale += 1,
                // A pack that cannot be read has a finding of its own.
                Ok(Some(_)) => {}
                Err(error) if error.is_lost() => {}
                Err(other) => return Err(other),
            }
        }
        Ok(stale)
    }
}
