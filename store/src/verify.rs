//! Checking a store: naming what is damaged, and which snapshots it touches.

use std::collections::HashSet;

use rayon::prelude::*;

use crate::chunks::Chunks;
use crate::error::{Damage, Error, Result};
use crate::gc::mark::{Marks, Places};
use crate::gc::state::CollectorState;
use crate::id::ChunkKind;
use crate::manifest;
use crate::pack::format::Entry;
use crate::pack::reader::{PackReader, Stored, payload_limit};
use crate::pack::{EntryNumber, Location};
use crate::progress::Progress;
use crate::store::Store;
use crate::tags;
use crate::tree::node::{Child, canonical_len};
use crate::tree::read::node_id;

/// One damage, and the tags of the snapshots that need what is damaged.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What is wrong.
    pub damage: Damage,
    /// Tags of the snapshots that cannot be read whole because of it.
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
    /// What is damaged.
    pub findings: Vec<Finding>,
}

impl Store {
    /// Checks every footer, every index entry and every reference; with
    /// `read_data` also every stored byte.
    ///
    /// # Errors
    /// I/O errors and [`Error::Busy`]; damage is not an error but a finding.
    pub fn verify(&self, read_data: bool, progress: &dyn Progress) -> Result<VerifyReport> {
        // A collection moves and deletes packs: what it does must not look like
        // damage.
        let _collect = self.collect_lock()?;
        let mut report = VerifyReport::default();
        let mut damaged = Marks::default();
        let mut chunk_findings: Vec<(Location, Damage)> = Vec::new();
        self.verify_state(&mut report)?;
        let numbers = self.chunks.packs().sealed()?;
        progress.begin("packs", numbers.len() as u64);
        for (done, number) in (1..).zip(numbers) {
            report.packs += 1;
            match self.chunks.packs().get(number) {
                Ok(Some(pack)) if read_data => {
                    let found = self.verify_pack(&pack, &mut report);
                    for (at, damage) in found {
                        damaged.set(at);
                        chunk_findings.push((at, damage));
                    }
                }
                Ok(_) => {}
                Err(error) => report.add(error, Vec::new())?,
            }
            progress.advance(done);
        }
        self.verify_index(&mut report)?;
        self.verify_snapshots(&damaged, chunk_findings, &mut report, progress)?;
        Ok(report)
    }

    fn verify_state(&self, report: &mut VerifyReport) -> Result<()> {
        if let Err(error) = CollectorState::read(&self.layout) {
            report.add(error, Vec::new())?;
        }
        for (name, id) in tags::each(&self.layout)? {
            if let Err(error) = id {
                report.add(error, vec![name])?;
            }
        }
        Ok(())
    }

    /// Reads every stored chunk of a pack.
    fn verify_pack(&self, pack: &PackReader, report: &mut VerifyReport) -> Vec<(Location, Damage)> {
        let entries: Vec<(EntryNumber, Entry)> = pack.entries().collect();
        report.chunks_read += entries.len() as u64;
        report.bytes_read += entries
            .iter()
            .map(|(number, entry)| pack.stored_bytes(*number, *entry).bytes.len() as u64)
            .sum::<u64>();
        entries
            .par_iter()
            .filter_map(|(number, entry)| {
                let stored = pack.stored_bytes(*number, *entry);
                match check_stored(&self.chunks, pack, stored) {
                    Err(Error::Damaged(damage)) => {
                        let at = Location {
                            pack: pack.number(),
                            entry: *number,
                        };
                        Some((at, damage))
                    }
                    _ => None,
                }
            })
            .collect()
    }

    /// Every index entry leads to a chunk of its key.
    fn verify_index(&self, report: &mut VerifyReport) -> Result<()> {
        let index = match self.chunks.refresh_index() {
            Ok(index) => index,
            Err(error) => return report.add(error, Vec::new()),
        };
        let mut astray = 0_u64;
        for entry in index.entries() {
            match entry {
                Ok((key, at)) => {
                    let pack = self.chunks.packs().get(at.pack);
                    let leads_there = match &pack {
                        Ok(Some(pack)) => pack.stored(at.entry, key).is_some(),
                        Ok(None) => false,
                        // The pack has a finding of its own.
                        Err(_) => true,
                    };
                    astray += u64::from(!leads_there);
                }
                Err(error) => return report.add(error, Vec::new()),
            }
        }
        if astray > 0 {
            let damage = Damage::Index {
                path: self.layout.index(),
                reason: format!("{astray} entries lead to chunks that are not there"),
            };
            report.add(damage.into(), Vec::new())?;
        }
        Ok(())
    }

