//! The bytes of a manifest: `v1` and `v2` are its versions.
//!
//! Every version begins with its number. From version 2 on the length of the
//! canonical part follows, which the snapshot's id is the hash of; in version 1 that
//! is all. So a snapshot of a version that is not known can be copied and told from
//! a damaged one.
//!
//! There is one valid form per manifest: what is decoded obeys every rule that a
//! commit does, and encodes to the same bytes again. Any bytes may be given to the
//! decoder; it allocates in proportion to their number, not to what they say.

mod parts;
mod v1;
mod v2;

use crate::format::config::StoreFormat;
use crate::id::{ChunkKind, SnapshotId};
use crate::manifest::{MAX_LEN, Manifest};
use crate::pack::Location;
use crate::page::PageSize;
pub(crate) use parts::Malformed;
use parts::{CUT, Input};

/// The part of a manifest that its snapshot's id is the hash of.
pub(crate) fn canonical(payload: &[u8]) -> &[u8] {
    let whole = || {
        let mut input = Input(payload);
        let len = match input.u32()? {
            0 | 1 => None,
            _ => usize::try_from(input.u32()?).ok(),
        };
        len.filter(|len| *len >= 8)
    };
    whole()
        .and_then(|len| payload.get(..len))
        .unwrap_or(payload)
}

impl SnapshotId {
    /// The id of the snapshot that a manifest's bytes describe.
    pub(crate) fn of_manifest(payload: &[u8]) -> Self {
        let hash = ChunkKind::Manifest.hash(canonical(payload));
        Self::from_bytes(*hash.as_bytes())
    }
}

/// How long the manifest is that these bytes begin with, if they do begin with one.
pub(crate) fn len_of(bytes: &[u8], page_size: PageSize) -> Option<usize> {
    let bytes = &bytes[..bytes.len().min(MAX_LEN)];
    match Input(bytes).u32()? {
        1 => v1::decode_first(bytes, page_size).ok().map(|(_, len)| len),
        2 => {
            let manifest = v2::decode(bytes, page_size).ok()?;
            let hints = manifest.images.iter().filter(|it| it.root.is_some());
            Some(canonical(bytes).len() + hints.count() * Location::LEN)
        }
        _ => None,
    }
}

impl Manifest {
    /// The bytes of a manifest in a store of this format.
    pub(crate) fn encode(&self, format: StoreFormat) -> Vec<u8> {
        match format {
            StoreFormat::One => v1::encode(self),
            StoreFormat::Two => v2::encode(self),
        }
    }

    /// Parses bytes that have been checked against the snapshot's id, in a store
    /// with pages of this size.
    pub(crate) fn decode(bytes: &[u8], page_size: PageSize) -> Result<Self, Malformed> {
        if bytes.len() > MAX_LEN {
            return Err(Malformed::Wrong("it is too long"));
        }
        let manifest = match Input(bytes).u32().ok_or(CUT)? {
            0 => return Err(Malformed::Wrong("its format version never was")),
            1 => v1::decode(bytes, page_size)?,
            2 => v2::decode(bytes, page_size)?,
            version => return Err(Malformed::Newer { version }),
        };
        match manifest.problem() {
            Some(problem) => Err(Malformed::Wrong(problem)),
            None => Ok(manifest),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::format::node::Child;
    use crate::manifest::{Field, Image, ImageRole};
    use crate::pack::{EntryNumber, PackNumber};

    const FORMATS: [StoreFormat; 2] = [StoreFormat::One, StoreFormat::Two];

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
            ..Manifest::blank(PageSize::KIB_4)
        }
    }

    #[test]
    fn a_manifest_survives_the_round_trip() {
        for format in FORMATS {
            assert_eq!(decode(&example().encode(format)), Ok(example()));
        }
    }

