//! How a page or a node is stored to be kept.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::chunks::identified;
use crate::format::entry;
use crate::id::{ChunkId, ChunkKey, ChunkKind};
use crate::pack::codec::{self, Base, Encoding, Patched};
use crate::pack::reader::{BaseRef, delta_head};
use crate::pack::writer::EncodedChunk;

/// A chunk that a delta may be made against: it is stored standalone where `base` says.
pub(super) struct Candidate<'a> {
    pub base: BaseRef,
    pub payload: Cow<'a, [u8]>,
}

/// A chunk to be stored.
pub(super) struct Job<'a> {
    pub id: ChunkId,
    pub key: ChunkKey,
    pub payload: &'a [u8],
    pub bases: Vec<Candidate<'a>>,
}

impl Job<'_> {
    /// The smallest of its encodings.
    pub fn encode(&self) -> (EncodedChunk, Vec<u8>) {
        let kind = self.id.kind();
        let (encoding, patched, max_percent) = match kind {
            ChunkKind::Node => (
                Encoding::IdDelta,
                Patched::Never,
                codec::NODE_DELTA_MAX_PERCENT,
            ),
            ChunkKind::Page | ChunkKind::Manifest => (
                Encoding::Delta,
                Patched::IfBest,
                codec::PAGE_DELTA_MAX_PERCENT,
            ),
        };
        let others = self.bases.iter().filter(|it| it.base.id != self.id);
        let bases: Vec<Base<'_>> = others
            .map(|candidate| Base {
                head: delta_head(candidate.base),
                payload: identified(kind, &candidate.payload),
                patched,
                encoding,
                max_percent,
            })
            .collect();
        let mut stored = Vec::new();
        let encoding = codec::encode_to_keep(self.payload, &bases, &mut stored);
        let chunk = EncodedChunk {
            key: self.key,
            encoding,
            check: entry::stored_check(&stored),
            len: stored.len(),
        };
        (chunk, stored)
    }
}

/// Encodes many, on all cores.
pub(super) fn encode_all(jobs: &[Job<'_>]) -> Vec<(EncodedChunk, Vec<u8>)> {
    jobs.par_iter().map(Job::encode).collect()
}
