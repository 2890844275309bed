//! Which blocks of an overlay are in which slots, as a list of what was entered.
//!
//! A journal is cut into segments, one file each: a freeze begins a new one, so that what
//! was committed is given up by removing files.
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
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::sync_file;
use crate::map::{LAST_SLOT, Map, Place, Slot};
use crate::step::step;

const MAGIC: &[u8; 8] = b"SNAPOVJ1";
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 32;
const CHECKED_BYTES: usize = 24;
const SLOTS: u8 = 1;
const ZEROS: u8 = 2;
const MARK: u8 = 3;

/// Where the segments of one overlay's journal are.
#[derive(Clone, Debug)]
pub struct SegmentPath {
    /// The directory.
    pub dir: PathBuf,
    /// What their names begin with.
    pub name: String,
}

/// What has survived of an overlay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Survived {
    /// All that was written: only a process has ended.
    Everything,
    /// What was synced: the whole system has ended.
    OnlySynced,
}

/// What a journal said.
pub struct Replayed {
    pub(crate) map: Map,
    entries: u64,
    next_segment: u64,
    first_segment: u64,
}

/// The journal of an overlay that is in use.
pub struct Journal {
    path: SegmentPath,
    file: Arc<File>,
    key: [u8; 32],
    /// Where the next entry goes in the file.
    end: u64,
    entries: u64,
    segment: u64,
    first_segment: u64,
    /// Segments that may have something that is not on the disk.
    unsynced: Vec<Arc<File>>,
    /// Whether it has entries behind its end that could not be removed.
    is_broken: bool,
    /// Whether the name of a segment may not be on the disk.
    has_new_name: bool,
    /// So many entries are on the disk, each with a mark that says so or being one.
    clean: Option<u64>,
}

impl SegmentPath {
    fn of(&self, segment: u64) -> PathBuf {
        self.dir
            .join(format!("{}.{segment:016x}.journal", self.name))
    }

