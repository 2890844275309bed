//! Imports beside a collection: what a stream refers to and does not hold may be dead in
//! the store, some of it in packs that are condemned.

use std::path::Path;

use crate::commit::chunk_writer::ChunkWriter;
use crate::error::Error;
use crate::gc::GcOptions;
use crate::gc::mark::Reachability;
use crate::gc::state::CollectorState;
use crate::id::{ChunkId, ChunkKind, SnapshotId};
use crate::manifest::ImageRole;
use crate::pack::PackNumber;
use crate::page::PageSize;
use crate::progress::Silent;
use crate::store::Store;
use crate::transfer::{ImportRequest, PartsWriter};
use crate::{CommitRequest, Input, InputData, InputKind, ParentChoice};

/// A page like no other.
fn page(number: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    blake3::Hasher::new()
        .update(&number.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

fn commit(store: &Store, tag: &str, memory: &[u64], disk: &[u64]) {
    let input = |name: &str, role, pages: &[u64]| Input {
        name: name.to_owned(),
        role,
        data: InputData::Bytes(
            pages
                .iter()
                .flat_map(|it| page(*it))
                .collect::<Vec<u8>>()
                .into(),
        ),
        kind: InputKind::Full,
    };
    let mut inputs = vec![input("memory", ImageRole::Memory, memory)];
    if !disk.is_empty() {
        inputs.push(input("disk0", ImageRole::Disk, disk));
    }
    let request = CommitRequest {
        tag: tag.to_owned(),
        parent: ParentChoice::Nothing,
        inputs,
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent).unwrap();
}

/// A snapshot that was removed: its leaf is in a pack that is kept, one of its pages in
/// another one, which no snapshot needs.
struct Removed {
    _dir: tempfile::TempDir,
    store: Store,
    id: SnapshotId,
    manifest: Vec<u8>,
    /// The leaf of its memory.
    leaf: Vec<u8>,
}

const TAG: &str = "removed";

impl Removed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        commit(&store, "first", &[1, 2], &[]);
        commit(&store, TAG, &[1, 3], &[5, 6, 7, 8]);
        let parts = store.parts(TAG).unwrap();
        let (_, root) = parts.roots().find(|(name, _)| *name == "memory").unwrap();
        let leaf = parts.node(root).unwrap().canonical;
        let (id, manifest) = (parts.id(), parts.canonical_manifest().to_vec());
        drop(parts);
        store.remove_tags(&["first".to_owned()]).unwrap();
        commit(&store, "last", &[9], &[5, 6, 7, 8]);
        store.remove_tags(&[TAG.to_owned()]).unwrap();
        Self {
            _dir: dir,
            store,
            id,
            manifest,
            leaf,
        }
    }

    fn gc(&self) {
        self.store.gc(GcOptions::default(), &Silent).unwrap();
    }

    /// A stream of its manifest alone.
    fn manifest_alone(&self) -> Vec<u8> {
        let mut stream = Vec::new();
        let parts = PartsWriter::new(&mut stream, Path::new("a stream"), PageSize::KIB_4);
        parts.unwrap().finish(TAG, &self.manifest).unwrap();
        stream
    }

    fn condemned(&self) -> Vec<PackNumber> {
        let state = CollectorState::read(&self.store.layout).unwrap();
        state.condemned.into_keys().collect()
    }

    fn assert_whole(&self) {
        let report = self.store.verify(true, &Silent).unwrap();
        assert_eq!(report.findings, []);
        assert_eq!(self.store.tag(TAG).unwrap(), Some(self.id));
    }
}

/// A collection that has found nothing that needs it deletes it as soon as it has the lock.
#[test]
fn what_is_acknowledged_is_in_no_condemned_pack() {
    let removed = Removed::new();
    // Whoever lives since before keeps what is condemned where it is.
    let writer = ChunkWriter::new(&removed.store).unwrap();
    removed.gc();
    assert_eq!(removed.condemned().len(), 1, "the pack of page 1");
    let stream = removed.manifest_alone();
    let request = ImportRequest::default();
    removed
        .store
        .import(&request, &stream[..], &Silent)
        .unwrap();
    assert_eq!(removed.condemned(), []);
    drop(writer);
    removed.gc();
    removed.assert_whole();
}

#[test]
fn what_was_deleted_after_it_was_looked_at_is_overtaken() {
    let removed = Removed::new();
    let older = ChunkWriter::new(&removed.store).unwrap();
    removed.gc();
    let mut sink = ChunkWriter::new(&removed.store).unwrap();
    let id = ChunkId::from_hash(
        ChunkKind::Node,
        *ChunkKind::Node.hash(&removed.leaf).as_bytes(),
    );
    assert!(sink.known(&[id]).unwrap()[0].is_some(), "the leaf is kept");
    let mut reach = Reachability::new(&removed.store.chunks).unwrap();
    reach.add_snapshot(removed.id).unwrap();
    drop(older);
    // It looks at no root that has no tag, and this writer is younger than what it condemned.
    removed.gc();
    let kept = sink.keep(reach.into_marks().packs());
    assert!(matches!(kept, Err(Error::Overtaken { .. })), "{kept:?}");
}
