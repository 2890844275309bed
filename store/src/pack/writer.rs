//! Writing one pack: append, then seal.
//!
//! Bytes go to the file on a thread of their own, so that compressing and
//! writing overlap; that thread also starts writeback early, so that sealing
//! has little left to flush.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;

use crate::durable;
use crate::error::{IoContext as _, Result};
use crate::format::entry::{ENTRY_LEN, Entry};
use crate::format::pack_v1;
use crate::format::pack_v2::{self, Description, Seal};
use crate::id::ChunkKey;
use crate::layout::Layout;
use crate::pack::codec::Encoding;
use crate::pack::{EntryNumber, Location, PackIdentity, PackNumber};
use crate::page::PageSize;
use crate::sim::{self, Fault};

/// A pack is sealed once it holds this many bytes or entries. Offsets of 32
/// bits leave room for the batch that crosses the limit.
const PACK_SOFT_LIMIT_BYTES: u64 = 256 << 20;
const PACK_SOFT_LIMIT_ENTRIES: usize = 1 << 18;

/// How many buffers may wait for the file.
const QUEUE_LEN: usize = 4;
/// Writeback is started each time this many bytes have been written.
const FLUSH_EVERY_BYTES: u64 = 32 << 20;
/// Space is reserved in steps, so that the file is laid out in one piece and delayed
/// allocation never stalls a writer: as much again as there is, and this at most.
const RESERVE_BYTES: u64 = 32 << 20;
/// A pack below that is written as it comes. Space that is given back costs a change
/// of the filesystem's own, and in tmpfs each page of it is filled with zeros.
const RESERVE_FROM_BYTES: u64 = 1 << 20;

/// What is written.
#[derive(Clone, Copy)]
pub(crate) enum Version {
    /// With this header.
    One([u8; pack_v1::HEADER_LEN]),
    Two(Description),
}

impl Version {
    pub fn one(number: PackNumber, page_size: PageSize) -> Self {
        Self::One(pack_v1::header(number, page_size))
    }

    /// What stands between the chunks and the end of the file.
    fn ending(self, entries: &[u8], chunks_end: u64, number: PackNumber) -> Vec<u8> {
        match self {
            Self::One(header) => {
                let seal = pack_v1::seal(&header, entries, chunks_end, number);
                [entries, &seal].concat()
            }
            Self::Two(pack) => {
                let count = u32::try_from(entries.len() / ENTRY_LEN);
                let count = count.expect("entries are counted in 32 bits");
                let seal = Seal::new(pack, chunks_end, count).to_bytes();
                let footer = pack_v2::footer(entries, chunks_end, pack.identity);
                [&seal[..], &footer, &seal].concat()
            }
        }
    }
}

/// An encoded chunk on its way into a pack.
pub(crate) struct EncodedChunk {
    pub key: ChunkKey,
    pub encoding: Encoding,
    pub check: [u8; 3],
    pub len: usize,
}

/// A chunk of a sealed pack.
#[derive(Clone, Copy)]
pub(crate) struct StoredChunk {
    pub key: ChunkKey,
    pub at: Location,
    /// Whether it decodes without another chunk.
    pub standalone: bool,
}

/// A pack being written. Dropping it unsealed removes its file.
pub(crate) struct PackWriter {
    number: PackNumber,
    version: Version,
    open_path: PathBuf,
    sealed_path: PathBuf,
    packs_dir: PathBuf,
    next_offset: u64,
    footer: Vec<u8>,
    chunks: Vec<(ChunkKey, bool)>,
    queue: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<Result<File>>>,
    /// Where a simulated writer writes to by itself, so that its steps have an
    /// order.
    simulated: Option<File>,
    sealed: bool,
}

/// A pack that is on disk, sealed and durable, and what it holds. Its file stays
/// locked until this is dropped, which is to be after its chunks are in the
/// index: a collection does not judge it before. Dropped before
/// [`SealedPack::keep`], it is removed: an operation that fails leaves nothing.
pub(crate) struct SealedPack {
    _locked: File,
    path: PathBuf,
    kept: AtomicBool,
    pub number: PackNumber,
    /// Keys, and whether they are stored standalone, in file order.
    keys: Vec<(ChunkKey, bool)>,
    pub file_len: u64,
}

