//! A store of which one file is arbitrary bytes: whatever is done with it never panics,
//! and what can be read is what was stored.
//!
//! The first byte says which file, and whether the bytes get the frame and the checksum
//! of a small file, without which they get no further.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use snapstore_store::{
    CommitRequest, GcOptions, ImageRole, Input, InputData, InputKind, PageSize, Silent, Store,
};

const TAG: &str = "tag";

/// A store with one snapshot, and what its files hold.
struct Subject {
    _dir: tempfile::TempDir,
    root: PathBuf,
    files: Vec<(PathBuf, Vec<u8>)>,
    memory: Vec<u8>,
}

static SUBJECT: LazyLock<Subject> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = Store::create(&root, PageSize::KIB_4).unwrap();
    let mut memory = vec![0; 16 * 4096];
    for (number, page) in memory.chunks_mut(4096).enumerate().skip(1) {
        page.fill(number as u8);
        page[0] = 77;
    }
    let request = CommitRequest {
        tag: TAG.to_owned(),
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(Arc::from(memory.clone())),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    };
    store.commit(&request, &Silent).unwrap();
    store.gc(GcOptions::default(), &Silent).unwrap();
    let pack = std::fs::read_dir(root.join("packs")).unwrap();
    let pack = pack.map(|entry| entry.unwrap().path()).next().unwrap();
    let mut files = vec![pack];
    for name in [
        "config",
        "config-copy",
        "collector",
        "recent-tags",
        "tags/tag",
    ] {
        files.push(root.join(name));
    }
    let files = files.into_iter().filter(|path| path.exists());
    let files = files.map(|path| (path.clone(), std::fs::read(path).unwrap()));
    Subject {
        files: files.collect(),
        _dir: dir,
        root,
        memory,
    }
});

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else {
        return;
    };
    let subject = &*SUBJECT;
    let (path, whole) = &subject.files[usize::from(which >> 1) % subject.files.len()];
    let bytes = match which & 1 {
        0 => bytes.to_vec(),
        _ => framed(path, &whole[..16], bytes),
    };
    std::fs::write(path, bytes).unwrap();
    use_it(subject);
    std::fs::write(path, whole).unwrap();
});

/// Whatever is answered, it is an answer.
fn use_it(subject: &Subject) {
    let Ok(store) = Store::open(&subject.root) else {
        return;
    };
    let only_say = GcOptions {
        dry_run: true,
        ..GcOptions::default()
    };
    let _ = store.gc(only_say, &Silent);
    let _ = store.verify(true, &Silent);
    let _ = store.snapshots();
    if let Ok(id) = store.resolve(TAG)
        && let Ok(manifest) = store.manifest(id)
        && let Some(image) = manifest.images.first()
    {
        let reader = store.image_reader(image);
        let mut page = vec![0; 4096];
        for (number, stored) in subject.memory.chunks(4096).enumerate() {
            if matches!(reader.read_at(&mut page, number as u64 * 4096), Ok(4096)) {
                assert!(page == stored, "another page {number} is served");
            }
        }
    }
}

/// A small file with this payload: the magic and the version of the one that is whole.
fn framed(path: &Path, head: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = head[..12].to_vec();
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    let mut hasher = blake3::Hasher::new();
    hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
    hasher.update(&[0]);
    hasher.update(&bytes);
    bytes.extend(hasher.finalize().as_bytes());
    bytes
}
