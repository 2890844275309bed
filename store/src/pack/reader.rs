//! One sealed pack, read by pread(2).
//!
//! Nothing of a pack is mapped: what the disk cannot read is an error of one
//! chunk, never a signal, and a pack costs a descriptor only while it is in use.
//! Opening reads the header and the seal (`open`). Footer entries are read in blocks
//! when they are asked for. They only find chunks: what is decoded is checked against
//! the full id.
//!
//! In version 2 each block has a checksum: a damaged one is an error of its entries.
//! In version 1 there is one for all. There a damaged entry costs its chunk and the
//! one before it, and whoever relies on a footer without reading the chunks
//! (deduplication, the collector) asks [`PackReader::is_sound`].

use std::fs::{File, Metadata};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use quick_cache::sync::Cache;
use rustix::fs::{Advice, fadvise};

use crate::durable;
use crate::error::{Damage, Error, Result, is_unreadable};
use crate::format::entry::{self, ENTRY_LEN, Entry};
use crate::format::pack_v1::{self, FrameHasher};
use crate::format::pack_v2::{self, BLOCK_ENTRIES, Seal};
use crate::id::{ChunkId, ChunkKey, ChunkKind};
use crate::pack::codec::DELTA_HEAD_LEN;
use crate::pack::{EntryNumber, Location, PackIdentity, PackNumber, PackVersion};
use crate::page::PageSize;
use crate::page_hashes::SIDE_BY_SIDE;

/// Blocks that a scan reads at a time: 96 KiB.
pub(super) const SCAN_BLOCKS: u32 = 32;
/// No stored chunk is longer: a manifest of 1 MiB, and zstd's overhead.
const MAX_STORED_LEN: u64 = 2 << 20;

/// Blocks of footers, shared by the packs of a store. They are known by the checksum
/// of their pack's seal: a number may lead to another file later.
pub(crate) type FooterBlocks = Cache<(u64, u32), Arc<[u8]>>;

/// An open pack.
#[derive(Debug)]
pub(crate) struct PackReader {
    pub(super) number: PackNumber,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) file_len: u64,
    pub(super) stamp: Stamp,
    pub(super) frame: Frame,
    pub(super) footer: Footer,
    /// Begins the keys of cached blocks.
    pub(super) fingerprint: u64,
    pub(super) page_len: usize,
    pub(super) blocks: Arc<FooterBlocks>,
    pub(super) sound: OnceLock<bool>,
}

/// Which file a pack was read from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stamp {
    pub identity: PackIdentity,
    pub device: u64,
    pub inode: u64,
}

impl Stamp {
    /// Whether it is of the file that this was found out of.
    pub fn is_of(&self, found: &Metadata) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        (found.dev(), found.ino()) == (self.device, self.inode)
    }
}

/// Where things are in a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Frame {
    pub chunks_start: u64,
    pub chunks_end: u64,
    pub entry_count: u32,
}

/// What is peculiar to a version.
#[derive(Debug)]
pub(super) enum Footer {
    One {
        header: [u8; pack_v1::HEADER_LEN],
        header_is_right: bool,
        seal: [u8; pack_v1::SEAL_LEN],
    },
    Two {
        seal: Seal,
        /// What is wrong with the header and the last seal.
        problems: Vec<&'static str>,
    },
}

/// A chunk's line in the footer, and where its stored bytes end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot {
    pub number: EntryNumber,
    pub entry: Entry,
    pub end: u64,
}

impl Slot {
    /// The length of the stored bytes, as far as the footer can be trusted.
    pub fn stored_len(&self) -> u64 {
        self.end.saturating_sub(u64::from(self.entry.offset))
    }
}

/// What a delta was made against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BaseRef {
    pub id: ChunkId,
    pub hint: Location,
}

impl PackReader {
    pub fn number(&self) -> PackNumber {
        self.number
    }

    pub fn entry_count(&self) -> u32 {
        self.frame.entry_count
    }

    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Whether the file has lost its name: it was deleted, or set aside.
    pub fn is_deleted(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        self.file.metadata().is_ok_and(|found| found.nlink() == 0)
    }

