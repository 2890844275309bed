//! The canonical bytes of a manifest.
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
//!
//! There is one valid form per manifest: what is decoded obeys every rule that a
//! commit does, and encodes to the same bytes again. Any bytes may be given to the
//! decoder; it allocates in proportion to their number, not to what they say.

use std::collections::BTreeMap;

use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::manifest::{Image, ImageRole, MAX_IMAGES, MAX_LABELS, MAX_LEN, Manifest};
use crate::pack::Location;
use crate::page::PageSize;

const VERSION: u32 = 1;

/// Why bytes are no manifest that this program reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// A newer version of this program wrote them.
    Newer { version: u32 },
    /// No version did.
    Wrong(&'static str),
}

impl Manifest {
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

    /// Parses bytes that have been checked against the snapshot's id, in a store
    /// with pages of this size.
    pub(crate) fn decode(bytes: &[u8], page_size: PageSize) -> Result<Self, Malformed> {
        if bytes.len() > MAX_LEN {
            return Err(Malformed::Wrong("it is too long"));
        }
        let mut input = Input(bytes);
        match input.u32().ok_or(CUT)? {
            VERSION => {}
            0 => return Err(Malformed::Wrong("its format version never was")),
            version => return Err(Malformed::Newer { version }),
        }
        let manifest = decode_version_1(&mut input, page_size)?;
        if !input.0.is_empty() {
            return Err(Malformed::Wrong("it has more bytes than it says"));
        }
        match manifest.problem() {
            Some(problem) => Err(Malformed::Wrong(problem)),
            None => Ok(manifest),
        }
    }
}

const CUT: Malformed = Malformed::Wrong("it is cut off, or not text where text is");

fn decode_version_1(input: &mut Input<'_>, page_size: PageSize) -> Result<Manifest, Malformed> {
    if input.u32().ok_or(CUT)? != page_size.as_u32() {
        return Err(Malformed::Wrong("its page size is not the store's"));
    }
    let created_unix_seconds = input.u64().ok_or(CUT)?;
    let parent = match input.u8().ok_or(CUT)? {
        0 => None,
        1 => Some(SnapshotId::from_bytes(input.array().ok_or(CUT)?)),
        _ => {
            return Err(Malformed::Wrong(
                "whether it has a parent is neither 0 nor 1",
            ));
        }
    };
    let first_tag = input.text().ok_or(CUT)?;
    let count = usize::from(input.u16().ok_or(CUT)?);
    if count > MAX_IMAGES {
        return Err(Malformed::Wrong("it has more than 256 images"));
    }
    let images = (0..count)
        .map(|_| decode_image(input, page_size))
        .collect::<Result<Vec<_>, _>>()?;
    let count = usize::from(input.u16().ok_or(CUT)?);
    if count > MAX_LABELS {
        return Err(Malformed::Wrong("it has more than 1024 labels"));
    }
    let mut labels = BTreeMap::new();
    for _ in 0..count {
        let (key, value) = (input.text().ok_or(CUT)?, input.text().ok_or(CUT)?);
        if labels
            .last_key_value()
            .is_some_and(|(last, _)| *last >= key)
        {
            return Err(Malformed::Wrong("its labels are not sorted"));
        }
        labels.insert(key, value);
    }
    Ok(Manifest {
        page_size,
        created_unix_seconds,
        parent,
        first_tag,
        images,
        labels,
        added_chunks: input.u64().ok_or(CUT)?,
        added_bytes: input.u64().ok_or(CUT)?,
    })
}