    /// Follows every reference of every tagged snapshot.
    fn verify_snapshots(
        &self,
        damaged: &Marks,
        chunk_findings: Vec<(Location, Damage)>,
        report: &mut VerifyReport,
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut touched: Vec<(Location, Damage, Vec<String>)> = chunk_findings
            .into_iter()
            .map(|(at, damage)| (at, damage, Vec::new()))
            .collect();
        let tags = tags::each(&self.layout)?;
        progress.begin("snapshots", tags.len() as u64);
        let Ok(places) = Places::few(&self.chunks) else {
            // Without an index nothing can be followed; that is reported already.
            return touched
                .into_iter()
                .try_for_each(|(_, damage, tags)| report.add(damage.into(), tags));
        };
        let mut walker = Walker {
            places,
            damaged,
            clean: HashSet::new(),
            hit: HashSet::new(),
            errors: Vec::new(),
        };
        for (done, (tag, id)) in (1..).zip(tags) {
            let Ok(id) = id else { continue };
            walker.hit.clear();
            match manifest::read(&self.chunks, id) {
                Ok(manifest) => {
                    for image in &manifest.images {
                        if let Some(root) = image.tree().root() {
                            walker.walk(root, image.tree().shape().root_level());
                        }
                    }
                }
                Err(error) => walker.errors.push(error),
            }
            walker.check(id.chunk(), None);
            for (at, _, tags) in &mut touched {
                if walker.hit.contains(at) {
                    tags.push(tag.clone());
                }
            }
            for error in walker.errors.drain(..) {
                report.add(error, vec![tag.clone()])?;
            }
            report.snapshots += 1;
            progress.advance(done);
        }
        for (_, damage, tags) in touched {
            report.add(damage.into(), tags)?;
        }
        Ok(())
    }
}

/// Follows the references of one snapshot after the other, skipping subtrees
/// found whole before.
struct Walker<'a> {
    places: Places<'a>,
    damaged: &'a Marks,
    clean: HashSet<[u8; 32]>,
    /// Damaged chunks that the present snapshot needs.
    hit: HashSet<Location>,
    errors: Vec<Error>,
}

impl Walker<'_> {
    /// Returns whether all below is whole.
    fn walk(&mut self, child: Child, level: u8) -> bool {
        if self.clean.contains(&child.hash) {
            return true;
        }
        let mut whole = self.check(node_id(child), child.hint);
        match self.places.chunks().node(child, level) {
            Ok(node) => {
                for (_, below) in node.present() {
                    whole &= if level == 0 {
                        self.check(node.child_id(below), below.hint)
                    } else {
                        self.walk(below, level - 1)
                    };
                }
            }
            Err(error) => {
                // A damaged node is a finding of its own once its pack is read.
                if whole {
                    self.errors.push(error);
                }
                whole = false;
            }
        }
        if whole {
            self.clean.insert(child.hash);
        }
        whole
    }

    /// Whether a chunk and its base are in the store and not known as damaged.
    fn check(&mut self, id: crate::id::ChunkId, hint: Option<Location>) -> bool {
        let place = match self.places.find(id.key(), hint) {
            Ok(place) => place,
            Err(error) => {
                self.errors.push(error);
                return false;
            }
        };
        let mut whole = self.is_clean(place.location());
        let base = place
            .pack
            .stored(place.entry, id.key())
            .and_then(|stored| stored.base());
        if let Some(base) = base {
            match self.places.find(base.id.key(), Some(base.hint)) {
                Ok(place) => whole &= self.is_clean(place.location()),
                Err(error) => {
                    self.errors.push(error);
                    whole = false;
                }
            }
        }
        whole
    }

    fn is_clean(&mut self, at: Location) -> bool {
        let damaged = self.damaged.has(at);
        if damaged {
            self.hit.insert(at);
        }
        !damaged
    }
}

impl VerifyReport {
    /// Records damage; anything else is an error of the verification itself.
    fn add(&mut self, error: Error, tags: Vec<String>) -> Result<()> {
        let damage = match error {
            Error::Damaged(damage) => damage,
            Error::Index { path, message } => Damage::Index {
                path,
                reason: message,
            },
            other => return Err(other),
        };
        let known = self
            .findings
            .iter_mut()
            .find(|known| known.damage == damage);
        match known {
            Some(known) => known.snapshots.extend(tags),
            None => self.findings.push(Finding {
                damage,
                snapshots: tags,
            }),
        }
        Ok(())
    }
}

/// Checks a chunk's stored bytes against the footer's check, and its payload
/// against its key.
pub(crate) fn check_stored(chunks: &Chunks, pack: &PackReader, stored: Stored<'_>) -> Result<()> {
    let damaged = |reason| pack.damaged(stored.entry, reason);
    if !stored.passes_check() {
        return Err(damaged("its stored bytes do not match the footer"));
    }
    let kind = stored.entry.key.kind;
    let limit = payload_limit(kind, chunks.page_size());
    let mut base = Vec::new();
    if let Some(reference) = stored.base() {
        base.resize(limit, 0);
        let len = chunks.read(reference.id, Some(reference.hint), &mut base)?;
        base.truncate(len);
    }
    let mut payload = vec![0; limit];
    let len = stored
        .decode(&base, &mut payload)
        .ok_or_else(|| damaged("it does not decode"))?;
    let hashed = match kind {
        ChunkKind::Node => {
            canonical_len(&payload[..len]).ok_or_else(|| damaged("it is no tree node"))?
        }
        ChunkKind::Page | ChunkKind::Manifest => len,
    };
    if kind.hash(&payload[..hashed]).key() != stored.entry.key {
        return Err(damaged("its bytes do not match its id"));
    }
    Ok(())
}
