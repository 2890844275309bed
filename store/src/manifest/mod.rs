//! A snapshot's manifest: what it holds.

mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::name;
use crate::page::PageSize;
pub(crate) use read::{decode, read};

/// What a mount shows a manifest as.
pub(crate) const SHOWN_AS: &str = "manifest.json";
/// The longest manifest that is read or written.
pub(crate) const MAX_LEN: usize = 1 << 20;
/// The most images that a snapshot may have, attached files among them.
pub const MAX_IMAGES: usize = 256;
pub(crate) const TOO_MANY_IMAGES: &str =
    "it has more than 256 images and files, memory and disks among them";
/// The most labels.
pub const MAX_LABELS: usize = 1024;
/// The longest image: 16 TiB.
pub const MAX_IMAGE_BYTES: u64 = 16 << 40;

/// The length of a disk is a multiple of this.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// The last second of the year 9999.
pub(crate) const MAX_CREATED_UNIX_SECONDS: u64 = 253_402_300_799;

/// What an image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageRole {
    /// The guest's memory, shown as `memory.bin`.
    Memory,
    /// A disk, shown as `NAME.img`. Its length is a multiple of 512 bytes.
    Disk,
    /// A file of any length, such as the VM state, shown under its name.
    File,
}

/// One image of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Image {
    /// Its name, unique in the snapshot.
    pub name: String,
    /// What it is.
    pub role: ImageRole,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// How many of its pages are not zero.
    pub nonzero_pages: u64,
    /// How many of its pages differ from the parent's image of this name.
    pub changed_pages: u64,
    #[serde(skip)]
    pub(crate) root: Option<Child>,
    #[serde(skip)]
    pub(crate) page_size: PageSize,
}

impl Image {
    /// As [`Manifest::problem`].
    fn problem(&self, page_size: PageSize) -> Option<&'static str> {
        let grain_bytes = match self.role {
            ImageRole::Memory => page_size.bytes(),
            ImageRole::Disk => SECTOR_BYTES,
            ImageRole::File => 1,
        };
        if name::check_image(&self.name).is_err() {
            Some("an image's name is none")
        } else if !(1..=MAX_IMAGE_BYTES).contains(&self.size_bytes)
            || !self.size_bytes.is_multiple_of(grain_bytes)
        {
            Some("an image has a length that none has")
        } else if self.nonzero_pages > self.pages()
            // The parent's image may be longer, and what it has there is changed.
            || self.changed_pages > MAX_IMAGE_BYTES / page_size.bytes()
        {
            Some("an image has more pages than its length allows")
        } else {
            None
        }
    }

    /// The name of the file that shows this image in a mount.
    #[must_use]
    pub fn file_name(&self) -> String {
        match self.role {
            ImageRole::Memory => "memory.bin".to_owned(),
            ImageRole::Disk => format!("{}.img", self.name),
            ImageRole::File => self.name.clone(),
        }
    }

    /// Identifies the image's content: equal for equal bytes and lengths.
    #[must_use]
    pub fn content_key(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.size_bytes.to_le_bytes());
        if let Some(root) = self.root {
            hasher.update(&root.hash);
        }
        hasher.finalize().into()
    }

    /// How many pages the image has; the last one may be partly beyond its end.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.size_bytes.div_ceil(self.page_size.bytes())
    }
}

/// A part of a manifest that only a newer version understands, and that may be
/// ignored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Field {
    pub number: u16,
    pub bytes: Vec<u8>,
}

/// What a snapshot is made of. Immutable once committed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Manifest {
    /// The size of its pages in bytes.
    #[serde(serialize_with = "page_size_bytes", rename = "page_size_bytes")]
    pub page_size: PageSize,
    /// When it was committed, in seconds since 1970 (UTC).
    pub created_unix_seconds: u64,
    /// The snapshot it was made from.
    pub parent: Option<SnapshotId>,
    /// The tag it was committed under.
    pub first_tag: String,
    /// Its images, sorted by name.
    pub images: Vec<Image>,
    /// Labels given by the user.
    pub labels: BTreeMap<String, String>,
    /// How many chunks its commit added to the store.
    pub added_chunks: u64,
    /// How many bytes of packs its commit added to the store.
    pub added_bytes: u64,
    /// What only a newer version understands.
    #[serde(skip)]
    pub(crate) other_fields: Vec<Field>,
}

fn page_size_bytes<S: serde::Serializer>(
    size: &PageSize,
    out: S,
) -> std::result::Result<S::Ok, S::Error> {
    out.serialize_u64(size.bytes())
}

impl Manifest {
    /// One of nothing: whoever makes a manifest names what it has, and a new field is
    /// absent in all others.
    pub(crate) fn blank(page_size: PageSize) -> Self {
        Self {
            page_size,
            created_unix_seconds: 0,
            parent: None,
            first_tag: String::new(),
            images: Vec::new(),
            labels: BTreeMap::new(),
            added_chunks: 0,
            added_bytes: 0,
            other_fields: Vec::new(),
        }
    }

    /// When it was committed.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        let seconds = self.created_unix_seconds.min(MAX_CREATED_UNIX_SECONDS);
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// The image of this name.
    #[must_use]
    pub fn image(&self, name: &str) -> Option<&Image> {
        self.images.iter().find(|image| image.name == name)
    }

    /// What keeps a mount from showing every image, if anything does: two with one file
    /// name, or one with the manifest's. No commit makes such a snapshot.
    pub(crate) fn problem_in_a_mount(&self) -> Option<&'static str> {
        let mut shown = BTreeSet::from([SHOWN_AS.to_owned()]);
        let mut images = self.images.iter();
        let clash = images.any(|image| !shown.insert(image.file_name()));
        clash.then_some("two of its files have one name")
    }

    /// What keeps this from being a manifest, if anything does: a name, number or
    /// order that no snapshot has. What is written and what is read obeys the
    /// same rules.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let in_order = |names: &[&String]| names.windows(2).all(|pair| pair[0] < pair[1]);
        let names: Vec<_> = self.images.iter().map(|image| &image.name).collect();
        let labels_are_good = || {
            let mut labels = self.labels.iter();
            labels.all(|(key, value)| name::check_label(key, value).is_ok())
        };
        if self.created_unix_seconds > MAX_CREATED_UNIX_SECONDS {
            Some("it is from after the year 9999")
        } else if name::check_tag(&self.first_tag).is_err() {
            Some("its tag is no tag's name")
        } else if self.images.len() > MAX_IMAGES {
            Some(TOO_MANY_IMAGES)
        } else if !in_order(&names) {
            Some("its images are not sorted by name")
        } else if self.labels.len() > MAX_LABELS || !labels_are_good() {
            Some("its labels are not labels")
        } else {
            let mut images = self.images.iter();
            images.find_map(|image| image.problem(self.page_size))
        }
    }
}
