//! What those who read a snapshot on this host touched first: kept beside the packs, and read
//! before the next one asks for it.
//!
//! ```text
//! cache/BUCKET/SNAPSHOT.IMAGE.set    a sealed object (SNAPWSET): what `working-sets/` of a store has
//! ```
//! Nothing of it is made durable: one that is lost or damaged is recorded anew. What was not
//! written for 90 days goes.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use snapstore_store::{WorkingSet, check_tag};

use crate::head::{Head, decode_leaf};
use crate::lazy::blocks::{Blocks, PackRef, Read};
use crate::lazy::cache::blocks_of;
use crate::lazy::places::Places;
use crate::protocol::{seal, unseal};

const MAGIC: [u8; 8] = *b"SNAPWSET";
const SUFFIX: &str = "set";
/// 65 536 pages take less.
const LONGEST_BYTES: u64 = 4 << 20;
const KEPT: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// Pages of a leaf.
const FAN_OUT: u64 = 512;

/// What was recorded of a snapshot.
#[derive(Debug)]
pub struct Recorded {
    dir: PathBuf,
    snapshot: String,
}

impl Recorded {
    /// In the directory of a bucket's cache.
    pub fn of(dir: &Path, snapshot: &[u8; 32]) -> Self {
        Self {
            dir: dir.to_owned(),
            snapshot: crate::remote::hex(snapshot),
        }
    }

    /// That of an image, if there is one that can be read.
    pub fn read(&self, image: &str) -> Option<WorkingSet> {
        let name = self.name(image)?;
        let path = self.dir.join(&name);
        let found = fs::symlink_metadata(&path).ok()?;
        if !found.is_file() || found.len() > LONGEST_BYTES {
            return None;
        }
        let bytes = fs::read(&path).ok()?;
        WorkingSet::from_bytes(unseal(MAGIC, &name, &bytes).ok()?)
    }

    /// Keeps that of an image, and lets go of old ones.
    pub fn keep(&self, image: &str, set: &WorkingSet) -> io::Result<()> {
        forget_old(&self.dir);
        let name = self.name(image).ok_or(io::ErrorKind::InvalidInput)?;
        let part = format!("{:032x}.{SUFFIX}", crate::random()?);
        let (path, part) = (self.dir.join(&name), self.dir.join(part));
        let bytes = seal(MAGIC, &name, &set.to_bytes());
        let written = fs::File::create_new(&part)
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| fs::rename(&part, path));
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written
    }

    /// Of a file. An image's name comes from the bucket.
    fn name(&self, image: &str) -> Option<String> {
        check_tag(image).ok()?;
        Some(format!("{}.{image}.{SUFFIX}", self.snapshot))
    }
}

/// What is older, or was never finished, is of no use.
fn forget_old(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|suffix| suffix != SUFFIX) {
            continue;
        }
        let written = entry.metadata().and_then(|found| found.modified());
        let age = written.map(|written| SystemTime::now().duration_since(written));
        if age.is_ok_and(|age| age.is_ok_and(|age| age > KEPT)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Pages of a leaf that are to be brought, once its record is here.
#[derive(Clone, Debug)]
pub struct Touched {
    places: Arc<Places>,
    leaf: [u8; 32],
    slots: BTreeSet<usize>,
}

/// A part of a pack, in blocks.
pub type PartAt = (Arc<PackRef>, Range<u64>);

/// The leaves with the pages that were touched first, in the order in which they were.
pub fn touched(recorded: &Recorded, head: &Head, places: &Arc<Places>) -> Vec<Touched> {
    let mut found: Vec<Touched> = Vec::new();
    for tree in &head.trees {
        let Some(set) = recorded.read(&tree.image).filter(WorkingSet::is_trusted) else {
            continue;
        };
        let leaves = head.leaves_of(&tree.image);
        let mut at: HashMap<[u8; 32], usize> = HashMap::new();
        for page in set.pages().map(u64::from) {
            // What is all zeros is in no leaf.
            let Some(leaf) = leaves.get(&(page / FAN_OUT)) else {
                continue;
            };
            let at = *at.entry(*leaf).or_insert(found.len());
            if at == found.len() {
                found.push(Touched {
                    places: places.clone(),
                    leaf: *leaf,
                    slots: BTreeSet::new(),
                });
            }
            let slot = usize::try_from(page % FAN_OUT).expect("below 512");
            found[at].slots.insert(slot);
        }
    }
    found
}

impl Touched {
    /// Where the leaf's record is.
    pub fn record(&self) -> Option<PartAt> {
        let (pack, range) = self.places.record(&self.leaf)?;
        let blocks = blocks_of(&range);
        let pack = self.places.packs[pack].pack.clone();
        Some((pack, *blocks.start()..*blocks.end() + 1))
    }

    /// Where the pages are, if the record is here.
    pub fn pages(&self, blocks: &Blocks) -> Vec<PartAt> {
        let Some((pack, range)) = self.places.record(&self.leaf) else {
            return Vec::new();
        };
        let pack = &self.places.packs[pack].pack;
        let Ok(Read::Bytes { bytes, .. }) = blocks.read(pack, &range, &range, false) else {
            return Vec::new();
        };
        // Whoever needs a record that is damaged is told.
        let Ok((node, places)) = decode_leaf(&self.leaf, &bytes) else {
            return Vec::new();
        };
        let pages = node.children.iter().zip(places);
        let pages = pages.filter(|((slot, _), _)| self.slots.contains(slot));
        let parts = self.places.parts_of(pages.map(|(_, place)| place));
        let parts = parts.into_iter();
        let named = parts.map(|(pack, blocks)| (self.places.packs[pack].pack.clone(), blocks));
        named.collect()
    }
}
