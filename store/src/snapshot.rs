//! A snapshot that stays whole while it is read.

use std::sync::Arc;

use crate::error::Result;
use crate::id::SnapshotId;
use crate::image::ImageReader;
use crate::manifest::{Image, Manifest};
use crate::pin::{NotPinned, Pin};
use crate::store::Store;

/// A snapshot, kept whole: nobody's `rm` and `gc` take anything of it away as long as
/// this, a clone of it, or a reader of one of its images lives.
///
/// ```
/// # use snapstore_store::{CommitRequest, ImageRole, Input, InputData, InputKind};
/// use snapstore_store::{GcOptions, PageSize, Silent, Store};
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// # let input = Input {
/// #     name: "memory".to_owned(),
/// #     role: ImageRole::Memory,
/// #     data: InputData::Bytes(vec![7; 8192].into()),
/// #     kind: InputKind::Full,
/// # };
/// # let inputs = vec![input];
/// # store.commit(&CommitRequest { tag: "base".to_owned(), inputs, ..Default::default() }, &Silent)?;
/// let memory = store.snapshot("base")?.image("memory").expect("it has memory");
/// store.remove_tags(&["base".to_owned()])?;
/// store.gc(GcOptions::default(), &Silent)?;
/// let mut page = vec![0; 4096];
/// memory.read_at(&mut page, 0)?;
/// assert_eq!(page, vec![7; 4096]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Snapshot {
    store: Store,
    id: SnapshotId,
    manifest: Arc<Manifest>,
    pin: Arc<Pin>,
}

impl Store {
    /// The snapshot that `name` means now, kept whole. Of one that has no tag this
    /// takes time in proportion to its length ([`Pin::add`]).
    ///
    /// # Errors
    /// As [`Store::pin`], and damage of the manifest.
    pub fn snapshot(&self, name: &str) -> Result<Snapshot> {
        let (id, pin) = self.pin(name)?;
        Ok(Snapshot {
            manifest: Arc::new(self.manifest(id)?),
            store: self.clone(),
            id,
            pin: Arc::new(pin),
        })
    }
}

impl Snapshot {
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

    /// Reads the image of this name; `None` if there is none.
    #[must_use]
    pub fn image(&self, name: &str) -> Option<ImageReader> {
        self.manifest.image(name).map(|image| self.reader(image))
    }

    /// Readers of all images, with what is known of them.
    pub fn images(&self) -> impl Iterator<Item = (&Image, ImageReader)> {
        let images = self.manifest.images.iter();
        images.map(|image| (image, self.reader(image)))
    }

    /// Why nothing keeps it, if that is so: where nothing can be written, there is
    /// nothing to keep it with.
    #[must_use]
    pub fn not_pinned(&self) -> Option<NotPinned> {
        self.pin.not_pinned()
    }

    fn reader(&self, image: &Image) -> ImageReader {
        self.store.image_reader(image).keeping(self.pin.clone())
    }
}
