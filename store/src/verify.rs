//! Checking a store: naming what is damaged, and which snapshots it touches.
//!
//! What a snapshot needs is looked at as a reader would look at it, by the rule
//! of [`crate::chunks`]: what the reader returns is whole, and what it does not
//! return is a finding. Then the packs are looked at for their own sake: bytes
//! that do not match are a finding even if no snapshot needs them. What is left of
//! snapshots that were collected is none: a dead delta may have lost its base, and
//! an entry of the index may lead to a pack that is gone.

use std::collections::HashMap;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::cancel::Cancel;
use crate::chunks::{Chunks, Place};
use crate::error::{Damage, Error, Result};
use crate::format::config::Config;
use crate::format::node::{Child, Node};
use crate::gc::mark::Marks;
use crate::gc::state::CollectorState;
use crate::id::{ChunkId, SnapshotId};
use crate::lock::{self, LockKind};
use crate::manifest;
use crate::pack::reader::PackReader;
use crate::pack::{Location, PackNumber};
use crate::progress::Progress;
use crate::scratch::Scratch;
use crate::store::Store;
use crate::tags;
use crate::tree::read::node_id;
use crate::users::Users;

/// One damage, and the tags of the snapshots that need what is damaged.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What is wrong.
    pub damage: Damage,
    /// The ids of the chunks that snapshots need of what is damaged, if the damage is
    /// of more than one.
    pub chunks: Vec<String>,
    /// Tags of the snapshots that need what is damaged. They cannot be read whole,
    /// with one exception: of a pack whose header, footer or seal is damaged, the
    /// chunks may still be found. What of it cannot be read has findings of its own.
    pub snapshots: Vec<String>,
}

/// What a verification looked at and found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct VerifyReport {
    /// Packs looked at.
    pub packs: u64,
    /// Chunks whose stored bytes were read and checked.
    pub chunks_read: u64,
    /// Bytes of stored chunks that were read.
    pub bytes_read: u64,
    /// Tagged snapshots whose references were all followed.
    pub snapshots: u64,
    /// Entries of the index that lead to no chunk. They are harmless; `gc` and
    /// `repair` remove them.
    pub stale_index_entries: u64,
    /// What is damaged.
    pub findings: Vec<Finding>,
    /// What only a newer version can read, and could not be looked at.
    pub newer: Vec<String>,
    /// The place of each damage among the findings.
    #[serde(skip)]
    known: HashMap<Damage, usize>,
}

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
        self.verify_config(report)?;
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
        for entry in index.entries() {
            match entry {
                Ok((key, at)) => match self.chunks.at(key, at) {
                    Ok(None) => report.stale_index_entries += 1,
                    // A pack that cannot be read has a finding of its own.
                    Ok(Some(_)) | Err(Error::Damaged(_) | Error::Newer { .. }) => {}
                    Err(other) => return Err(other),
                },
                Err(error) => return report.add(error, &[]),
            }
        }
        Ok(())
    }
}

/// Why a chunk cannot be read. Kept, since other snapshots may need it too.
#[derive(Clone)]
enum Lost {
    Damaged(Damage),
    Newer {
        path: PathBuf,
        what: String,
        version: u32,
    },
}

impl Lost {
    fn of(error: Error) -> Result<Self> {
        match error {
            Error::Damaged(damage) => Ok(Self::Damaged(damage)),
            Error::Newer {
                path,
                what,
                version,
            } => Ok(Self::Newer {
                path,
                what,
                version,
            }),
            other => Err(other),
        }
    }

    fn into_error(self) -> Error {
        match self {
            Self::Damaged(damage) => damage.into(),
            Self::Newer {
                path,
                what,
                version,
            } => Error::Newer {
                path,
                what,
                version,
            },
        }
    }
}

/// Follows the references of one snapshot after the other, skipping subtrees
/// found whole before.
struct Walker<'a> {
    chunks: &'a Chunks,
    cancel: &'a Cancel,
    read_data: bool,
    /// The places of chunks whose bytes were found right.
    whole: Marks,
    /// The places of nodes below which all is whole.
    clean: Marks,
    /// References whose chunks the reader does not return. Another reference to
    /// the same chunk may hint at a better copy.
    failed: HashMap<(ChunkId, Option<Location>), Lost>,
    /// What the present snapshot lacks.
    lost: Vec<(Lost, ChunkId)>,
}

