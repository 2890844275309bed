//! The store through its public interface: inputs that are no files, pins that
//! travel, parents without a tag.

#![allow(clippy::unwrap_used)]

mod bases;
mod identity;
mod inputs;
mod library;
mod optimize;
mod pages;
mod partial_pages;
mod pins;
mod precopy;
mod reading;
mod transfer;
mod working_sets;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use snapstore_store::{
    CommitRequest, Committed, Extent, GcOptions, GcReport, ImageRole, Input, InputData, InputKind,
    Manifest, PageSize, ParentChoice, Result, Silent, Store,
};

const KIB_4: u64 = 4096;

/// A store in a directory of its own.
struct Fixture {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new(page_size: PageSize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), page_size).unwrap();
        Self { _dir: dir, store }
    }

    /// A second opening of the store, as another process would have.
    fn other(&self) -> Store {
        Store::open(self.store.path()).unwrap()
    }

    fn commit(&self, tag: &str, parent: ParentChoice, input: Input) -> Result<Committed> {
        self.store
            .commit(&request(tag, parent, vec![input]), &Silent)
    }

    fn memory(&self, manifest: &Manifest) -> Vec<u8> {
        let image = manifest.image("memory").unwrap();
        self.store.read_file_image(image, 1 << 30).unwrap()
    }

    /// All packs, tags and leases of the store, with their bytes.
    fn content(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut content = BTreeMap::new();
        for dir in ["packs", "tags", "leases"] {
            for entry in std::fs::read_dir(self.store.path().join(dir)).unwrap() {
                let path = entry.unwrap().path();
                content.insert(path.clone(), std::fs::read(path).unwrap());
            }
        }
        content
    }
}

fn request(tag: &str, parent: ParentChoice, inputs: Vec<Input>) -> CommitRequest {
    CommitRequest {
        tag: tag.to_owned(),
        parent,
        inputs,
        ..CommitRequest::default()
    }
}

fn memory(data: InputData, kind: InputKind) -> Input {
    Input {
        name: "memory".to_owned(),
        role: ImageRole::Memory,
        data,
        kind,
    }
}

fn extents(file: &Arc<File>, size_bytes: u64, extents: Vec<Extent>) -> InputData {
    InputData::Extents {
        files: vec![file.clone()],
        label: "the frozen memory".to_owned(),
        size_bytes,
        extents,
    }
}

fn extent(image_offset: u64, file_offset: u64, length: u64) -> Extent {
    Extent {
        image_offset,
        file: 0,
        file_offset,
        length,
    }
}

/// Bytes that do not compress and depend on the seed only.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn file_of(bytes: &[u8]) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    Arc::new(file)
}

fn remove(store: &Store, tag: &str) {
    store.remove_tags(&[tag.to_owned()]).unwrap();
}

/// Two collections: what the first one only condemns, the second one deletes.
fn collect(store: &Store) -> GcReport {
    store.gc(GcOptions::default(), &Silent).unwrap();
    store.gc(GcOptions::default(), &Silent).unwrap()
}

/// Nothing that is left is needed. A process that another test is starting has
/// duplicates of this one's files until it begins its program, so what is
/// locked may be so for a moment longer.
fn collect_all(store: &Store) {
    for _ in 0..100 {
        collect(store);
        if packs(store.path()) == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("something is kept");
}

/// A child that sleeps until this is dropped.
struct Killed(Child);

impl Killed {
    fn start(stdin: Stdio) -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000").stdin(stdin).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn packs(path: &Path) -> usize {
    std::fs::read_dir(path.join("packs")).unwrap().count()
}