    #[test]
    fn no_cut_and_no_extension_parses() {
        let bytes = example().encode(StoreFormat::One);
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), Err(CUT), "{len}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(decode(&longer).is_err());
        let bytes = example().encode(StoreFormat::Two);
        for len in 0..canonical(&bytes).len() {
            assert_eq!(decode(&bytes[..len]), Err(CUT), "{len}");
        }
    }

    #[test]
    fn the_bytes_of_each_version_are_what_they_were() {
        let golden = [
            (StoreFormat::One, include_bytes!("v1.golden").as_slice()),
            (StoreFormat::Two, include_bytes!("v2.golden").as_slice()),
        ];
        for (format, golden) in golden {
            let bytes = example().encode(format);
            assert!(
                bytes == golden,
                "a changed encoding needs a new version: {bytes:?}"
            );
            assert_eq!(decode(golden), Ok(example()));
        }
        let id = SnapshotId::of_manifest(golden[0].1).to_string();
        assert_eq!(&id[..8], "e32adb01");
    }

    #[test]
    fn hints_are_no_part_of_the_id_and_may_be_lost() {
        let bytes = example().encode(StoreFormat::Two);
        let mut moved = example();
        let root = moved.images[1].root.as_mut().unwrap();
        root.hint.as_mut().unwrap().pack = PackNumber(77);
        let elsewhere = moved.encode(StoreFormat::Two);
        assert_ne!(bytes, elsewhere);
        let id = SnapshotId::of_manifest(&bytes);
        assert_eq!(id, SnapshotId::of_manifest(&elsewhere));
        assert_eq!(id, SnapshotId::of_manifest(canonical(&bytes)));
        let manifest = decode(canonical(&bytes)).unwrap();
        assert_eq!(manifest.images[1].root.unwrap().hint, None);
    }

    #[test]
    fn fields_of_versions_to_come_are_kept_or_named() {
        let mut manifest = example();
        manifest.other_fields = vec![
            Field {
                number: 20_003,
                bytes: vec![1, 2],
            },
            Field {
                number: 20_009,
                bytes: Vec::new(),
            },
        ];
        let bytes = manifest.encode(StoreFormat::Two);
        assert_eq!(decode(&bytes), Ok(manifest.clone()));
        manifest.other_fields[1].number = 20_003;
        let twice = manifest.encode(StoreFormat::Two);
        assert!(matches!(decode(&twice), Err(Malformed::Wrong(_))));
        manifest.other_fields[1].number = 20_009 | 1 << 15;
        let must = manifest.encode(StoreFormat::Two);
        assert_eq!(decode(&must), Err(Malformed::NewerField { number: 20_009 }));
    }

    #[test]
    fn a_newer_manifest_is_not_called_damaged() {
        let mut bytes = example().encode(StoreFormat::Two);
        bytes[0] = 3;
        assert_eq!(decode(&bytes), Err(Malformed::Newer { version: 3 }));
        assert!(canonical(&bytes).len() < bytes.len());
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
            for format in FORMATS {
                match decode(&manifest.encode(format)) {
                    Err(Malformed::Wrong(reason)) => assert!(reason.contains(says), "{reason}"),
                    other => panic!("{says}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn counts_are_capped_before_anything_is_allocated() {
        let encoded = example().encode(StoreFormat::One);
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

    /// What is accepted has one form. Hints that were cut off are hints to nowhere.
    fn has_one_form(bytes: &[u8]) {
        let Ok(manifest) = decode(bytes) else { return };
        let format = FORMATS[usize::from(bytes[0] == 2)];
        assert_eq!(canonical(&manifest.encode(format)), canonical(bytes));
        assert!(manifest.created() <= manifest.created());
        for image in &manifest.images {
            let _ = (image.file_name(), image.pages(), image.tree());
        }
    }

    proptest! {
        /// Whatever bytes there are: no panic, and what is accepted has one form.
        #[test]
        fn changed_bytes_are_refused_or_have_one_form(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
            two in any::<bool>(),
        ) {
            let mut bytes = example().encode(FORMATS[usize::from(two)]);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            has_one_form(&bytes);
            bytes.truncate(cut.index(bytes.len()));
            has_one_form(&bytes);
        }

        #[test]
        fn any_bytes_are_refused_or_have_one_form(
            tail in prop::collection::vec(any::<u8>(), 0..400),
            version in 0_u32..4,
        ) {
            let mut bytes = version.to_le_bytes().to_vec();
            if version == 2 {
                let len = u32::try_from(tail.len() + 12).unwrap();
                bytes.extend_from_slice(&len.to_le_bytes());
            }
            bytes.extend_from_slice(&4096_u32.to_le_bytes());
            bytes.extend_from_slice(&tail);
            has_one_form(&bytes);
            has_one_form(&tail);
        }
    }
}
