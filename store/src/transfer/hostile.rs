//! Streams whose checksums are right and whose content no store has.

use std::path::Path;

use proptest::prelude::*;

use crate::error::{Damage, Error, Result};
use crate::format::config::StoreFormat;
use crate::format::manifest::canonical;
use crate::format::node::{Child, Node};
use crate::format::stream::{EncodedBlock, MAX_CONTENT_LEN, Record, StreamWriter};
use crate::id::{ChunkId, ChunkKind};
use crate::manifest::{Field, Image, ImageRole, Manifest};
use crate::page::PageSize;
use crate::progress::Silent;
use crate::store::Store;
use crate::transfer::{ImportRequest, Imported};

const PAGE: [u8; 4096] = [7; 4096];

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
    (dir, store)
}

fn import(store: &Store, stream: &[u8]) -> Result<Imported> {
    store.import(&ImportRequest::default(), stream, &Silent)
}

/// A stream with these records in one block.
fn stream_of(records: &[Record<'_>]) -> Vec<u8> {
    let mut content = Vec::new();
    records
        .iter()
        .for_each(|record| record.append_to(&mut content));
    stream_with(&content)
}

fn stream_with(content: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut writer = StreamWriter::new(&mut stream, Path::new(""), PageSize::KIB_4).unwrap();
    writer.write_block(&EncodedBlock::new(content)).unwrap();
    stream
}

/// A node whose first children these are.
fn node(level: u8, children: &[ChunkId]) -> Node {
    let mut node = Node::empty(level);
    for (slot, id) in children.iter().enumerate() {
        let hash = *id.as_bytes();
        node.set_child(slot, Some(Child { hash, hint: None }));
    }
    node
}

fn manifest(pages: u64, root: ChunkId, change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
    let page_size = PageSize::KIB_4;
    let mut manifest = Manifest {
        page_size,
        created_unix_seconds: 1,
        parent: None,
        first_tag: "a".to_owned(),
        images: vec![Image {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            size_bytes: pages * page_size.bytes(),
            nonzero_pages: 1,
            changed_pages: 1,
            root: Some(Child {
                hash: *root.as_bytes(),
                hint: None,
            }),
            page_size,
        }],
        labels: std::collections::BTreeMap::new(),
        added_chunks: 0,
        added_bytes: 0,
        ..Manifest::blank(page_size)
    };
    change(&mut manifest);
    canonical(&manifest.encode(StoreFormat::Two)).to_vec()
}

fn page(bytes: &[u8]) -> Record<'_> {
    Record::Page { base: None, bytes }
}

fn of_node(canonical: &[u8]) -> Record<'_> {
    Record::Node {
        base: None,
        canonical,
    }
}

fn snapshot<'a>(tags: &[&'a str], manifest: &'a [u8]) -> Record<'a> {
    let tags = tags.to_vec();
    Record::Snapshot { tags, manifest }
}

fn end(snapshots: u32, chunks: u64) -> Record<'static> {
    Record::End { snapshots, chunks }
}

/// What stands for a page, a leaf and the snapshot of one page.
struct Good {
    leaf: Vec<u8>,
    leaf_id: ChunkId,
    manifest: Vec<u8>,
}

impl Good {
    fn new() -> Self {
        let leaf = node(0, &[ChunkKind::Page.hash(&PAGE)]);
        Self {
            leaf: leaf.encode_canonical(),
            leaf_id: leaf.id(),
            manifest: manifest(1, leaf.id(), |_| {}),
        }
    }

    fn records(&self) -> Vec<Record<'_>> {
        vec![
            page(&PAGE),
            of_node(&self.leaf),
            snapshot(&["a"], &self.manifest),
            end(1, 2),
        ]
    }
}

#[test]
fn streams_that_no_export_writes_are_refused() {
    let good = Good::new();
    let (_dir, store) = store();
    let refused = |records: Vec<Record<'_>>, says: &str| {
        let error = import(&store, &stream_of(&records)).expect_err(says);
        assert!(error.to_string().contains(says), "{says}: {error}");
        assert!(store.tags().unwrap().is_empty(), "{says}");
    };
    let without = |position: usize| {
        let mut records = good.records();
        records.remove(position);
        records
    };
    let with = |position: usize, record| {
        let mut records = good.records();
        records[position] = record;
        records
    };
    refused(without(0), "neither before it nor in the store");
    // That left nothing that the next one could find.
    refused(without(1), "neither before it nor in the store");
    refused(without(3), "cut off");
    refused(with(3, end(1, 3)), "tells of another stream");
    refused(with(3, end(2, 2)), "tells of another stream");
    let again = [good.records(), vec![end(1, 2)]].concat();
    refused(again, "tells of another stream");
    refused(with(0, page(&[0; 4096])), "a page of zeros");

    let high = node(9, &[good.leaf_id]).encode_canonical();
    refused(with(1, of_node(&high)), "a node that none writes");
    let long = [&good.leaf[..], &[0]].concat();
    refused(with(1, of_node(&long)), "a node that none writes");
    refused(with(1, of_node(&[])), "a node that none writes");

    refused(with(2, snapshot(&[], &good.manifest)), "without a tag");
    let odd = snapshot(&["../a"], &good.manifest);
    refused(with(2, odd), "a name that none has");
    let twice = snapshot(&["a", "a"], &good.manifest);
    refused(with(2, twice), "a tag twice");
    refused(
        with(2, snapshot(&["a"], b"")),
        "a manifest that none writes",
    );
    let clash = manifest(1, good.leaf_id, |manifest| {
        let mut image = manifest.images[0].clone();
        image.name = "memory.bin".to_owned();
        image.role = ImageRole::File;
        manifest.images.push(image);
    });
    refused(with(2, snapshot(&["a"], &clash)), "have one name");
    import(&store, &stream_of(&good.records())).unwrap();
}

