//! One sealed pack, read by pread(2).
//!
//! Nothing of a pack is mapped: what the disk cannot read is an error of one
//! chunk, never a signal, and a pack costs a descriptor only while it is in use.
//! Opening reads the header and the seal. Footer entries are read in blocks when
//! they are asked for. They only find chunks: what is decoded is checked against
//! the full id. So a damaged footer entry costs its chunk and the one before it,
//! and the rest of the pack stays readable. Whoever relies on a footer without
//! reading the chunks (deduplication, the collector) asks [`PackReader::check`].

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use quick_cache::sync::Cache;

use crate::durable;
use crate::error::{Damage, Error, IoContext as _, Result, is_unreadable};
use crate::format::entry::{self, ENTRY_LEN, Entry};
use crate::format::pack_v1::{self as format, Frame, FrameHasher, HEADER_LEN, Header, SEAL_LEN};
use crate::id::{ChunkId, ChunkKey, ChunkKind};
use crate::pack::codec::{DELTA_HEAD_LEN, Encoding};
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::page::PageSize;
use crate::regular::{self, Opened};
use crate::sim::{self, StepKind};

/// Footer entries per cached block: 3 KiB.
const BLOCK_ENTRIES: u32 = 128;
/// Footer entries that a scan reads at a time: 96 KiB.
const SCAN_ENTRIES: u32 = 4096;
/// No stored chunk is longer: a manifest of 1 MiB, and zstd's overhead.
const MAX_STORED_LEN: u64 = 2 << 20;

/// Blocks of footers, shared by the packs of a store.
pub(crate) type FooterBlocks = Cache<(PackNumber, u32), Arc<[u8]>>;

/// An open pack.
#[derive(Debug)]
pub(crate) struct PackReader {
    number: PackNumber,
    path: PathBuf,
    file: File,
    file_len: u64,
    header: [u8; HEADER_LEN],
    header_is_right: bool,
    seal: [u8; SEAL_LEN],
    frame: Frame,
    page_len: usize,
    blocks: Arc<FooterBlocks>,
    sound: OnceLock<bool>,
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
    /// Opens the sealed pack at `path`; `None` if there is no such file.
    ///
    /// # Errors
    /// [`Error::Newer`] for a pack of a newer format; [`Damage::Pack`] if
    /// its footer cannot be found; I/O errors.
    pub fn open(
        path: PathBuf,
        number: PackNumber,
        page_size: PageSize,
        blocks: Arc<FooterBlocks>,
    ) -> Result<Option<Self>> {
        sim::before(StepKind::OpenPack, &path).context("open", &path)?;
        let file = match regular::open(&path).context("open", &path)? {
            Opened::File(file) => file,
            Opened::Absent => return Ok(None),
            Opened::Odd(reason) => return Err(Damage::Pack { path, reason }.into()),
        };
        let file_len = file.metadata().context("inspect", &path)?.len();
        let damaged = |reason| {
            Error::from(Damage::Pack {
                path: path.clone(),
                reason,
            })
        };
        if file_len < (HEADER_LEN + SEAL_LEN) as u64 {
            return Err(damaged("too short for a pack"));
        }
        let mut header = [0; HEADER_LEN];
        let mut seal = [0; SEAL_LEN];
        let read = |buffer: &mut [u8], offset| {
            durable::read_at(&file, &path, buffer, offset).map_err(|error| match error {
                Error::Io { source, .. } if is_unreadable(&source) => {
                    damaged("the disk cannot read its header or seal")
                }
                other => other,
            })
        };
        read(&mut header, 0)?;
        read(&mut seal, file_len - SEAL_LEN as u64)?;
        let header_is_right = match format::check_header(&header, number, page_size) {
            Header::Right => true,
            Header::Damaged => false,
            Header::Foreign => return Err(damaged("it belongs to another number or page size")),
            Header::Newer(found) => {
                return Err(Error::newer(&path, "format version", found));
            }
        };
        let mut pack = Self {
            number,
            frame: Frame {
                footer_offset: 0,
                entry_count: 0,
            },
            file,
            file_len,
            header,
            header_is_right,
            seal,
            page_len: page_size.len(),
            blocks,
            sound: OnceLock::new(),
            path,
        };
        pack.frame = pack.find_footer()?;
        Ok(Some(pack))
    }

    /// Where the footer is. A seal with one flipped bit still tells.
    fn find_footer(&self) -> Result<Frame> {
        let candidates = Frame::candidates(&self.seal, self.file_len);
        if let [only] = candidates[..]
            && self.has_seal_magic()
        {
            return Ok(only);
        }
        for frame in candidates {
            let mut first = [0; ENTRY_LEN];
            durable::read_at(&self.file, &self.path, &mut first, frame.footer_offset)?;
            if entry::offset_in(&first) as usize == HEADER_LEN {
                return Ok(frame);
            }
        }
        Err(self.pack_damage("it has no whole seal"))
    }

    fn has_seal_magic(&self) -> bool {
        format::has_seal_magic(&self.seal)
    }

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

    /// Checks header, footer and seal against the seal's checksum. Linear in the
    /// number of entries.
    pub fn check(&self) -> Result<()> {
        if !self.header_is_right {
            return Err(self.pack_damage("its header has a wrong checksum"));
        }
        let mut hasher = FrameHasher::new(&self.header);
        let mut from = 0;
        while from < self.frame.entry_count {
            let bytes = self.read_entries(from, SCAN_ENTRIES)?;
            hasher.footer(&bytes);
            from += SCAN_ENTRIES;
        }
        if hasher.fits(&self.seal, self.number, self.frame) {
            return Ok(());
        }
        Err(self.pack_damage("its footer or seal has a wrong checksum"))
    }