fn decode_image(input: &mut Input<'_>, page_size: PageSize) -> Result<Image, Malformed> {
    let name = input.text().ok_or(CUT)?;
    let role = match input.u8().ok_or(CUT)? {
        0 => ImageRole::Memory,
        1 => ImageRole::Disk,
        2 => ImageRole::File,
        _ => return Err(Malformed::Wrong("an image has a role that there is not")),
    };
    let [size_bytes, nonzero_pages, changed_pages] = {
        let mut number = || input.u64().ok_or(CUT);
        [number()?, number()?, number()?]
    };
    let root = match input.u8().ok_or(CUT)? {
        0 => None,
        1 => Some(Child {
            hash: input.array().ok_or(CUT)?,
            hint: Some(Location::from_bytes(input.array().ok_or(CUT)?)),
        }),
        _ => {
            return Err(Malformed::Wrong(
                "whether an image has a root is neither 0 nor 1",
            ));
        }
    };
    Ok(Image {
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
    use proptest::prelude::*;

    use super::*;
    use crate::pack::{EntryNumber, PackNumber};

    fn decode(bytes: &[u8]) -> Result<Manifest, Malformed> {
        Manifest::decode(bytes, PageSize::KIB_4)
    }

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
        assert_eq!(decode(&example().encode()), Ok(example()));
    }

    #[test]
    fn no_cut_and_no_extension_parses() {
        let bytes = example().encode();
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), Err(CUT), "{len}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(decode(&longer).is_err());
    }

    #[test]
    fn the_encoding_of_version_1_is_what_it_was() {
        let golden = "e32adb01";
        let id = SnapshotId::of_manifest(&example().encode()).to_string();
        assert_eq!(&id[..8], golden, "a changed encoding needs a new version");
    }

    #[test]
    fn a_newer_manifest_is_not_called_damaged() {
        let mut bytes = example().encode();
        bytes[0] = 2;
        bytes.truncate(40);
        assert_eq!(decode(&bytes), Err(Malformed::Newer { version: 2 }));
        bytes[0] = 0;
        assert!(matches!(decode(&bytes), Err(Malformed::Wrong(_))));
    }

    #[test]
    fn what_no_commit_writes_is_refused() {
        type Change = fn(&mut Manifest);
        let changes: &[(&str, Change)] = &[
            ("year 9999", |it| it.created_unix_seconds = u64::MAX),
            ("tag", |it| it.first_tag = "../x".to_owned()),
            ("image's name", |it| it.images[0].name = "..".to_owned()),
            ("image's name", |it| it.images[0].name = "a/b".to_owned()),
            ("sorted", |it| it.images.swap(0, 1)),
            ("sorted", |it| it.images[1] = it.images[0].clone()),
            ("length", |it| it.images[0].size_bytes = 0),
            ("length", |it| it.images[0].size_bytes = 8192 + 100),
            ("length", |it| it.images[1].size_bytes = 8192 + 512),
            ("length", |it| it.images[0].size_bytes = u64::MAX),
            ("more pages", |it| it.images[0].nonzero_pages = 3),
            ("more pages", |it| it.images[0].changed_pages = 1 << 33),
            ("labels", |it| {
                it.labels.insert("a b".to_owned(), String::new());
            }),
            ("labels", |it| {
                it.labels.insert("a".to_owned(), "\x1b[2J".to_owned());
            }),
            ("page size", |it| it.page_size = PageSize::KIB_16),
        ];
        for (says, change) in changes {
            let mut manifest = example();
            change(&mut manifest);
            match decode(&manifest.encode()) {
                Err(Malformed::Wrong(reason)) => assert!(reason.contains(says), "{reason}"),
                other => panic!("{says}: {other:?}"),
            }
        }
    }

    #[test]
    fn counts_are_capped_before_anything_is_allocated() {
        let encoded = example().encode();
        // The count of images follows the tag.
        let at = 4 + 4 + 8 + 1 + 32 + 4 + "base+1".len();
        let mut bytes = encoded.clone();
        bytes[at..at + 2].copy_from_slice(&257_u16.to_le_bytes());
        assert!(matches!(decode(&bytes), Err(Malformed::Wrong(says)) if says.contains("256")));
        // The length of the tag.
        let mut bytes = encoded;
        bytes[at - 10..at - 6].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(CUT));
    }

    proptest! {
        /// Whatever bytes there are: no panic, and what is accepted has one form.
        #[test]
        fn changed_bytes_are_refused_or_have_one_form(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = example().encode();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(manifest) = decode(&bytes) {
                prop_assert_eq!(manifest.encode(), bytes.clone());
                prop_assert!(manifest.created() <= manifest.created());
                for image in &manifest.images {
                    let _ = (image.file_name(), image.pages(), image.tree());
                }
            }
            bytes.truncate(cut.index(bytes.len()));
            let _ = decode(&bytes);
        }

        #[test]
        fn any_bytes_are_refused_or_have_one_form(
            tail in prop::collection::vec(any::<u8>(), 0..400),
            versioned in any::<bool>(),
        ) {
            let head = [1_u32.to_le_bytes(), 4096_u32.to_le_bytes()].concat();
            let bytes = if versioned { [head, tail].concat() } else { tail };
            if let Ok(manifest) = decode(&bytes) {
                prop_assert_eq!(manifest.encode(), bytes);
            }
        }
    }
}