impl Walker<'_> {
    fn snapshot(&mut self, id: SnapshotId) -> Result<()> {
        let manifest = match manifest::read(self.chunks, id) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.lost.push((Lost::of(error)?, id.chunk()));
                return Ok(());
            }
        };
        for image in &manifest.images {
            if let Some(root) = image.tree().root() {
                self.walk(root, image.tree().shape().root_level())?;
            }
        }
        Ok(())
    }

    /// Returns whether all below is whole.
    fn walk(&mut self, child: Child, level: u8) -> Result<bool> {
        self.cancel.check()?;
        let id = node_id(child);
        if let Some(lost) = self.failed.get(&(id, child.hint)) {
            self.lost.push((lost.clone(), id));
            return Ok(false);
        }
        let (node, at) = match self.chunks.node_and_place(child, level) {
            Ok(found) => found,
            Err(error) => {
                let error = self.told_as_the_pack_tells(id, child.hint, error);
                self.fail(id, child.hint, error)?;
                return Ok(false);
            }
        };
        if self.clean.has(at) {
            return Ok(true);
        }
        let whole = if level == 0 {
            self.pages(&node)?
        } else {
            let mut whole = true;
            for (_, below) in node.present() {
                whole &= self.walk(below, level - 1)?;
            }
            whole
        };
        if whole {
            self.clean.set(at);
        }
        Ok(whole)
    }

    fn pages(&mut self, leaf: &Node) -> Result<bool> {
        let pages: Vec<(ChunkId, Child)> = leaf
            .present()
            .map(|(_, page)| (leaf.child_id(page), page))
            .collect();
        let this: &Self = self;
        let looked: Vec<_> = pages
            .into_par_iter()
            .map(|(id, page)| (id, page.hint, this.page(id, page)))
            .collect();
        let mut whole = true;
        for (id, hint, found) in looked {
            match found {
                Ok(Some(at)) => {
                    self.whole.set(at);
                }
                Ok(None) => {}
                Err(error) => {
                    whole = false;
                    self.fail(id, hint, error)?;
                }
            }
        }
        Ok(whole)
    }

    /// Looks at a page as the reader would; returns the place if its bytes were
    /// found right there for the first time.
    fn page(&self, id: ChunkId, page: Child) -> Result<Option<Location>> {
        if let Some(lost) = self.failed.get(&(id, page.hint)) {
            return Err(lost.clone().into_error());
        }
        let found = self.chunks.readable(id, page.hint)?;
        let at = found.place.location();
        if !self.read_data || self.whole.has(at) {
            return Ok(None);
        }
        if self.chunks.check_id_at(&found.place, id).is_ok() {
            return Ok(Some(at));
        }
        // Another place, or another copy of the base, may serve the reader; what
        // is wrong with this place is found when its pack is looked at.
        let mut bytes = Scratch::zeroed(self.chunks.page_size().len());
        match self.chunks.read(id, page.hint, &mut bytes) {
            Ok(_) => Ok(None),
            Err(error) => Err(self.told_as_the_pack_tells(id, page.hint, error)),
        }
    }

    /// The damage of a chunk in the words in which the look at its pack tells it,
    /// so that it is one finding.
    fn told_as_the_pack_tells(&self, id: ChunkId, hint: Option<Location>, error: Error) -> Error {
        if !matches!(error, Error::Damaged(Damage::Chunk { .. })) {
            return error;
        }
        let found = self.chunks.readable(id, hint);
        match found.and_then(|found| self.chunks.check_id_at(&found.place, id)) {
            Err(told @ Error::Damaged(Damage::Chunk { .. })) => told,
            _ => error,
        }
    }

    fn fail(&mut self, id: ChunkId, hint: Option<Location>, error: Error) -> Result<()> {
        let lost = Lost::of(error)?;
        self.failed.insert((id, hint), lost.clone());
        self.lost.push((lost, id));
        Ok(())
    }
}

impl VerifyReport {
    /// Records damage, and what a newer version wrote; anything else is an error
    /// of the verification itself.
    fn add(&mut self, error: Error, tags: &[String]) -> Result<()> {
        self.find(error, tags).map(|_| ())
    }

    /// The same for what keeps a chunk from being read.
    fn add_loss(&mut self, error: Error, chunk: ChunkId, tags: &[String]) -> Result<()> {
        let is_of_many = matches!(
            error,
            Error::Damaged(Damage::Footer { .. } | Damage::Pack { .. })
        );
        let chunk = chunk.to_string();
        if let Some(finding) = self.find(error, tags)?
            && is_of_many
            && !finding.chunks.contains(&chunk)
        {
            finding.chunks.push(chunk);
        }
        Ok(())
    }

    fn find(&mut self, error: Error, tags: &[String]) -> Result<Option<&mut Finding>> {
        let damage = match error {
            Error::Damaged(damage) => damage,
            Error::Newer { .. } => {
                let message = error.to_string();
                if !self.newer.contains(&message) {
                    self.newer.push(message);
                }
                return Ok(None);
            }
            Error::Index { path, message } => Damage::Index {
                path,
                reason: message,
            },
            other => return Err(other),
        };
        let position = *self.known.entry(damage.clone()).or_insert_with(|| {
            self.findings.push(Finding {
                damage,
                chunks: Vec::new(),
                snapshots: Vec::new(),
            });
            self.findings.len() - 1
        });
        let finding = &mut self.findings[position];
        for tag in tags {
            if !finding.snapshots.contains(tag) {
                finding.snapshots.push(tag.clone());
            }
        }
        Ok(Some(finding))
    }
}