    /// Whether [`PackReader::check`] finds nothing; looked at once.
    pub fn is_sound(&self) -> Result<bool> {
        if let Some(sound) = self.sound.get() {
            return Ok(*sound);
        }
        let sound = match self.check() {
            Ok(()) => true,
            Err(Error::Damaged(_)) => false,
            Err(other) => return Err(other),
        };
        Ok(*self.sound.get_or_init(|| sound))
    }

    /// The chunk at `entry`; `None` if there is none, or of an unknown kind.
    pub fn slot(&self, entry: EntryNumber) -> Result<Option<Slot>> {
        if entry.0 >= self.frame.entry_count {
            return Ok(None);
        }
        let block_number = entry.0 / BLOCK_ENTRIES;
        let key = (self.number, block_number);
        let block = match self.blocks.get(&key) {
            Some(block) => block,
            None => {
                // One entry more: it says where the last one's bytes end.
                let first = block_number * BLOCK_ENTRIES;
                let block: Arc<[u8]> = self.read_entries(first, BLOCK_ENTRIES + 1)?.into();
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

    /// All chunks, in file order.
    pub fn scan(&self) -> Scan<'_> {
        Scan {
            pack: self,
            bytes: Vec::new(),
            first: 0,
            next: 0,
            has_unknown: false,
        }
    }

    /// Reads the stored bytes of a chunk into `out`.
    pub fn read(&self, slot: &Slot, out: &mut Vec<u8>) -> Result<()> {
        let start = u64::from(slot.entry.offset);
        let len = slot.stored_len();
        let inside = start >= HEADER_LEN as u64 && slot.end <= self.frame.footer_offset;
        if !inside || len == 0 || len > MAX_STORED_LEN {
            return Err(self.damaged(slot.entry, "its footer entry is damaged"));
        }
        out.resize(usize::try_from(len).expect("checked above"), 0);
        self.read_bytes(slot.entry, start, out)
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
        let end = (offset + len).min(self.frame.footer_offset);
        let len = end.saturating_sub(offset).min(MAX_STORED_LEN);
        out.resize(usize::try_from(len).expect("capped"), 0);
        self.read_bytes(entry, offset, out)
    }

    /// The footer's bytes, which may be damaged.
    pub fn raw_lines(&self) -> Result<Vec<u8>> {
        self.read_entries(0, self.frame.entry_count)
    }

    /// The length of this pack's pages.
    pub fn page_len(&self) -> usize {
        self.page_len
    }

    /// Where the chunks end and the footer begins.
    pub fn chunks_end(&self) -> u64 {
        self.frame.footer_offset
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

    fn read_bytes(&self, entry: Entry, offset: u64, out: &mut [u8]) -> Result<()> {
        match durable::read_at(&self.file, &self.path, out, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                Err(self.damaged(entry, "the disk cannot read it"))
            }
            other => other,
        }
    }

    fn read_entries(&self, first: u32, count: u32) -> Result<Vec<u8>> {
        let count = count.min(self.frame.entry_count - first);
        let mut bytes = vec![0; count as usize * ENTRY_LEN];
        let offset = self.frame.footer_offset + u64::from(first) * ENTRY_LEN as u64;
        match durable::read_at(&self.file, &self.path, &mut bytes, offset) {
            Err(Error::Io { source, .. }) if is_unreadable(&source) => {
                Err(self.pack_damage("the disk cannot read its footer"))
            }
            other => other.map(|()| bytes),
        }
    }

    /// The entry `position` of a run of entries, which ends one entry later or
    /// with the footer.
    fn slot_in(&self, run: &[u8], position: u32, number: EntryNumber) -> Option<Slot> {
        let at = position as usize * ENTRY_LEN;
        let entry = Entry::from_bytes(run.get(at..at + ENTRY_LEN)?)?;
        let next = run.get(at + ENTRY_LEN..at + 2 * ENTRY_LEN);
        let end = next.map_or(self.frame.footer_offset, |next| {
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

/// Goes through a footer. See [`PackReader::scan`].
pub(crate) struct Scan<'a> {
    pack: &'a PackReader,
    bytes: Vec<u8>,
    /// The number of the first entry in `bytes`.
    first: u32,
    next: u32,
    has_unknown: bool,
}

impl Scan<'_> {
    /// Whether a chunk of a kind or an encoding that only a newer version knows
    /// has been passed.
    pub fn has_unknown(&self) -> bool {
        self.has_unknown
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Slot>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.pack.frame.entry_count {
            if self.next.is_multiple_of(SCAN_ENTRIES) {
                self.first = self.next;
                match self.pack.read_entries(self.first, SCAN_ENTRIES + 1) {
                    Ok(bytes) => self.bytes = bytes,
                    Err(error) => {
                        self.next = self.pack.frame.entry_count;
                        return Some(Err(error));
                    }
                }
            }
            let number = EntryNumber(self.next);
            let slot = self
                .pack
                .slot_in(&self.bytes, self.next - self.first, number);
            self.next += 1;
            self.has_unknown |=
                slot.is_none_or(|slot| matches!(slot.entry.encoding, Encoding::Unknown(_)));
            if let Some(slot) = slot {
                return Some(Ok(slot));
            }
        }
        None
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
