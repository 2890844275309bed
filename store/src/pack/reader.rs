//! One sealed pack, mapped into memory.

use std::fs::File;
use std::path::PathBuf;

use memmap2::Mmap;

use crate::error::{Damage, Error, IoContext as _, Result};
use crate::id::{ChunkId, ChunkKey, ChunkKind};
use crate::pack::codec::{self, DELTA_HEAD_LEN, Encoding};
use crate::pack::format::{self, ENTRY_LEN, Entry, Frame};
use crate::pack::{EntryNumber, Location, PackNumber};
use crate::page::PageSize;
use crate::sim::{self, StepKind};

/// A mapped pack whose header, footer and seal have been checked.
#[derive(Debug)]
pub(crate) struct PackReader {
    number: PackNumber,
    path: PathBuf,
    map: Mmap,
    frame: Frame,
}

/// A chunk's stored bytes and what its footer says of them.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub entry: Entry,
    pub bytes: &'a [u8],
}

/// What a delta was made against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BaseRef {
    pub id: ChunkId,
    pub hint: Location,
}

impl PackReader {
    /// Maps the sealed pack at `path`; `None` if there is no such file.
    pub fn open(path: PathBuf, number: PackNumber, page_size: PageSize) -> Result<Option<Self>> {
        sim::before(StepKind::OpenPack, &path).context("open", &path)?;
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context("open", &path)?,
        };
        // SAFETY: a sealed pack is never written or truncated again by this
        // program; only unlinking it is allowed, which leaves mappings intact.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.context("map", &path)?;
        match format::check_frame(&map, number, page_size) {
            Ok(frame) => Ok(Some(Self {
                number,
                path,
                map,
                frame,
            })),
            Err(reason) => Err(Damage::Pack { path, reason }.into()),
        }
    }

    pub fn number(&self) -> PackNumber {
        self.number
    }

    pub fn entry_count(&self) -> usize {
        self.frame.entry_count
    }

    pub fn file_len(&self) -> u64 {
        self.map.len() as u64
    }

    /// The footer's line `entry`, if there is one.
    pub fn entry(&self, entry: EntryNumber) -> Option<Entry> {
        let position = usize::try_from(entry.0).ok()?;
        if position >= self.frame.entry_count {
            return None;
        }
        let at = self.frame.footer_offset + position * ENTRY_LEN;
        Entry::from_bytes(&self.map[at..at + ENTRY_LEN])
    }

    /// All lines of the footer, in file order.
    pub fn entries(&self) -> impl Iterator<Item = (EntryNumber, Entry)> + '_ {
        let count = u32::try_from(self.frame.entry_count).expect("entries are counted in 32 bits");
        (0..count).filter_map(|n| Some((EntryNumber(n), self.entry(EntryNumber(n))?)))
    }

    /// The stored bytes of `entry` if it holds the chunk with this key.
    pub fn stored(&self, entry: EntryNumber, key: ChunkKey) -> Option<Stored<'_>> {
        let found = self.entry(entry)?;
        (found.key == key).then(|| self.stored_bytes(entry, found))
    }

    pub fn stored_bytes(&self, number: EntryNumber, entry: Entry) -> Stored<'_> {
        let end = number
            .0
            .checked_add(1)
            .and_then(|next| self.entry(EntryNumber(next)))
            .map_or(self.frame.footer_offset, |next| next.offset as usize);
        Stored {
            entry,
            bytes: &self.map[entry.offset as usize..end],
        }
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
}

impl<'a> Stored<'a> {
    /// What the delta was made against; `None` for the other encodings.
    pub fn base(&self) -> Option<BaseRef> {
        if self.entry.encoding != Encoding::Delta || self.bytes.len() < DELTA_HEAD_LEN {
            return None;
        }
        let hash = self.bytes[..32].try_into().ok()?;
        let hint = self.bytes[32..DELTA_HEAD_LEN].try_into().ok()?;
        Some(BaseRef {
            id: ChunkId::from_hash(self.entry.key.kind, hash),
            hint: Location::from_bytes(hint),
        })
    }

    /// Decodes into all or the beginning of `out`, with the base's payload for a
    /// delta. Returns the payload's length; `None` if the bytes do not decode.
    pub fn decode(&self, base: &[u8], out: &mut [u8]) -> Option<usize> {
        match self.entry.encoding {
            Encoding::Raw => {
                out.get_mut(..self.bytes.len())?.copy_from_slice(self.bytes);
                Some(self.bytes.len())
            }
            Encoding::Zstd => codec::decompress(self.bytes, &[], out),
            Encoding::Delta => codec::decompress(self.bytes.get(DELTA_HEAD_LEN..)?, base, out),
        }
    }

    /// Whether the stored bytes match the footer's check.
    pub fn passes_check(&self) -> bool {
        format::stored_check(self.bytes) == self.entry.check
    }
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
        ChunkKind::Node => crate::tree::node::MAX_PAYLOAD_LEN,
        ChunkKind::Manifest => crate::manifest::MAX_LEN,
    }
}