impl PackWriter {
    /// Starts a pack in `file`, which is empty and locked by its creator.
    pub fn new(layout: &Layout, number: PackNumber, version: Version, file: File) -> Result<Self> {
        let open_path = layout.open_pack(number);
        let (queue, incoming) = mpsc::sync_channel::<Vec<u8>>(QUEUE_LEN);
        let path = open_path.clone();
        let (thread, simulated) = if sim::is_simulated() {
            (None, Some(file))
        } else {
            let thread = std::thread::Builder::new()
                .name("pack-writer".to_owned())
                .spawn(move || write_all(file, &path, incoming))
                .context("start a thread for", &open_path)?;
            (Some(thread), None)
        };
        let mut writer = Self {
            number,
            version,
            open_path,
            sealed_path: layout.pack(number),
            packs_dir: layout.packs(),
            next_offset: 0,
            footer: Vec::new(),
            chunks: Vec::new(),
            queue: Some(queue),
            thread,
            simulated,
            sealed: false,
        };
        writer.send(match version {
            Version::One(header) => header.to_vec(),
            Version::Two(pack) => pack.header().to_vec(),
        })?;
        Ok(writer)
    }

    /// Whether the pack has reached its size limit.
    pub fn is_full(&self) -> bool {
        let most_chunks = sim::pack_chunks().map_or(PACK_SOFT_LIMIT_ENTRIES, |most| {
            most.min(PACK_SOFT_LIMIT_ENTRIES)
        });
        self.next_offset >= PACK_SOFT_LIMIT_BYTES || self.chunks.len() >= most_chunks
    }

    /// What will tell it from every other pack; not known before the end in version 1.
    pub fn identity(&self) -> Option<PackIdentity> {
        match self.version {
            Version::One(_) => None,
            Version::Two(pack) => Some(pack.identity),
        }
    }

    /// How long its file will be if it is sealed now.
    pub fn sealed_len_bytes(&self) -> u64 {
        match self.version {
            Version::One(_) => self.next_offset + (self.footer.len() + pack_v1::SEAL_LEN) as u64,
            Version::Two(pack) => {
                let count = u32::try_from(self.chunks.len());
                let count = count.expect("entries are counted in 32 bits");
                Seal::new(pack, self.next_offset, count).file_len
            }
        }
    }

    /// How long it is, so far.
    pub fn len_bytes(&self) -> u64 {
        self.next_offset
    }

    /// Where the next appended chunk will be.
    pub fn next_location(&self) -> Location {
        Location {
            pack: self.number,
            entry: EntryNumber(
                u32::try_from(self.chunks.len()).expect("entries are counted in 32 bits"),
            ),
        }
    }

    /// Appends the chunks whose stored bytes stand one after the other in `bytes`.
    pub fn append(&mut self, chunks: &[EncodedChunk], bytes: Vec<u8>) -> Result<()> {
        let mut offset = self.next_offset;
        for chunk in chunks {
            let entry = Entry {
                key: chunk.key,
                offset: u32::try_from(offset).expect("packs are sealed far below 4 GiB"),
                encoding: chunk.encoding,
                check: chunk.check,
            };
            self.footer.extend_from_slice(&entry.to_bytes());
            self.chunks
                .push((chunk.key, chunk.encoding.is_standalone()));
            offset += chunk.len as u64;
        }
        debug_assert_eq!(offset - self.next_offset, bytes.len() as u64);
        self.send(bytes)
    }

    /// Writes footer and seal and makes the pack durable under its final name.
    ///
    /// Order: flush the file, rename it, flush the directory. A pack renamed
    /// before its bytes are on disk could, after a power cut, be found torn
    /// under a name that promises a whole one; without the directory flush an
    /// index entry made durable later could name a pack that is not there.
    pub fn seal(mut self) -> Result<SealedPack> {
        let footer = std::mem::take(&mut self.footer);
        let ending = self.version.ending(&footer, self.next_offset, self.number);
        self.send(ending)?;
        let file_len = self.next_offset;
        let file = self.finish_thread()?;
        if sim::on(Fault::RenameBeforeSync) {
            durable::rename(&self.open_path, &self.sealed_path)?;
            durable::sync_file(&file, &self.sealed_path)?;
        } else {
            if !sim::on(Fault::PackNotSynced) {
                durable::sync_file(&file, &self.open_path)?;
            }
            durable::rename(&self.open_path, &self.sealed_path)?;
        }
        self.sealed = true;
        if !sim::on(Fault::PackNameNotSynced) {
            durable::sync_dir(&self.packs_dir)?;
        }
        Ok(SealedPack {
            _locked: file,
            path: self.sealed_path.clone(),
            kept: AtomicBool::new(false),
            number: self.number,
            keys: std::mem::take(&mut self.chunks),
            file_len,
        })
    }