    /// Removes the segments behind this one. They are left of a journal that was torn before
    /// them, and one could continue what is written from now on.
    fn remove_after(&self, segment: u64) -> io::Result<()> {
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

impl Journal {
    /// The first segment of a new journal.
    ///
    /// # Errors
    /// The operating system's; there is such a segment.
    pub fn create(path: SegmentPath) -> io::Result<Self> {
        Self::begin(path, 0, 0, 0)
    }

    /// Goes on where a journal ended, in a segment that says all that is known, of an
    /// overlay in the file `data`; both are on the disk when this returns. The segments
    /// before it are needed until [`Journal::begins_here`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn go_on(path: SegmentPath, after: &Replayed, data: &File) -> io::Result<Self> {
        sync_file(data)?;
        let (segment, first) = (after.next_segment, after.first_segment);
        path.remove_after(segment)?;
        // One number is left out: who reads on from the segments before this one, because
        // nobody was told of it yet, must not take what it says to be on the disk for theirs.
        let mut journal = Self::begin(path, segment, after.entries + 1, first)?;
        let mut run: Vec<(u64, Slot)> = Vec::new();
        for (block, place) in after.map.iter() {
            match place {
                Place::Slot(slot) => run.push((block, slot)),
                Place::Zeros => journal.append_zeros(block..block + 1)?,
            }
        }
        journal.append_slots(&run)?;
        sync_file(&journal.file)?;
        // Those that hold the marks of the segments before are removed.
        journal.append_mark(journal.entries)?;
        sync_file(&journal.file)?;
        Ok(journal)
    }

    /// The segment that is written to.
    #[must_use]
    pub fn segment(&self) -> u64 {
        self.segment
    }

    /// Whoever looks for the journal has been told to begin with the present segment.
    pub fn begins_here(&mut self) {
        self.forget_before(self.segment);
    }

    fn begin(path: SegmentPath, segment: u64, entries: u64, first: u64) -> io::Result<Self> {
        let (file, key) = begin_segment(&path, segment, entries)?;
        Ok(Self {
            path,
            unsynced: vec![file.clone()],
            is_broken: false,
            has_new_name: true,
            clean: None,
            file,
            key,
            end: HEADER_BYTES as u64,
            entries,
            segment,
            first_segment: first,
        })
    }

    /// Begins the next segment; returns its number.
    pub(crate) fn next_segment(&mut self) -> io::Result<u64> {
        let segment = self.segment + 1;
        let (file, key) = begin_segment(&self.path, segment, self.entries)?;
        self.unsynced.push(file.clone());
        (self.has_new_name, self.clean) = (true, None);
        (self.file, self.key, self.segment) = (file, key, segment);
        self.end = HEADER_BYTES as u64;
        Ok(segment)
    }

    /// How many entries there are, marks included.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// The first segment that is needed.
    pub(crate) fn first_segment(&self) -> u64 {
        self.first_segment
    }

    pub(crate) fn unsynced(&self) -> Vec<Arc<File>> {
        self.unsynced.clone()
    }

    /// Whether all that it says is on the disk.
    pub(crate) fn is_clean(&self) -> bool {
        self.clean == Some(self.entries)
    }

    /// The directory, if the name of a segment in it may not be on the disk.
    pub(crate) fn new_segment_in(&self) -> Option<PathBuf> {
        self.has_new_name.then(|| self.path.dir.clone())
    }

    /// These files are on the disk, with their names and up to a mark, which makes it
    /// `marked` entries if it vouches for all of them.
    pub(crate) fn synced(&mut self, files: &[Arc<File>], marked: Option<u64>) {
        // What is written to goes on to be.
        let is_done = |one: &Arc<File>| files.iter().any(|it| Arc::ptr_eq(it, one));
        let current = self.file.clone();
        self.unsynced
            .retain(|one| Arc::ptr_eq(one, &current) || !is_done(one));
        if is_done(&current) {
            self.has_new_name = false;
            self.clean = self.clean.max(marked);
        }
    }

    /// Removes segments that nobody looks for any more.
    pub(crate) fn forget_before(&mut self, first: u64) {
        for segment in self.first_segment..first {
            step("remove a segment of a journal");
            let path = self.path.of(segment);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "a journal's old segment stays");
            }
        }
        self.first_segment = self.first_segment.max(first);
    }

    pub(crate) fn append_slots(&mut self, new: &[(u64, Slot)]) -> io::Result<()> {
        let follows = |a: &(u64, Slot), b: &(u64, Slot)| a.0 + 1 == b.0 && a.1.0 + 1 == b.1.0;
        let runs = new.chunk_by(follows);
        let entries = runs.map(|run| {
            let (block, slot) = run[0];
            (block, slot.0, run.len() as u64, SLOTS)
        });
        self.append(entries.collect())
    }

    pub(crate) fn append_zeros(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut entries = Vec::new();
        let mut block = blocks.start;
        while block < blocks.end {
            let count = (blocks.end - block).min(u64::from(u32::MAX));
            entries.push((block, 0, count, ZEROS));
            block += count;
        }
        self.append(entries)
    }

    pub(crate) fn append_mark(&mut self, entries: u64) -> io::Result<()> {
        self.append(vec![(entries, 0, 0, MARK)])
    }

    fn append(&mut self, entries: Vec<(u64, u32, u64, u8)>) -> io::Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES);
        for (number, (block, slot, count, kind)) in (self.entries..).zip(&entries) {
            let mut entry = [0; ENTRY_BYTES];
            let count = u32::try_from(*count).map_err(io::Error::other)?;
            entry[..8].copy_from_slice(&block.to_le_bytes());
            entry[8..12].copy_from_slice(&slot.to_le_bytes());
            entry[12..16].copy_from_slice(&count.to_le_bytes());
            entry[16] = *kind;
            let sum = check(&self.key, number, &entry[..CHECKED_BYTES]);
            entry[CHECKED_BYTES..].copy_from_slice(&sum);
            bytes.extend_from_slice(&entry);
        }
        step("enter into a journal");
        if self.is_broken {
            return Err(io::Error::other(
                "the journal has an entry that is not to be",
            ));
        }
        if let Err(error) = self.file.write_all_at(&bytes, self.end) {
            // Some may be there as a whole, though their slots are given up.
            self.is_broken = self.file.set_len(self.end).is_err();
            return Err(error);
        }
        self.end += bytes.len() as u64;
        self.entries += entries.len() as u64;
        Ok(())
    }
}

