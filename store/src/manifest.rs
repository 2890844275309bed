//! A snapshot's manifest: what it holds, and its canonical bytes.
//!
//! ```text
//!  4  format version, 1
//!  4  page size in bytes
//!  8  creation time, seconds since 1970 (UTC)
//!  1  1 if there is a parent, else 0; then 32 bytes parent snapshot id
//!  s  tag it was first committed under
//!  2  number of images; for each, sorted by name:
//!       s  name
//!       1  role: 0 memory, 1 disk, 2 file
//!       8  size in bytes
//!       8  pages that are not zero
//!       8  pages that differ from the parent's image
//!       1  1 if the root is not zero; then 32 bytes root node id and 8 bytes
//!          hint (pack, entry)
//!  2  number of labels; for each, sorted by key: s key, s value
//!  8  chunks the commit added to the store    8  bytes they take there
//! ```
//! `s` is a length (u32) and UTF-8 bytes. Numbers are little-endian. The
//! snapshot's id is the BLAKE3 of these bytes in a context of its own.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::chunks::Chunks;
use crate::error::{Damage, Result};
use crate::id::SnapshotId;
use crate::pack::Location;
use crate::page::PageSize;
use crate::tree::node::Child;
use crate::tree::read::Tree;
use crate::tree::shape::Shape;

/// The longest manifest that is read or written.
pub(crate) const MAX_LEN: usize = 1 << 20;
const VERSION: u32 = 1;
/// The most images and labels a snapshot may have.
pub(crate) const MAX_IMAGES: usize = 256;
pub(crate) const MAX_LABELS: usize = 1024;
/// The longest image: 16 TiB.
pub(crate) const MAX_IMAGE_BYTES: u64 = 16 << 40;

/// What an image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageRole {
    /// The guest's memory, shown as `memory.bin`.
    Memory,
    /// A disk, shown as `NAME.img`.
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

    pub(crate) fn tree(&self) -> Tree {
        Tree::new(Shape::of_pages(self.pages()), self.root)
    }
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
}

fn page_size_bytes<S: serde::Serializer>(
    size: &PageSize,
    out: S,
) -> std::result::Result<S::Ok, S::Error> {
    out.serialize_u64(size.bytes())
}

impl Manifest {
    /// When it was committed.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.created_unix_seconds)
    }

    /// The image of this name.
    #[must_use]
    pub fn image(&self, name: &str) -> Option<&Image> {
        self.images.iter().find(|image| image.name == name)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.page_size.as_u32().to_le_bytes());
        out.extend_from_slice(&self.created_unix_seconds.to_le_bytes());
        out.push(u8::from(self.parent.is_some()));
        if let Some(parent) = self.parent {
            out.extend_from_slice(parent.as_bytes());
        }
        put_text(&mut out, &self.first_tag);
        put_count(&mut out, self.images.len());
        for image in &self.images {
            put_text(&mut out, &image.name);
            out.push(image.role as u8);
            for number in [image.size_bytes, image.nonzero_pages, image.changed_pages] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            out.push(u8::from(image.root.is_some()));
            if let Some(root) = image.root {
                out.extend_from_slice(&root.hash);
                let nowhere = Location::from_bytes([0; Location::LEN]);
                out.extend_from_slice(&root.hint.unwrap_or(nowhere).to_bytes());
            }
        }
        put_count(&mut out, self.labels.len());
        for (key, value) in &self.labels {
            put_text(&mut out, key);
            put_text(&mut out, value);
        }
        out.extend_from_slice(&self.added_chunks.to_le_bytes());
        out.extend_from_slice(&self.added_bytes.to_le_bytes());
        out
    }

    /// Parses bytes that have been checked against the snapshot's id.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes);
        if input.u32()? != VERSION {
            return None;
        }
        let page_size = PageSize::from_bytes(u64::from(input.u32()?)).ok()?;
        let created_unix_seconds = input.u64()?;
        let parent = match input.u8()? {
            0 => None,
            1 => Some(SnapshotId::from_bytes(input.array()?)),
            _ => return None,
        };
        let first_tag = input.text()?;
        let images = (0..input.u16()?)
            .map(|_| decode_image(&mut input, page_size))
            .collect::<Option<Vec<_>>>()?;
        let labels = (0..input.u16()?)
            .map(|_| Some((input.text()?, input.text()?)))
            .collect::<Option<BTreeMap<_, _>>>()?;
        let manifest = Self {
            page_size,
            created_unix_seconds,
            parent,
            first_tag,
            images,
            labels,
            added_chunks: input.u64()?,
            added_bytes: input.u64()?,
        };
        input.0.is_empty().then_some(manifest)
    }
}