    fn send(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.next_offset += bytes.len() as u64;
        if let Some(file) = &self.simulated {
            return durable::write_all(file, &self.open_path, &bytes);
        }
        let delivered = self
            .queue
            .as_ref()
            .is_some_and(|queue| queue.send(bytes).is_ok());
        if delivered {
            return Ok(());
        }
        self.finish_thread()?;
        unreachable!("the writing thread ends early only with an error")
    }

    fn finish_thread(&mut self) -> Result<File> {
        drop(self.queue.take());
        if let Some(file) = self.simulated.take() {
            return Ok(file);
        }
        let thread = self.thread.take().expect("a pack is finished once");
        thread.join().expect("the writing thread does not panic")
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // The error, if any, is that of the operation which gave up.
            let _ = self.finish_thread();
        }
        if !self.sealed {
            durable::discard(&self.open_path);
        }
    }
}

fn write_all(file: File, path: &Path, incoming: mpsc::Receiver<Vec<u8>>) -> Result<File> {
    let mut written = 0;
    let mut reserved = 0;
    let mut flushed = 0;
    for bytes in incoming {
        let end = written + bytes.len() as u64;
        if let Some(until) = reserve_until(end, reserved) {
            reserve(&file, written, until - written);
            reserved = until;
        }
        durable::write_all(&file, path, &bytes)?;
        written = end;
        if written - flushed >= FLUSH_EVERY_BYTES {
            file.sync_data().context("flush", path)?;
            flushed = written;
        }
    }
    if reserved > written {
        file.set_len(written).context("trim", path)?;
    }
    Ok(file)
}

/// Up to where space is to be reserved before the file is `end` bytes long, if it is
/// reserved up to `reserved` now.
fn reserve_until(end: u64, reserved: u64) -> Option<u64> {
    (end > reserved.max(RESERVE_FROM_BYTES)).then(|| end + end.min(RESERVE_BYTES))
}

/// Reserves space if the filesystem can. Only a matter of speed: a full disk
/// or a filesystem without reservations shows when the bytes are written.
fn reserve(file: &File, offset: u64, len: u64) {
    let _ = rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, offset, len);
}

impl SealedPack {
    /// To be called just before the first index entry that leads to the pack:
    /// from then on the index may rely on it, even if writing it fails.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Whether something leads to the pack, or may.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// How many chunks it has.
    pub fn chunk_count(&self) -> usize {
        self.keys.len()
    }

    /// To be called once nothing leads to the pack after all.
    pub fn give_up(&self) {
        self.kept.store(false, Ordering::Relaxed);
    }

    /// The pack's chunks, in file order.
    pub fn chunks(&self) -> impl Iterator<Item = StoredChunk> + '_ {
        let entries = (0..).map(EntryNumber);
        self.keys
            .iter()
            .zip(entries)
            .map(|((key, standalone), entry)| StoredChunk {
                key: *key,
                at: Location {
                    pack: self.number,
                    entry,
                },
                standalone: *standalone,
            })
    }
}

impl Drop for SealedPack {
    fn drop(&mut self) {
        if !*self.kept.get_mut() {
            // If this fails the next collection removes the file.
            durable::discard(&self.path);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn what_is_reserved_follows_what_is_written() {
        assert_eq!(reserve_until(4096, 0), None);
        assert_eq!(reserve_until(RESERVE_FROM_BYTES, 0), None);
        assert_eq!(reserve_until(3 << 20, 0), Some(6 << 20));
        assert_eq!(reserve_until(5 << 20, 6 << 20), None);
        assert_eq!(reserve_until(100 << 20, 99 << 20), Some(132 << 20));
    }

    #[test]
    fn what_is_not_needed_of_it_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        let (queue, incoming) = mpsc::sync_channel(4);
        for _ in 0..3 {
            queue.send(vec![7; 1 << 20]).unwrap();
        }
        drop(queue);
        let file = write_all(File::create(&path).unwrap(), &path, incoming).unwrap();
        durable::sync_file(&file, &path).unwrap();
        let found = file.metadata().unwrap();
        assert_eq!(found.len(), 3 << 20);
        assert!(found.blocks() * 512 < 4 << 20, "{}", found.blocks());
    }
}
