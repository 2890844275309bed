//! Following the references of snapshots, as their readers would.

use std::collections::HashMap;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::cancel::Cancel;
use crate::chunks::Chunks;
use crate::error::{Damage, Error, Result};
use crate::format::node::{Child, Node};
use crate::gc::mark::Marks;
use crate::id::{ChunkId, SnapshotId};
use crate::manifest;
use crate::pack::Location;
use crate::scratch::Scratch;
use crate::tree::read::node_id;

/// Why a chunk cannot be read. Kept, since other snapshots may need it too.
#[derive(Clone)]
pub(super) enum Lost {
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

    pub fn into_error(self) -> Error {
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
pub(super) struct Walker<'a> {
    pub chunks: &'a Chunks,
    pub cancel: &'a Cancel,
    pub read_data: bool,
    /// The places of chunks whose bytes were found right.
    pub whole: Marks,
    /// The places of nodes below which all is whole.
    pub clean: Marks,
    /// References whose chunks the reader does not return. Another reference to
    /// the same chunk may hint at a better copy.
    pub failed: HashMap<(ChunkId, Option<Location>), Lost>,
    /// What the present snapshot lacks.
    pub lost: Vec<(Lost, ChunkId)>,
}

impl Walker<'_> {
    pub fn snapshot(&mut self, id: SnapshotId) -> Result<()> {
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