/// Reads the manifest of a snapshot.
pub(crate) fn read(chunks: &Chunks, id: SnapshotId) -> Result<Manifest> {
    let mut bytes = vec![0; MAX_LEN];
    let len = chunks.read(id.chunk(), None, &mut bytes)?;
    Manifest::decode(&bytes[..len]).ok_or_else(|| {
        Damage::Missing {
            chunk: format!("a readable manifest of snapshot {}", id.short()),
        }
        .into()
    })
}

fn decode_image(input: &mut Input<'_>, page_size: PageSize) -> Option<Image> {
    let name = input.text()?;
    let role = match input.u8()? {
        0 => ImageRole::Memory,
        1 => ImageRole::Disk,
        2 => ImageRole::File,
        _ => return None,
    };
    let size_bytes = input.u64()?;
    let nonzero_pages = input.u64()?;
    let changed_pages = input.u64()?;
    let root = match input.u8()? {
        0 => None,
        1 => Some(Child {
            hash: input.array()?,
            hint: Some(Location::from_bytes(input.array()?)),
        }),
        _ => return None,
    };
    (1..=MAX_IMAGE_BYTES)
        .contains(&size_bytes)
        .then_some(Image {
            name,
            role,
            size_bytes,
            nonzero_pages,
            changed_pages,
            root,
            page_size,
        })
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).expect("names are checked to be short");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("counts are checked to be small");
    out.extend_from_slice(&count.to_le_bytes());
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(std::str::from_utf8(text).ok()?.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{EntryNumber, PackNumber};

    fn example() -> Manifest {
        let image = |name: &str, role, root| Image {
            name: name.to_owned(),
            role,
            size_bytes: 8192,
            nonzero_pages: 1,
            changed_pages: 2,
            root,
            page_size: PageSize::KIB_4,
        };
        let hint = Location {
            pack: PackNumber(1),
            entry: EntryNumber(2),
        };
        let root = Child {
            hash: [5; 32],
            hint: Some(hint),
        };
        Manifest {
            page_size: PageSize::KIB_4,
            created_unix_seconds: 1_700_000_000,
            parent: Some(SnapshotId::from_bytes([9; 32])),
            first_tag: "base+1".to_owned(),
            images: vec![
                image("disk0", ImageRole::Disk, None),
                image("memory", ImageRole::Memory, Some(root)),
            ],
            labels: BTreeMap::from([("os".to_owned(), "debian 12".to_owned())]),
            added_chunks: 3,
            added_bytes: 4567,
        }
    }

    #[test]
    fn a_manifest_survives_the_round_trip() {
        assert_eq!(Manifest::decode(&example().encode()), Some(example()));
    }

    #[test]
    fn no_cut_and_no_extension_parses() {
        let bytes = example().encode();
        for len in 0..bytes.len() {
            assert_eq!(Manifest::decode(&bytes[..len]), None, "{len}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(Manifest::decode(&longer), None);
    }

    #[test]
    fn the_encoding_of_version_1_is_what_it_was() {
        let golden = "e32adb01";
        let id = SnapshotId::of_manifest(&example().encode()).to_string();
        assert_eq!(&id[..8], golden, "a changed encoding needs a new version");
    }
}