    pub fn version(&self) -> PackVersion {
        match self.footer {
            Footer::One { .. } => PackVersion::One,
            Footer::Two { .. } => PackVersion::Two,
        }
    }

    /// Which file this is, whatever has its name now.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    pub fn identity(&self) -> PackIdentity {
        self.stamp.identity
    }

    /// What is damaged of header, footer and seals. Linear in the number of entries.
    pub fn problems(&self) -> Result<Vec<Damage>> {
        let mut found = Vec::new();
        let mut note = |checked: Result<()>| match checked {
            Err(Error::Damaged(damage)) => {
                found.push(damage);
                Ok(())
            }
            other => other,
        };
        match &self.footer {
            Footer::One { .. } => note(self.check_if_one())?,
            Footer::Two { seal, problems } => {
                for reason in problems {
                    note(Err(self.pack_damage(reason)))?;
                }
                note(self.check_first_seal(seal))?;
                for number in 0..seal.block_count() {
                    note(self.read_block(number).map(|_| ()))?;
                }
            }
        }
        Ok(found)
    }

    /// Checks the checksum of version 1 over header, footer and seal. In version 2
    /// each block has its own.
    pub fn check_if_one(&self) -> Result<()> {
        let Footer::One {
            header,
            header_is_right,
            seal,
        } = &self.footer
        else {
            return Ok(());
        };
        if !header_is_right {
            return Err(self.pack_damage("its header has a wrong checksum"));
        }
        let mut hasher = FrameHasher::new(header);
        let mut from = 0;
        while from < self.frame.entry_count {
            let bytes = self.read_entries(from, SCAN_BLOCKS * BLOCK_ENTRIES)?;
            hasher.footer(&bytes);
            from += SCAN_BLOCKS * BLOCK_ENTRIES;
        }
        let frame = pack_v1::Frame {
            footer_offset: self.frame.chunks_end,
            entry_count: self.frame.entry_count,
        };
        if hasher.fits(seal, self.number, frame) {
            return Ok(());
        }
        Err(self.pack_damage("its footer or seal has a wrong checksum"))
    }

    fn check_first_seal(&self, seal: &Seal) -> Result<()> {
        let mut bytes = [0; pack_v2::SEAL_LEN];
        let read = durable::read_at(&self.file, &self.path, &mut bytes, seal.chunks_end());
        match read {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                Err(self.pack_damage("the disk cannot read its first seal"))
            }
            Err(other) => Err(other),
            Ok(()) if bytes == seal.to_bytes() => Ok(()),
            Ok(()) => Err(self.pack_damage("its first seal is damaged; another one serves")),
        }
    }

    /// Whether entries that are read can be relied on without reading the chunks.
    /// In version 2 no others are read.
    pub fn is_sound(&self) -> Result<bool> {
        if self.version() == PackVersion::Two {
            return Ok(true);
        }
        if let Some(sound) = self.sound.get() {
            return Ok(*sound);
        }
        let sound = match self.check_if_one() {
            Ok(()) => true,
            Err(Error::Damaged(_)) => false,
            Err(other) => return Err(other),
        };
        Ok(*self.sound.get_or_init(|| sound))
    }

    /// The chunk at `entry`; `None` if there is none, or of an unknown kind.
    ///
    /// # Errors
    /// [`Damage::Footer`] if its block of the footer is damaged; I/O errors.
    pub fn slot(&self, entry: EntryNumber) -> Result<Option<Slot>> {
        if entry.0 >= self.frame.entry_count {
            return Ok(None);
        }
        let number = entry.0 / BLOCK_ENTRIES;
        let key = (self.fingerprint, number);
        let block = match self.blocks.get(&key) {
            Some(block) => block,
            None => {
                let block: Arc<[u8]> = self.read_block(number)?.into();
                self.blocks.insert(key, block.clone());
                block
            }
        };
        Ok(self.slot_in(&block, entry.0 % BLOCK_ENTRIES, entry))
    }

    /// The chunk at `entry` if it has this key.
    pub fn slot_of(&self, entry: EntryNumber, key: ChunkKey) -> Result<Option<Slot>> {
        Ok(self.slot(entry)?.filter(|slot| slot.entry.key == key))
    }

    /// Reads the stored bytes of a chunk into `out`.
    pub fn read(&self, slot: &Slot, out: &mut Vec<u8>) -> Result<()> {
        let start = u64::from(slot.entry.offset);
        let len = slot.stored_len();
        let inside = start >= self.frame.chunks_start && slot.end <= self.frame.chunks_end;
        if !inside || len == 0 || len > MAX_STORED_LEN {
            return Err(self.damaged(slot.entry, "its footer entry is damaged"));
        }
        out.resize(usize::try_from(len).expect("checked above"), 0);
        self.read_bytes(slot.entry, start, out)
    }

    /// Reads the stored bytes from one chunk up to and with another, which lie next to each
    /// other, into `out`. There are at most as many as are hashed side by side, and none takes
    /// more than twice its page: else the footer is damaged.
    pub fn read_run(&self, first: &Slot, last: &Slot, out: &mut Vec<u8>) -> Result<()> {
        let (start, end) = (u64::from(first.entry.offset), last.end);
        let inside = start >= self.frame.chunks_start && end <= self.frame.chunks_end;
        let len = end.checked_sub(start).filter(|_| inside);
        let Some(len) = len.filter(|len| *len <= 2 * (SIDE_BY_SIDE * self.page_len) as u64) else {
            return Err(self.damaged(first.entry, "its footer entry is damaged"));
        };
        out.resize(usize::try_from(len).expect("checked above"), 0);
        self.read_bytes(first.entry, start, out)
    }

    /// Has the disk begin to read the stored bytes of a chunk, and does not wait for it.
    pub fn ask_for(&self, slot: &Slot) {
        // None would mean all of the file.
        let Some(len) = NonZero::new(slot.stored_len().min(MAX_STORED_LEN)) else {
            return;
        };
        // Advice: without it a reader waits.
        let _ = fadvise(
            &self.file,
            slot.entry.offset.into(),
            Some(len),
            Advice::WillNeed,
        );
    }

    /// Reads what a delta was made against; `None` for the other encodings.
    pub fn base(&self, slot: &Slot) -> Result<Option<BaseRef>> {
        if !slot.entry.encoding.is_delta() || slot.stored_len() < DELTA_HEAD_LEN as u64 {
            return Ok(None);
        }
        let mut head = [0; DELTA_HEAD_LEN];
        self.read_bytes(slot.entry, u64::from(slot.entry.offset), &mut head)?;
        Ok(base_in(slot.entry, &head))
    }

    /// Reads `len` bytes from `offset` on, as far as the chunks go: for finding
    /// chunks whose footer entries are damaged.
    pub fn read_raw(&self, entry: Entry, offset: u64, len: u64, out: &mut Vec<u8>) -> Result<()> {
        let end = (offset + len).min(self.frame.chunks_end);
        let len = end.saturating_sub(offset).min(MAX_STORED_LEN);
        out.resize(usize::try_from(len).expect("capped"), 0);
        self.read_bytes(entry, offset, out)
    }

    /// The bytes of a footer of version 1, which may be damaged.
    pub fn raw_lines(&self) -> Result<Vec<u8>> {
        self.read_entries(0, self.frame.entry_count)
    }

    /// The length of this pack's pages.
    pub fn page_len(&self) -> usize {
        self.page_len
    }

    /// Where the first chunk begins.
    pub fn chunks_start(&self) -> u64 {
        self.frame.chunks_start
    }

    /// Where the last chunk ends.
    pub fn chunks_end(&self) -> u64 {
        self.frame.chunks_end
    }

    /// An error that names this chunk in this pack.
    pub fn damaged(&self, entry: Entry, reason: &'static str) -> Error {
        Damage::Chunk {
            chunk: entry.key.to_string(),
            path: self.path.clone(),
            offset_bytes: u64::from(entry.offset),
            reason,
        }
        .into()
    }

    /// An error that says that this chunk is stored as only a newer version can
    /// read it.
    pub fn newer(&self, entry: Entry, encoding: u8) -> Error {
        let what = format!("{} with encoding", entry.key);
        Error::newer(&self.path, what, u32::from(encoding))
    }

    /// The same for a chunk of a kind that only a newer version knows.
    pub fn newer_kind(&self, kind: u8) -> Error {
        Error::newer(&self.path, "a chunk of kind", u32::from(kind))
    }

    fn read_bytes(&self, entry: Entry, offset: u64, out: &mut [u8]) -> Result<()> {
        match durable::read_at(&self.file, &self.path, out, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                Err(self.damaged(entry, "the disk cannot read it"))
            }
            other => other,
        }
    }

    /// The entries of a block and one more, which says where the last one's bytes
    /// end; the last block of version 1 lacks that.
    pub fn read_block(&self, number: u32) -> Result<Vec<u8>> {
        let Footer::Two { seal, .. } = &self.footer else {
            return self.read_entries(number * BLOCK_ENTRIES, BLOCK_ENTRIES + 1);
        };
        let (offset, entries) = seal.block(number);
        let mut bytes = vec![0; pack_v2::block_len(entries)];
        let damaged = |reason| {
            Error::from(Damage::Footer {
                path: self.path.clone(),
                block: number,
                first_entry: number * BLOCK_ENTRIES,
                entries,
                reason,
            })
        };
        match durable::read_at(&self.file, &self.path, &mut bytes, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                return Err(damaged("the disk cannot read it"));
            }
            other => other?,
        }
        pack_v2::open_block(bytes, number, seal.pack.identity)
            .ok_or_else(|| damaged("it has a wrong checksum"))
    }

    /// The number of blocks of the footer.
    pub fn block_count(&self) -> u32 {
        self.frame.entry_count.div_ceil(BLOCK_ENTRIES)
    }

    /// Entries of version 1, unchecked.
    pub(super) fn read_entries(&self, first: u32, count: u32) -> Result<Vec<u8>> {
        let count = count.min(self.frame.entry_count - first);
        let mut bytes = vec![0; count as usize * ENTRY_LEN];
        let offset = self.frame.chunks_end + u64::from(first) * ENTRY_LEN as u64;
        match durable::read_at(&self.file, &self.path, &mut bytes, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                Err(self.pack_damage("the disk cannot read its footer"))
            }
            other => other.map(|()| bytes),
        }
    }

    /// The entry `position` of a run of entries, which ends one entry later or
    /// with the footer.
    pub(super) fn slot_in(&self, run: &[u8], position: u32, number: EntryNumber) -> Option<Slot> {
        let at = position as usize * ENTRY_LEN;
        let entry = Entry::from_bytes(run.get(at..at + ENTRY_LEN)?)?;
        let next = run.get(at + ENTRY_LEN..at + 2 * ENTRY_LEN);
        let end = next.map_or(self.frame.chunks_end, |next| {
            u64::from(entry::offset_in(next))
        });
        Some(Slot { number, entry, end })
    }

    fn pack_damage(&self, reason: &'static str) -> Error {
        Damage::Pack {
            path: self.path.clone(),
            reason,
        }
        .into()
    }
}

/// What a delta with these stored bytes was made against.
pub(crate) fn base_in(entry: Entry, stored: &[u8]) -> Option<BaseRef> {
    if !entry.encoding.is_delta() {
        return None;
    }
    let hash = stored.get(..32)?.try_into().ok()?;
    let hint = stored.get(32..DELTA_HEAD_LEN)?.try_into().ok()?;
    Some(BaseRef {
        id: ChunkId::from_hash(entry.key.kind, hash),
        hint: Location::from_bytes(hint),
    })
}

/// The head of a delta against this base.
pub(crate) fn delta_head(base: BaseRef) -> [u8; DELTA_HEAD_LEN] {
    let mut head = [0; DELTA_HEAD_LEN];
    head[..32].copy_from_slice(base.id.as_bytes());
    head[32..].copy_from_slice(&base.hint.to_bytes());
    head
}

/// The most bytes a payload of this kind can have.
pub(crate) fn payload_limit(kind: ChunkKind, page_size: PageSize) -> usize {
    match kind {
        ChunkKind::Page => page_size.len(),
        ChunkKind::Node => crate::format::node::MAX_PAYLOAD_LEN,
        ChunkKind::Manifest => crate::manifest::MAX_LEN,
    }
}