#[test]
fn trees_that_no_reader_reads_are_refused() {
    let good = Good::new();
    let refused = |nodes: &[&[u8]], manifest: &[u8]| {
        let (_dir, store) = store();
        let chunks = 1 + nodes.len() as u64;
        let nodes = nodes.iter().map(|node| of_node(node));
        let ending = [snapshot(&["a"], manifest), end(1, chunks)];
        let records: Vec<_> = [page(&PAGE)]
            .into_iter()
            .chain(nodes)
            .chain(ending)
            .collect();
        let error = import(&store, &stream_of(&records)).unwrap_err();
        assert!(matches!(error, Error::Damaged(_)), "{error}");
        assert!(store.tags().unwrap().is_empty());
    };
    // Higher and lower than the image is, and one that skips a level.
    let middle = node(1, &[good.leaf_id]);
    let bytes = middle.encode_canonical();
    refused(&[&good.leaf, &bytes], &manifest(1, middle.id(), |_| {}));
    refused(&[&good.leaf], &manifest(1000, good.leaf_id, |_| {}));
    let high = node(2, &[good.leaf_id]);
    let root = manifest(512 * 512 + 1, high.id(), |_| {});
    refused(&[&good.leaf, &high.encode_canonical()], &root);
}

#[test]
fn what_a_newer_version_wrote_is_said_to_be_that() {
    let good = Good::new();
    let (_dir, store) = store();
    let newer = |stream: &[u8], says: &str| {
        let error = import(&store, stream).expect_err(says);
        assert!(matches!(error, Error::Newer { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(store.tags().unwrap().is_empty());
    };
    newer(&stream_with(&[3, 1, 2]), "a record of kind 3");
    let mut leaf = good.leaf.clone();
    leaf[1] = 1;
    let records = [page(&PAGE), of_node(&leaf)];
    newer(&stream_of(&records), "a tree node of version 1");
    let mut manifest = good.manifest.clone();
    manifest[0] = 3;
    let records = [
        page(&PAGE),
        of_node(&good.leaf),
        snapshot(&["a"], &manifest),
    ];
    newer(&stream_of(&records), "the manifest of \"a\" in version 3");

    let reseal = |at: usize, byte: u8| {
        let mut stream = stream_of(&good.records());
        stream[at] = byte;
        let check = blake3::hash(&stream[..48]);
        stream[48..64].copy_from_slice(&check.as_bytes()[..16]);
        stream
    };
    newer(&reseal(8, 2), "stream format version 2");
    newer(&reseal(21, 1), "stream feature bit 40");
}

/// What only a newer version understands is kept, or the snapshot is not taken.
#[test]
fn a_field_that_is_not_known_is_not_lost() {
    let good = Good::new();
    let bytes = manifest(1, good.leaf_id, |manifest| {
        manifest.other_fields.push(Field {
            number: 20_077,
            bytes: b"what it says".to_vec(),
        });
    });
    let mut records = good.records();
    records[2] = snapshot(&["a"], &bytes);
    let (_dir, two) = store();
    let id = import(&two, &stream_of(&records)).unwrap().snapshots[0].id;
    assert_eq!(two.manifest(id).unwrap().other_fields[0].number, 20_077);
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    let one = Store::create_in_format(&one, PageSize::KIB_4, StoreFormat::One).unwrap();
    let error = import(&one, &stream_of(&records)).unwrap_err();
    assert!(matches!(error, Error::NotImportable { .. }), "{error}");
    assert!(one.tags().unwrap().is_empty());
}

#[test]
fn a_length_that_no_block_has_is_not_allocated() {
    let (_dir, store) = store();
    let mut stream = stream_of(&Good::new().records());
    for len in [MAX_CONTENT_LEN as u32 + 1, u32::MAX] {
        stream[64 + 12..][..4].copy_from_slice(&len.to_le_bytes());
        stream[64 + 16..][..4].copy_from_slice(&len.to_le_bytes());
        let mut head = stream[24..40].to_vec();
        head.extend_from_slice(&stream[64..64 + 24]);
        let check = blake3::hash(&head);
        stream[64 + 24..64 + 32].copy_from_slice(&check.as_bytes()[..8]);
        let error = import(&store, &stream).unwrap_err();
        assert!(error.to_string().contains("longer than a block"), "{error}");
    }
}

/// Parts of records, and bytes of nobody.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let good = Good::new();
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for record in good.records() {
        let mut part = Vec::new();
        record.append_to(&mut part);
        parts.push(part);
    }
    let part = (proptest::sample::select(parts), any::<u16>(), any::<u8>());
    let part = part.prop_map(|(mut part, at, flip)| {
        let at = usize::from(at) % part.len();
        match flip {
            0..100 => {}
            100..200 => part[at] ^= flip,
            _ => part.truncate(at),
        }
        part
    });
    proptest::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn whatever_a_stream_holds_what_gets_a_tag_is_whole(content in content()) {
        let (_dir, store) = store();
        match import(&store, &stream_with(&content)) {
            Ok(imported) => {
                let report = store.verify(true, &Silent).unwrap();
                prop_assert_eq!(report.findings, []);
                for snapshot in imported.snapshots {
                    store.snapshot(&snapshot.tags[0]).unwrap();
                }
            }
            Err(Error::Damaged(Damage::Stream { .. } | Damage::Missing { .. }))
            | Err(Error::Newer { .. } | Error::NotImportable { .. }) => {
                prop_assert!(store.tags().unwrap().is_empty());
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
