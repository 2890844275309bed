//! A run of the index: the changes of one publication, or the sum of several.
//!
//! ```text
//! 17  key: kind and first bytes of the hash
//!  8  location; all bits set for an entry that is removed
//! ```
//! ascending by key, in a sealed file. How runs follow each other is told by their names
//! (`index::run`).

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::Result;
use crate::format::sealed_file::Format;
use crate::pack::Location;

const FORMAT: Format = Format {
    magic: *b"SNAPIRUN",
    version: 1,
};
pub(crate) const KEY_LEN: usize = 17;
const RECORD_LEN: usize = KEY_LEN + Location::LEN;
const REMOVED: [u8; Location::LEN] = [0xff; Location::LEN];

/// A key as it is filed.
pub(crate) type Key = [u8; KEY_LEN];
/// What to make of keys: where the chunk is, or nothing.
pub(crate) type Changes = BTreeMap<Key, Option<Location>>;

/// The changes of a run, as they are stored.
#[derive(Debug)]
pub(crate) struct Run(Vec<u8>);

impl Run {
    pub fn new(changes: &Changes) -> Self {
        let mut payload = Vec::with_capacity(changes.len() * RECORD_LEN);
        for (key, value) in changes {
            payload.extend_from_slice(key);
            payload.extend_from_slice(&value.map_or(REMOVED, Location::to_bytes));
        }
        Self(payload)
    }

    /// Replaces `path` by it, durably.
    pub fn write(&self, path: &Path) -> Result<()> {
        FORMAT.write(path, &self.0)
    }

    /// The run at `path`; `None` if there is no such file, and an inner `None` if it has
    /// a part of an entry.
    pub fn read(path: &Path) -> Result<Option<Option<Self>>> {
        let payload = FORMAT.read(path)?;
        let is_whole = |payload: &Vec<u8>| payload.len().is_multiple_of(RECORD_LEN);
        Ok(payload.map(|payload| Some(payload).filter(is_whole).map(Self)))
    }

    /// How many entries it has.
    pub fn len(&self) -> usize {
        self.0.len() / RECORD_LEN
    }

    /// All of them, ascending.
    pub fn changes(&self) -> impl Iterator<Item = (Key, Option<Location>)> {
        let records = self.0.as_chunks().0.iter();
        records.map(|record| (*key_of(record), value_of(record)))
    }

    /// What it makes of a key, if anything.
    pub fn get(&self, key: &Key) -> Option<Option<Location>> {
        let records = self.0.as_chunks::<RECORD_LEN>().0;
        let found = records.binary_search_by(|record| key_of(record).cmp(key));
        found.ok().map(|at| value_of(&records[at]))
    }
}

fn key_of(record: &[u8; RECORD_LEN]) -> &Key {
    record.first_chunk().expect("a record begins with its key")
}

fn value_of(record: &[u8; RECORD_LEN]) -> Option<Location> {
    let value = record.last_chunk().expect("a record ends with its value");
    (*value != REMOVED).then(|| Location::from_bytes(*value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{EntryNumber, PackNumber};

    #[test]
    fn what_is_written_is_read_and_part_of_an_entry_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("00000001.run");
        let at = Location {
            pack: PackNumber(7),
            entry: EntryNumber(3),
        };
        let changes = Changes::from([([1; KEY_LEN], Some(at)), ([2; KEY_LEN], None)]);
        Run::new(&changes).write(&path).unwrap();
        let run = Run::read(&path).unwrap().unwrap().unwrap();
        assert_eq!(run.changes().collect::<Changes>(), changes);
        assert_eq!(run.get(&[2; KEY_LEN]), Some(None));
        assert_eq!(run.get(&[3; KEY_LEN]), None);
        FORMAT.write(&path, &run.0[..RECORD_LEN + 1]).unwrap();
        assert!(Run::read(&path).unwrap().unwrap().is_none());
        assert!(Run::read(&dir.path().join("none")).unwrap().is_none());
    }
}
