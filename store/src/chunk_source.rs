//! Chunks that are elsewhere than in this store, such as in a bucket.
//!
//! Whoever has them is a [`ChunkSource`]. It is trusted with nothing: what it hands out is
//! compared with the id that was asked for, here, before anybody sees it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use crate::error::{Damage, Error, Result};
use crate::format::node::{self, Child, Node};
use crate::id::{ChunkId, ChunkKind};
use crate::pack::codec::{self, Encoding};
use crate::page::PageSize;
use crate::tree::read::Nodes;
use crate::working_set::set::WorkingSet;

/// Decoded nodes kept, of about 20 KiB each.
const NODES_CACHED: usize = 1024;

/// Whether who asks waits for what is not at hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waiting {
    /// No: it is told [`Error::NotAtHand`] at once.
    No,
    /// Yes, as long as the source is patient.
    Yes,
}

/// Looks at a page as it is stored, which is encoded so: whether it is the one that was
/// asked for.
pub type Fits<'a> = dyn FnMut(u8, &[u8]) -> bool + 'a;

/// What a source has asked for where the chunks are, for one cause.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Why: `demand`, since somebody waited for it, and others.
    pub cause: String,
    /// Requests.
    pub requests: u64,
    /// Of these, those that failed.
    pub failed_requests: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// Requests beside these, for what was late and was asked for a second time.
    pub hedges: u64,
    /// Of these, those that were answered first.
    pub hedges_won: u64,
}

/// Where the chunks of a [`crate::ForeignSnapshot`] are.
pub trait ChunkSource: fmt::Debug + Send + Sync {
    /// What the id of a node is the hash of.
    ///
    /// # Errors
    /// [`Error::NotAtHand`]; [`Error::Foreign`].
    fn node(&self, id: &[u8; 32], level: u8, waiting: Waiting) -> Result<Vec<u8>>;

    /// Shows a page as it is stored: that of this slot of a leaf. If it does not fit, what
    /// was read is thrown away, and shown once more as it is where it comes from.
    ///
    /// # Errors
    /// As [`ChunkSource::node`]; also if it did not fit either time.
    fn page(
        &self,
        leaf: &[u8; 32],
        slot: usize,
        waiting: Waiting,
        fits: &mut Fits<'_>,
    ) -> Result<()>;

    /// What was recorded of an image's use on this host, if it was.
    fn working_set(&self, _image: &str) -> Option<WorkingSet> {
        None
    }

    /// Keeps that, as far as it can.
    fn keep_working_set(&self, _image: &str, _set: &WorkingSet) {}

    /// What was asked for so far, if that is counted.
    fn traffic(&self) -> Vec<Traffic> {
        Vec::new()
    }
}

/// The chunks of a source, each compared with its id.
pub(crate) struct ForeignChunks {
    source: Arc<dyn ChunkSource>,
    page_size: PageSize,
    label: PathBuf,
    nodes: Cache<[u8; 32], Arc<Node>>,
}

impl fmt::Debug for ForeignChunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignChunks")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl ForeignChunks {
    /// `label` is what errors call the place that they come from.
    pub fn new(source: Arc<dyn ChunkSource>, page_size: PageSize, label: &Path) -> Self {
        Self {
            source,
            page_size,
            label: label.to_owned(),
            nodes: Cache::new(NODES_CACHED),
        }
    }

    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    pub fn source(&self) -> &dyn ChunkSource {
        &*self.source
    }

    /// These chunks for who waits, or does not.
    pub fn waiting(&self, waiting: Waiting) -> WaitingFor<'_> {
        WaitingFor {
            chunks: self,
            waiting,
        }
    }

    fn missing(&self, id: &[u8; 32]) -> Error {
        let id = ChunkId::from_hash(ChunkKind::Node, *id);
        Damage::Missing {
            chunk: format!("{id} of {}", self.label.display()),
        }
        .into()
    }
}

/// [`ForeignChunks::waiting`].
pub(crate) struct WaitingFor<'a> {
    chunks: &'a ForeignChunks,
    waiting: Waiting,
}

impl WaitingFor<'_> {
    /// Reads the page in a slot of a leaf into `out`, which has the page's length.
    pub fn page(&self, leaf: &[u8; 32], slot: usize, page: Child, out: &mut [u8]) -> Result<()> {
        let mut is_read = false;
        let mut fits = |encoding: u8, stored: &[u8]| {
            is_read = read_page(&page.hash, encoding, stored, out);
            is_read
        };
        let source = &self.chunks.source;
        source.page(leaf, slot, self.waiting, &mut fits)?;
        match is_read {
            true => Ok(()),
            false => Err(self.chunks.missing(leaf)),
        }
    }
}

/// Decodes a page that is stored without any other one; whether it has this id.
pub(crate) fn read_page(id: &[u8; 32], encoding: u8, stored: &[u8], out: &mut [u8]) -> bool {
    let encoding = Encoding::from_byte(encoding);
    let len = encoding
        .is_standalone()
        .then(|| codec::decode(stored, encoding, &[], out))
        .flatten();
    len == Some(out.len()) && ChunkKind::Page.hash(out).as_bytes() == id
}

impl Nodes for WaitingFor<'_> {
    fn node(&self, child: Child, level: u8) -> Result<Arc<Node>> {
        let chunks = self.chunks;
        if let Some(node) = chunks.nodes.get(&child.hash)
            && node.level() == level
        {
            return Ok(node);
        }
        let canonical = chunks.source.node(&child.hash, level, self.waiting)?;
        if ChunkKind::Node.hash(&canonical).as_bytes() != &child.hash {
            return Err(chunks.missing(&child.hash));
        }
        let node = Node::decode(&canonical, level).map_err(|malformed| match malformed {
            node::Malformed::Newer { version } => {
                Error::newer(&chunks.label, "a tree node of version", version)
            }
            node::Malformed::Wrong => chunks.missing(&child.hash),
        })?;
        let node = Arc::new(node);
        chunks.nodes.insert(child.hash, node.clone());
        Ok(node)
    }
}
