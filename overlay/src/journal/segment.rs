//! A segment of a journal: its name and its bytes.
//!
//! ```text
//! segment   magic "SNAPOVJ1" | key 16 | number u64 | first entry u64 | check 8
//!           | entry | entry | ...
//! entry     block u64 | slot u32 | count u32 | kind u8 | 0 x 7 | check 8
//! ```
//!
//! Numbers are little-endian. `check` is the beginning of the keyed BLAKE3 of what is
//! before it, and of the entry's number: an entry that was torn, or was never this
//! segment's, ends the journal. What ended a process tears no entry but the last; one
//! before others that are whole is damage. After a power cut it is if a mark after it says
//! that it was on the disk. Entries are never changed. Kinds: 1, blocks in slots that
//! follow each other; 2, blocks that are zeros; 3, the data of all entries before number
//! `block` is on the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::step::step;

const MAGIC: &[u8; 8] = b"SNAPOVJ1";
pub(super) const HEADER_BYTES: usize = 48;
pub(super) const ENTRY_BYTES: usize = 32;
const CHECKED_BYTES: usize = 24;
pub(super) const SLOTS: u8 = 1;
pub(super) const ZEROS: u8 = 2;
pub(super) const MARK: u8 = 3;

/// Where the segments of one overlay's journal are.
#[derive(Clone, Debug)]
pub struct SegmentPath {
    /// The directory.
    pub dir: PathBuf,
    /// What their names begin with.
    pub name: String,
}

impl SegmentPath {
    pub(super) fn of(&self, segment: u64) -> PathBuf {
        self.dir
            .join(format!("{}.{segment:016x}.journal", self.name))
    }

    /// Removes the segments behind this one. They are left of a journal that was torn before
    /// them, and one could continue what is written from now on.
    pub(super) fn remove_after(&self, segment: u64) -> io::Result<()> {
        let prefix = format!("{}.", self.name);
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".journal"))
                .and_then(|digits| u64::from_str_radix(digits, 16).ok());
            if number.is_some_and(|number| number > segment) {
                step("remove a segment of a journal");
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// One entry that is whole.
pub(super) struct Entry {
    pub(super) number: u64,
    pub(super) block: u64,
    pub(super) slot: u32,
    pub(super) count: u32,
    pub(super) kind: u8,
}

impl Entry {
    pub(super) fn encode(&self, key: &[u8; 32]) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.block.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.slot.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[16] = self.kind;
        let sum = check(key, self.number, &bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(&sum);
        bytes
    }
}

/// What is in a segment.
pub(super) struct Segment {
    /// Up to one that is not whole.
    pub(super) entries: Vec<Entry>,
    pub(super) next: u64,
    /// How many are whole after that, and which of all a mark among them says to be on
    /// the disk: those before this number.
    pub(super) whole_after: usize,
    pub(super) synced_after: u64,
}

/// Makes the file of a segment whose first entry has this number. Returns the key of its
/// checks, too.
pub(super) fn begin_segment(
    path: &SegmentPath,
    segment: u64,
    entries: u64,
) -> io::Result<(Arc<File>, [u8; 32])> {
    step("begin a segment of a journal");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path.of(segment))?;
    let mut random = [0; 16];
    let mut source = File::open("/dev/urandom")?;
    source.read_exact(&mut random)?;
    let key = key_of(&random);
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..24].copy_from_slice(&random);
    header[24..32].copy_from_slice(&segment.to_le_bytes());
    header[32..40].copy_from_slice(&entries.to_le_bytes());
    let sum = check(&key, u64::MAX, &header[..40]);
    header[40..].copy_from_slice(&sum);
    step("write the header of a segment");
    file.write_all_at(&header, 0)?;
    Ok((Arc::new(file), key))
}

/// `None` if there is no such segment, or its beginning is torn: then nothing was ever
/// entered into it.
pub(super) fn read_segment(
    path: &Path,
    segment: u64,
    expected: Option<u64>,
) -> io::Result<Option<Segment>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
        return Ok(None);
    }
    let key = key_of(&bytes[8..24]);
    let first = u64_at(&bytes, 32);
    let is_whole = check(&key, u64::MAX, &bytes[..40]) == bytes[40..48]
        && u64_at(&bytes, 24) == segment
        && expected.is_none_or(|expected| expected == first);
    if !is_whole {
        return Ok(None);
    }
    let mut read = Segment {
        entries: Vec::new(),
        next: first,
        whole_after: 0,
        synced_after: 0,
    };
    for (number, bytes) in (first..).zip(bytes[HEADER_BYTES..].chunks_exact(ENTRY_BYTES)) {
        if check(&key, number, &bytes[..CHECKED_BYTES]) != bytes[CHECKED_BYTES..] {
            continue;
        }
        let entry = Entry {
            number,
            block: u64_at(bytes, 0),
            slot: u32_at(bytes, 8),
            count: u32_at(bytes, 12),
            kind: bytes[16],
        };
        if number == read.next {
            read.next += 1;
            read.entries.push(entry);
            continue;
        }
        read.whole_after += 1;
        if entry.kind == MARK {
            read.synced_after = read.synced_after.max(entry.block);
        }
    }
    Ok(Some(read))
}

fn check(key: &[u8; 32], number: u64, bytes: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&number.to_le_bytes()).update(bytes);
    let mut check = [0; 8];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    check
}

fn key_of(header_key: &[u8]) -> [u8; 32] {
    *blake3::hash(header_key).as_bytes()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}
