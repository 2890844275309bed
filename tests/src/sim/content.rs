//! What simulated snapshots hold: images of few distinct pages, so that equal
//! pages turn up in images that have nothing else to do with each other, and
//! so that pages are alike enough to be stored as deltas.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, LazyLock};

use anyhow::{Context as _, ensure};
use snapstore_store::{Extent, ImageRole, Input, InputData, InputKind, Manifest, Region, Store};

use crate::harness::noise;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages that have nothing in common with each other.
pub const FAMILIES: u8 = 6;
/// Pages of a family; they differ in few bytes.
pub const VARIANTS: u8 = 7;

/// A page, by number. All that begin with the same letter are alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Page(u8);

impl Page {
    /// The page of a family and a variant.
    #[must_use]
    pub fn new(family: u8, variant: u8) -> Self {
        Self(family % FAMILIES * VARIANTS + variant % VARIANTS)
    }

    /// Its family.
    #[must_use]
    pub fn family(self) -> u8 {
        self.0 / VARIANTS
    }

    fn bytes(self) -> &'static [u8] {
        let start = usize::from(self.0) * PAGE;
        &PAGES[start..start + PAGE]
    }

    /// The page that these bytes are.
    fn of(bytes: &[u8]) -> Option<Self> {
        let page = Self(*bytes.last()?);
        (page.0 < FAMILIES * VARIANTS && page.bytes() == bytes).then_some(page)
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = char::from(b'A' + self.family());
        write!(f, "{letter}{}", self.0 % VARIANTS)
    }
}

static PAGES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut pages = Vec::new();
    for number in 0..FAMILIES * VARIANTS {
        let page = Page(number);
        let mut bytes = noise(u64::from(page.family()), PAGE);
        if page.family() % 3 == 2 {
            // Compresses, so that it is not stored as it is.
            bytes[..PAGE / 2].fill(page.family());
        }
        bytes[64 * usize::from(number % VARIANTS)..][..8].fill(number);
        bytes[PAGE - 1] = number;
        pages.extend_from_slice(&bytes);
    }
    pages
});

/// Every page once, in a file without a name: what commits read from.
static SOURCE: LazyLock<Arc<File>> = LazyLock::new(|| {
    let mut file = tempfile::tempfile().expect("a temporary file can be made");
    file.write_all(&PAGES).expect("the pages can be written");
    Arc::new(file)
});

/// An image: its pages that are not zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageContent {
    /// How many pages it has.
    pub pages: u64,
    /// Those that are not zero.
    pub data: BTreeMap<u64, Page>,
}

/// What a snapshot holds: images by name.
pub type Content = BTreeMap<String, ImageContent>;

impl ImageContent {
    /// This image with the pages of `changes` replaced.
    #[must_use]
    pub fn with(&self, changes: &Self) -> Self {
        let mut new = self.clone();
        new.data.extend(&changes.data);
        new
    }

    /// Whether these are the bytes of a page, by number.
    #[must_use]
    pub fn holds(&self, page: u64, bytes: &[u8]) -> bool {
        match self.data.get(&page) {
            Some(page) => page.bytes() == bytes,
            None => page < self.pages && bytes.iter().all(|byte| *byte == 0),
        }
    }

    /// The image as an input; only what it mentions, with `Diff`.
    #[must_use]
    pub fn input(&self, name: &str, kind: InputKind) -> Input {
        let extent = |(slot, page): (&u64, &Page)| Extent {
            image_offset: slot * PAGE as u64,
            file: 0,
            file_offset: u64::from(page.0) * PAGE as u64,
            length: PAGE as u64,
        };
        Input {
            name: name.to_owned(),
            role: if name == "memory" {
                ImageRole::Memory
            } else {
                ImageRole::Disk
            },
            data: InputData::Extents {
                files: vec![SOURCE.clone()],
                label: name.to_owned(),
                size_bytes: self.pages * PAGE as u64,
                extents: self.data.iter().map(extent).collect(),
            },
            kind,
        }
    }
}

impl fmt::Display for ImageContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages:", self.pages)?;
        for (slot, page) in &self.data {
            write!(f, " {slot}={page}")?;
        }
        Ok(())
    }
}

/// Reads a snapshot whole, as anybody would; `between` is called before each
/// page.
///
/// # Errors
/// What the store says, or that bytes are read that nobody committed.
pub fn read(
    store: &Store,
    manifest: &Manifest,
    between: &mut dyn FnMut(),
) -> anyhow::Result<Content> {
    let mut content = Content::new();
    let mut bytes = vec![0; PAGE];
    for image in &manifest.images {
        let reader = store.image_reader(image);
        let mut data = BTreeMap::new();
        let mut offset = 0;
        while let Some(start) = reader.seek(offset, Region::Data)? {
            between();
            let read = reader.read_at(&mut bytes, start)?;
            ensure!(read == PAGE, "a page of {} is cut short", image.name);
            let slot = start / PAGE as u64;
            let page = Page::of(&bytes)
                .with_context(|| format!("page {slot} of {} is no page", image.name))?;
            data.insert(slot, page);
            offset = start + PAGE as u64;
            if offset >= image.size_bytes {
                break;
            }
        }
        let pages = image.pages();
        content.insert(image.name.clone(), ImageContent { pages, data });
    }
    Ok(content)
}
