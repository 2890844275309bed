//! Following the references of snapshots, as their readers would.

use std::collections::HashMap;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::cancel::Cancel;
use crate::chunks::{Chunks, Place};
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
    Denied {
        path: PathBuf,
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
            Error::Denied { path } => Ok(Self::Denied { path }),
            Error::Index { path, message } => Ok(Self::Damaged(Damage::Index {
                path,
                reason: message,
            })),
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
            Self::Denied { path } => Error::Denied { path },
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
    /// What is damaged of the present snapshot's chunks, and keeps none of them from
    /// being read.
    pub harmless: Vec<Damage>,
}

/// What a look at a page has shown.
enum Looked {
    /// Its bytes were found right here for the first time.
    Whole(Location),
    /// Nothing new.
    AsKnown,
    /// A reader gets it, though what is stored here is damaged.
    Harmless(Damage),
}

impl Walker<'_> {
    pub fn snapshot(&mut self, id: SnapshotId) -> Result<()> {
        let manifest = match manifest::read(self.chunks, id) {
            Ok(manifest) => manifest,
            Err(error) => {
                let lost = self.why(id.chunk(), None, error)?;
                self.lost.push((lost, id.chunk()));
                return Ok(());
            }
        };
        self.look_at_bytes(id.chunk(), None);
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
                self.fail(id, child.hint, error)?;
                return Ok(false);
            }
        };
        if self.clean.has(at) {
            return Ok(true);
        }
        // One whose bytes are not right is told of again for each snapshot.
        let mut whole = self.look_at_bytes(id, child.hint);
        if level == 0 {
            whole &= self.pages(&node)?;
        } else {
            for (_, below) in node.present() {
                whole &= self.walk(below, level - 1)?;
            }
        }
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
                Ok(Looked::Whole(at)) => {
                    self.whole.set(at);
                }
                Ok(Looked::AsKnown) => {}
                Ok(Looked::Harmless(damage)) => {
                    whole = false;
                    self.harmless.push(damage);
                }
                Err(error) => {
                    whole = false;
                    self.fail(id, hint, error)?;
                }
            }
        }
        Ok(whole)
    }

    /// With `read_data`: whether the stored bytes of a chunk that a reader gets are as
    /// they were written. If not, that is noted.
    fn look_at_bytes(&mut self, id: ChunkId, hint: Option<Location>) -> bool {
        if !self.read_data {
            return true;
        }
        let damage = match self.chunks.readable(id, hint) {
            Ok(found) => self.damage_here(&found.place, id),
            Err(_) => None,
        };
        let is_right = damage.is_none();
        self.harmless.extend(damage);
        is_right
    }

    /// What is damaged of a chunk at this very place.
    fn damage_here(&self, place: &Place, id: ChunkId) -> Option<Damage> {
        match self.chunks.check_id_at(place, id) {
            Err(Error::Damaged(damage)) if place.is_told_by(&damage) => Some(damage),
            _ => None,
        }
    }

    /// Looks at a page as the reader would.
    fn page(&self, id: ChunkId, page: Child) -> Result<Looked> {
        if let Some(lost) = self.failed.get(&(id, page.hint)) {
            return Err(lost.clone().into_error());
        }
        let found = self.chunks.readable(id, page.hint)?;
        let at = found.place.location();
        if !self.read_data || self.whole.has(at) {
            return Ok(Looked::AsKnown);
        }
        if self.chunks.check_id_at(&found.place, id).is_ok() {
            return Ok(Looked::Whole(at));
        }
        // Another place, or another copy of the base, may serve the reader, or what is
        // wrong is nothing that it needs.
        let mut bytes = Scratch::of_len(self.chunks.page_size().len());
        match self.chunks.read(id, page.hint, &mut bytes) {
            Ok(_) => Ok(match self.damage_here(&found.place, id) {
                Some(damage) => Looked::Harmless(damage),
                None => Looked::AsKnown,
            }),
            Err(error) => Err(error),
        }
    }

    /// What keeps a chunk from being read. Damaged bytes may have led its reader to a base
    /// that there never was: they are the reason then, and not that this is missing.
    fn why(&self, id: ChunkId, hint: Option<Location>, error: Error) -> Result<Lost> {
        let lost = Lost::of(error)?;
        let own = match &lost {
            Lost::Damaged(Damage::Missing { .. }) if self.read_data => {
                self.chunks.damage_of(id, hint)
            }
            _ => None,
        };
        Ok(own.map_or(lost, Lost::Damaged))
    }

    fn fail(&mut self, id: ChunkId, hint: Option<Location>, error: Error) -> Result<()> {
        let lost = self.why(id, hint, error)?;
        self.failed.insert((id, hint), lost.clone());
        self.lost.push((lost, id));
        Ok(())
    }
}
