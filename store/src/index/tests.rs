//! The double promises what RocksDB promises: both tell the same of one history.

use std::path::Path;

use crate::id::{ChunkKey, ChunkKind};
use crate::pack::{EntryNumber, Location, PackNumber};

const KEYS: u8 = 12;

fn key(number: u8) -> ChunkKey {
    ChunkKey {
        kind: ChunkKind::from_byte(number % 3).expect("a kind"),
        prefix: [number; 16],
    }
}

fn location(number: u64) -> Location {
    Location {
        pack: PackNumber((number % 5) as u32),
        entry: EntryNumber(number as u32),
    }
}

/// The numbers that a history is drawn from.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// What an index of one kind tells along the history of a seed: of a writer at once,
/// of readers opened before and after what they look for was flushed.
macro_rules! history {
    ($kind:ident, $path:expr, $seed:expr) => {{
        use super::$kind::{IndexReader, IndexWriter};
        let path: &Path = $path;
        let mut draw = Draw($seed);
        let mut told: Vec<String> = Vec::new();
        let mut writer = Some(IndexWriter::open_or_create(path).unwrap());
        let mut readers: Vec<IndexReader> = Vec::new();
        for step in 0..60 {
            match draw.below(8) {
                0 | 1 => {
                    let entries: Vec<_> = (0..=draw.below(4))
                        .map(|_| (key(draw.below(KEYS.into()) as u8), location(draw.below(99))))
                        .collect();
                    writer.as_ref().unwrap().put(entries).unwrap();
                }
                2 => {
                    let pack = draw.below(5) as u32;
                    let keys: Vec<_> = (0..KEYS).map(key).collect();
                    let writer = writer.as_ref().unwrap();
                    writer.remove_if(keys, |at| at.pack.0 == pack).unwrap();
                }
                3 => writer.as_ref().unwrap().flush().unwrap(),
                4 => {
                    // Closing flushes.
                    drop(writer.take());
                    writer = Some(IndexWriter::open(path).unwrap());
                }
                5 => readers.push(IndexReader::open(path).unwrap()),
                6 => {
                    let number = draw.below(KEYS.into()) as u8;
                    let found = writer.as_ref().unwrap().get(key(number)).unwrap();
                    told.push(format!("{step}: the writer has {number} at {found:?}"));
                }
                _ => {
                    for (which, reader) in readers.iter().enumerate() {
                        let all: Vec<_> = reader.entries().map(|it| it.unwrap()).collect();
                        let keys: Vec<_> = (0..KEYS).map(key).collect();
                        let many = reader.get_many(&keys).unwrap();
                        let one = reader.get(keys[3]).unwrap();
                        let manifests = reader.manifests().count();
                        told.push(format!(
                            "{step}: {which}: {all:?} {many:?} {one:?} {manifests}"
                        ));
                    }
                }
            }
        }
        told
    }};
}

#[test]
fn the_double_tells_what_rocksdb_tells() {
    let mut looks = 0;
    for seed in 1..40 {
        let dir = tempfile::tempdir().unwrap();
        let rocks = history!(rocks, &dir.path().join("rocks"), seed);
        let double = history!(double, &dir.path().join("double"), seed);
        assert_eq!(rocks, double, "seed {seed}");
        looks += rocks.len();
    }
    assert!(looks > 400, "{looks} looks");
}