fn begin_segment(
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

/// One entry that is whole.
struct Entry {
    number: u64,
    block: u64,
    slot: u32,
    count: u32,
    kind: u8,
}

impl Replayed {
    /// Reads the segments from `first_segment` on, of an image of so many blocks. A segment
    /// that is missing, or torn, ends the journal there.
    ///
    /// # Errors
    /// A segment cannot be read, or is damaged ([`io::ErrorKind::InvalidData`]).
    pub fn read(
        path: &SegmentPath,
        first_segment: u64,
        blocks: u64,
        survived: Survived,
    ) -> io::Result<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut segment = first_segment;
        let mut number = None;
        while let Some(read) = read_segment(&path.of(segment), segment, number)? {
            if read.is_damaged(survived) {
                let path = path.of(segment);
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} is damaged: what was written after that is lost",
                        path.display()
                    ),
                ));
            }
            number = Some(read.next);
            entries.extend(read.entries);
            segment += 1;
        }
        // Segments behind a gap, or behind one that was torn, are not this journal's.
        if survived == Survived::OnlySynced {
            let marks = entries.iter().filter(|entry| entry.kind == MARK);
            let synced = marks.map(|mark| mark.block).max().unwrap_or(0);
            entries.retain(|entry| entry.number < synced);
        }
        let mut map = Map::default();
        for entry in &entries {
            apply(&mut map, entry, blocks)?;
        }
        Ok(Self {
            map,
            entries: number.unwrap_or(0),
            next_segment: segment.max(first_segment),
            first_segment,
        })
    }

    /// That it has as many entries as were counted when its server ended: less is damage,
    /// however it ends.
    ///
    /// # Errors
    /// It has fewer ([`io::ErrorKind::InvalidData`]).
    pub fn has_at_least(&self, entries: u64, path: &SegmentPath) -> io::Result<()> {
        if self.entries >= entries {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the journal {}/{}.*.journal is damaged: of {entries} entries {} are there",
                path.dir.display(),
                path.name,
                self.entries
            ),
        ))
    }

    /// Whether there is not even the first segment.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.next_segment == self.first_segment
    }

    /// Whether any block is in a slot of the overlay's file.
    #[must_use]
    pub fn needs_file(&self) -> bool {
        self.map.slots().next().is_some()
    }
}

fn apply(map: &mut Map, entry: &Entry, blocks: u64) -> io::Result<()> {
    let end = entry.block.checked_add(entry.count.into());
    let last_slot = entry.slot.checked_add(entry.count);
    let fits = end.is_some_and(|end| end <= blocks) && last_slot.is_some_and(|it| it <= LAST_SLOT);
    match entry.kind {
        MARK => return Ok(()),
        SLOTS | ZEROS if fits => {}
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an overlay's journal has an entry that this version does not know",
            ));
        }
    }
    for at in 0..entry.count {
        let place = match entry.kind {
            SLOTS => Place::Slot(Slot(entry.slot + at)),
            _ => Place::Zeros,
        };
        map.set(entry.block + u64::from(at), place);
    }
    Ok(())
}

struct Segment {
    /// Up to one that is not whole.
    entries: Vec<Entry>,
    next: u64,
    /// How many are whole after that, and which of all a mark among them says to be on
    /// the disk: those before this number.
    whole_after: usize,
    synced_after: u64,
}

impl Segment {
    /// Whether the entry that ends it was there as a whole.
    fn is_damaged(&self, survived: Survived) -> bool {
        match survived {
            Survived::Everything => self.whole_after > 0,
            Survived::OnlySynced => self.synced_after > self.next,
        }
    }
}

/// `None` if there is no such segment, or its beginning is torn: then nothing was ever
/// entered into it.
fn read_segment(path: &Path, segment: u64, expected: Option<u64>) -> io::Result<Option<Segment>> {
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
