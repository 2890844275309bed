//! Streams of snapshots from arbitrary bytes: never a panic, never a tag of what is not
//! whole, and no tag at all if the import fails.
//!
//! The first byte says how the others are taken: as a whole stream, or as the content of
//! blocks, which get the checksums that they have to have. What is in a block otherwise
//! never gets further.

#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use snapstore_store::{GcOptions, ImportRequest, PageSize, Silent, Store};

const IDENTITY: [u8; 16] = [7; 16];

static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
static STORE: LazyLock<Store> =
    LazyLock::new(|| Store::create(&DIR.path().join("store"), PageSize::KIB_4).unwrap());

fuzz_target!(|bytes: &[u8]| {
    let Some((how, bytes)) = bytes.split_first() else {
        return;
    };
    let stream = match how % 4 {
        0 => bytes.to_vec(),
        blocks => sealed(bytes, usize::from(blocks)),
    };
    let request = ImportRequest {
        replace: how & 4 == 0,
        ..ImportRequest::default()
    };
    let store = &*STORE;
    match store.import(&request, &stream[..], &Silent) {
        Err(_) => assert_eq!(store.tags().unwrap(), BTreeMap::new(), "a tag was set"),
        Ok(_) => {
            let report = store.verify(true, &Silent).unwrap();
            assert!(report.findings.is_empty(), "{:?}", report.findings);
            let tags: Vec<String> = store.tags().unwrap().into_keys().collect();
            store.remove_tags(&tags).unwrap();
            store.gc(GcOptions::default(), &Silent).unwrap();
        }
    }
});

/// A stream with this content in so many blocks.
fn sealed(content: &[u8], blocks: usize) -> Vec<u8> {
    let mut stream = b"SNAPSTRM".to_vec();
    stream.extend(1_u32.to_le_bytes());
    stream.extend(4096_u32.to_le_bytes());
    stream.extend(0_u64.to_le_bytes());
    stream.extend(IDENTITY);
    stream.extend([0; 8]);
    stream.extend(&blake3::hash(&stream).as_bytes()[..16]);
    let len = content.len().div_ceil(blocks).max(1);
    for (number, content) in content.chunks(len).enumerate() {
        let mut block = (number as u64).to_le_bytes().to_vec();
        block.extend([0; 4]);
        block.extend((content.len() as u32).to_le_bytes());
        block.extend((content.len() as u32).to_le_bytes());
        block.extend([0; 4]);
        block.extend(&check(&block)[..8]);
        block.extend(content);
        block.extend(&check(&block)[..16]);
        stream.extend(block);
    }
    stream
}

fn check(bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&IDENTITY).update(bytes);
    *hasher.finalize().as_bytes()
}
