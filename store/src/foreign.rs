//! A snapshot whose chunks are elsewhere than in this store, and which is read like one
//! that is there.

use std::path::Path;
use std::sync::Arc;

use crate::chunk_source::{ChunkSource, ForeignChunks, Traffic};
use crate::error::{Damage, Result};
use crate::id::SnapshotId;
use crate::image::ImageReader;
use crate::manifest::{self, Image, Manifest};
use crate::page::PageSize;
use crate::working_set::set::WorkingSet;

/// A snapshot that is read from a [`ChunkSource`].
#[derive(Clone, Debug)]
pub struct ForeignSnapshot {
    id: SnapshotId,
    manifest: Arc<Manifest>,
    chunks: Arc<ForeignChunks>,
}

impl ForeignSnapshot {
    /// The snapshot with this canonical manifest. `label` is what errors call the place that
    /// it comes from.
    ///
    /// # Errors
    /// If the manifest is damaged, or was made by a newer version.
    pub fn new(
        manifest: &[u8],
        page_size: PageSize,
        label: &Path,
        source: Arc<dyn ChunkSource>,
    ) -> Result<Self> {
        let id = SnapshotId::of_manifest(manifest);
        let manifest = manifest::decode(manifest, page_size, id, label)?;
        if let Some(reason) = manifest.problem_in_a_mount() {
            let snapshot = id.short();
            return Err(Damage::Manifest { snapshot, reason }.into());
        }
        Ok(Self {
            id,
            manifest: Arc::new(manifest),
            chunks: Arc::new(ForeignChunks::new(source, page_size, label)),
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What it holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What was asked for so far where it is, by why.
    #[must_use]
    pub fn traffic(&self) -> Vec<Traffic> {
        self.chunks.source().traffic()
    }

    /// What was recorded of an image's use on this host, if it was.
    #[must_use]
    pub fn working_set(&self, image: &str) -> Option<WorkingSet> {
        self.chunks.source().working_set(image)
    }

    /// Keeps that for who reads the snapshot next, as far as its source can.
    pub fn keep_working_set(&self, image: &str, set: &WorkingSet) {
        self.chunks.source().keep_working_set(image, set);
    }

    /// Reads one of its images.
    #[must_use]
    pub fn image_reader(&self, image: &Image) -> ImageReader {
        ImageReader::foreign(self.chunks.clone(), image)
    }
}
