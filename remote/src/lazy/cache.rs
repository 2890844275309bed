//! What was read of a bucket's packs, on this host's disk, for all processes that use the
//! store.
//!
//! ```text
//! cache/lock               held shared to open files, alone to remove them
//! cache/BUCKET/PACK        the pack's bytes, as far as they were read; the rest is a hole
//! cache/BUCKET/PACK.map    a byte for each 64 KiB: 1 if these were written
//! ```
//! Bytes first, then the map: else another process could read a hole for what the map
//! says is there. Nothing is made durable, and nothing of it is trusted: whoever reads
//! compares it with ids, and says what did not fit ([`Cache::forget`]).
//!
//! When there is more than the limit, the packs go that were not used for longest.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use crate::objects::longest_bytes;
use crate::protocol::Name;

/// What is there or not.
pub const BLOCK_BYTES: u64 = 64 << 10;
const LOCK: &str = "lock";
const MAP: &str = "map";
/// Packs that are open at once.
const MOST_OPEN: usize = 128;
/// How often it is written down that a pack is used.
const USED: Duration = Duration::from_secs(60);
/// After so much it is looked at how much there is.
const LOOK_BYTES: u64 = 8 << 20;
/// With less room than this nothing is brought that nobody has asked for.
const ROOM_BYTES: u64 = 4 << 20;
/// A disk with less room than a part of this is left alone.
const LEAST_ROOM: u64 = 20;

/// The files of one bucket.
#[derive(Debug)]
pub struct Cache {
    /// Of all buckets.
    all: PathBuf,
    dir: PathBuf,
    limit_bytes: u64,
    open: Mutex<HashMap<Name, Arc<Pack>>>,
    unseen_bytes: AtomicU64,
    /// How much there was when that was last looked at.
    seen_bytes: AtomicU64,
    /// Whether it was said that nothing can be written.
    told: AtomicBool,
}

#[derive(Debug)]
struct Pack {
    data: File,
    map: File,
    /// What is known of the map.
    blocks: Vec<AtomicU8>,
    used: Mutex<Instant>,
}

impl Cache {
    /// The cache of a bucket in this directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(all: &Path, bucket: &str, limit_bytes: u64) -> io::Result<Self> {
        let dir = all.join(bucket);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        let cache = Self {
            all: all.to_owned(),
            dir,
            limit_bytes,
            open: Mutex::default(),
            unseen_bytes: AtomicU64::new(0),
            seen_bytes: AtomicU64::new(0),
            told: AtomicBool::new(false),
        };
        cache.keep_limit()?;
        Ok(cache)
    }

    /// Whether a block is there, as far as this process knows, or by the map.
    pub fn has(&self, name: Name, block: u64) -> bool {
        self.pack(name, false).is_some_and(|pack| pack.has(block))
    }

    /// Whether something more can be kept without something else going.
    pub fn has_room(&self) -> bool {
        let of = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        let used_bytes = of(&self.seen_bytes) + of(&self.unseen_bytes);
        !self.told.load(Ordering::Relaxed) && used_bytes + ROOM_BYTES <= self.limit_bytes
    }

    /// A range of a pack, if all of it is there.
    pub fn read(&self, name: Name, range: &Range<u64>) -> Option<Vec<u8>> {
        let pack = self.pack(name, false)?;
        let mut blocks = blocks_of(range);
        if !blocks.all(|block| pack.has(block)) {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
        pack.data.read_exact_at(&mut bytes, range.start).ok()?;
        Some(bytes)
    }

    /// Keeps what was read of a pack from a block on. `false` if it could not be kept, which
    /// is said once.
    pub fn write(&self, name: Name, first: u64, bytes: &[u8]) -> bool {
        match self.try_write(name, first, bytes) {
            Ok(()) => true,
            Err(error) => {
                if !self.told.swap(true, Ordering::Relaxed) {
                    let dir = self.dir.display();
                    tracing::warn!(%dir, %error, "what is read of the remote is not kept");
                }
                false
            }
        }
    }

    fn try_write(&self, name: Name, first: u64, bytes: &[u8]) -> io::Result<()> {
        let disk = rustix::fs::statvfs(&self.dir)?;
        if disk.f_bavail < disk.f_blocks / LEAST_ROOM {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut pack = self.pack(name, true).ok_or(io::ErrorKind::NotFound)?;
        if pack.is_removed()? {
            // By another process, to keep the limit.
            lock(&self.open).remove(&name);
            pack = self.pack(name, true).ok_or(io::ErrorKind::NotFound)?;
        }
        pack.data.write_all_at(bytes, first * BLOCK_BYTES)?;
        let count = (bytes.len() as u64).div_ceil(BLOCK_BYTES);
        pack.set(first..first + count, 1)?;
        let before = self
            .unseen_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if before + bytes.len() as u64 >= LOOK_BYTES.min(self.limit_bytes) {
            self.unseen_bytes.store(0, Ordering::Relaxed);
            self.keep_limit()?;
        }
        Ok(())
    }

    /// What is there is not what it should be.
    pub fn forget(&self, name: Name, range: &Range<u64>) {
        let Some(pack) = self.pack(name, false) else {
            return;
        };
        let blocks = blocks_of(range);
        if pack.set(*blocks.start()..*blocks.end() + 1, 0).is_err() {
            // Its ids tell, again and again.
            tracing::debug!("a map cannot be written");
        }
    }

    /// The open pack; opened if it is there, or made.
    fn pack(&self, name: Name, make: bool) -> Option<Arc<Pack>> {
        let mut open = lock(&self.open);
        if let Some(pack) = open.get(&name) {
            let pack = pack.clone();
            drop(open);
            pack.note_use();
            return Some(pack);
        }
        let pack = Arc::new(self.open_pack(name, make).ok()?);
        if open.len() >= MOST_OPEN {
            let other = open.keys().next().copied();
            other.and_then(|other| open.remove(&other));
        }
        open.insert(name, pack.clone());
        Some(pack)
    }

    fn open_pack(&self, name: Name, make: bool) -> io::Result<Pack> {
        let path = self.dir.join(name.to_string());
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if make {
            flags |= OFlags::CREATE;
        } else {
            // Mostly there is none, and nobody need be waited for.
            fs::symlink_metadata(&path)?;
        }
        // Nobody removes one of the two meanwhile.
        let _shared = self.lock(FlockOperation::LockShared)?;
        let mode = Mode::from_raw_mode(0o600);
        let data = File::from(rustix::fs::open(&path, flags, mode)?);
        let map = File::from(rustix::fs::open(path.with_extension(MAP), flags, mode)?);
        let count = longest_bytes("packs/").div_ceil(BLOCK_BYTES);
        let mut bytes = vec![0; usize::try_from(count).map_err(io::Error::other)?];
        read_some_at(&map, &mut bytes, 0)?;
        let pack = Pack {
            data,
            map,
            blocks: bytes.into_iter().map(AtomicU8::new).collect(),
            used: Mutex::new(Instant::now()),
        };
        pack.write_use()?;
        Ok(pack)
    }

    fn lock(&self, how: FlockOperation) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let file = File::from(rustix::fs::open(self.all.join(LOCK), flags, mode)?);
        loop {
            match rustix::fs::flock(&file, how) {
                Err(rustix::io::Errno::INTR) => {}
                other => {
                    other?;
                    return Ok(file);
                }
            }
        }
    }

    /// Removes the packs that were not used for longest, of all buckets, until there is no
    /// more than the limit.
    fn keep_limit(&self) -> io::Result<()> {
        let alone = self.lock(FlockOperation::LockExclusive)?;
        let mut packs = Vec::new();
        let mut total_bytes = 0;
        for bucket in fs::read_dir(&self.all)? {
            let bucket = bucket?;
            if !bucket.file_type()?.is_dir() {
                continue;
            }
            for entry in fs::read_dir(bucket.path())? {
                let path = entry?.path();
                if path.extension().is_some() {
                    continue;
                }
                let found = fs::symlink_metadata(&path)?;
                let map = path.with_extension(MAP);
                let used = fs::symlink_metadata(&map).and_then(|map| map.modified());
                let len_bytes = found.blocks() * 512;
                total_bytes += len_bytes;
                packs.push((used.unwrap_or(SystemTime::UNIX_EPOCH), len_bytes, path, map));
            }
        }
        packs.sort_by_key(|pack| pack.0);
        for (_, len_bytes, path, map) in packs {
            if total_bytes <= self.limit_bytes {
                break;
            }
            // The map first: one whose bytes are gone would say that a hole is there, and
            // each block of it would be read and thrown away before it is asked for again.
            for path in [map, path] {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            total_bytes -= len_bytes;
        }
        self.seen_bytes.store(total_bytes, Ordering::Relaxed);
        // Before the other lock: who has that one may wait for this one.
        drop(alone);
        // Their room is free only when nobody has them open.
        lock(&self.open).retain(|_, pack| !pack.is_removed().unwrap_or(true));
        Ok(())
    }
}

impl Pack {
    fn has(&self, block: u64) -> bool {
        let Some(known) = usize::try_from(block)
            .ok()
            .and_then(|block| self.blocks.get(block))
        else {
            return false;
        };
        if known.load(Ordering::Acquire) == 1 {
            return true;
        }
        // Another process may have read it.
        let mut byte = [0];
        let is_there = matches!(self.map.read_at(&mut byte, block), Ok(1)) && byte == [1];
        if is_there {
            known.store(1, Ordering::Release);
        }
        is_there
    }

    fn set(&self, blocks: Range<u64>, value: u8) -> io::Result<()> {
        let count = usize::try_from(blocks.end - blocks.start).map_err(io::Error::other)?;
        self.map.write_all_at(&vec![value; count], blocks.start)?;
        for block in blocks {
            let known = usize::try_from(block).ok();
            if let Some(known) = known.and_then(|block| self.blocks.get(block)) {
                known.store(value, Ordering::Release);
            }
        }
        Ok(())
    }

    fn is_removed(&self) -> io::Result<bool> {
        Ok(self.map.metadata()?.nlink() == 0 || self.data.metadata()?.nlink() == 0)
    }

    fn note_use(&self) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.elapsed() >= USED {
            *used = Instant::now();
            drop(used);
            let _ = self.write_use();
        }
    }

    fn write_use(&self) -> io::Result<()> {
        let omit = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        };
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let times = Timestamps {
            last_access: omit,
            last_modification: now,
        };
        Ok(rustix::fs::futimens(&self.map, &times)?)
    }
}

/// The blocks that a range of bytes, which is not empty, lies in.
pub fn blocks_of(range: &Range<u64>) -> std::ops::RangeInclusive<u64> {
    range.start / BLOCK_BYTES..=range.end.max(1).saturating_sub(1) / BLOCK_BYTES
}

fn read_some_at(file: &File, bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let read = file.read_at(rest, at)?;
        if read == 0 {
            return Ok(());
        }
        at += read as u64;
        rest = &mut rest[read..];
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Session;

    fn name(number: u32) -> Name {
        Name {
            session: Session(7),
            number,
        }
    }

    const BLOCK: usize = 64 << 10;

    #[test]
    fn what_one_process_keeps_another_one_finds() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let one = Cache::open(dir.path(), "bucket", u64::MAX)?;
        let other = Cache::open(dir.path(), "bucket", u64::MAX)?;
        assert!(one.write(name(1), 2, &[5; BLOCK]));
        assert!(!other.has(name(1), 1) && other.has(name(1), 2));
        // One that has looked before.
        assert!(one.write(name(1), 3, &[6; 100]));
        let end = 3 * BLOCK_BYTES;
        assert_eq!(
            other.read(name(1), &(end - 1..end + 1)),
            Some(vec![5, 6]),
            "over the edge of a block"
        );
        assert_eq!(other.read(name(1), &(end..end + 101)), None, "too short");
        other.forget(name(1), &(end..end + 1));
        assert!(!other.has(name(1), 3));
        Ok(())
    }

    #[test]
    fn the_packs_go_that_were_not_used_for_longest() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::open(dir.path(), "bucket", 3 << 20)?;
        let used = |number: u32, seconds: u64| -> io::Result<()> {
            let map = dir
                .path()
                .join("bucket")
                .join(format!("{}.map", name(number)));
            let file = File::options().write(true).open(map)?;
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
        };
        for number in 0..3 {
            assert!(cache.write(name(number), 0, &vec![1; 1 << 20]));
        }
        used(0, 50)?;
        used(1, 10)?;
        used(2, 20)?;
        let other = Cache::open(dir.path(), "bucket", 2 << 20)?;
        let there = [0, 1, 2].map(|number| other.has(name(number), 0));
        assert_eq!(there, [true, false, true]);
        // The first one had it open, and begins anew.
        assert!(cache.write(name(1), 0, &[3; BLOCK]));
        assert!(other.has(name(1), 0));
        Ok(())
    }

    #[test]
    fn a_map_that_lies_is_no_more_than_bytes_that_do_not_fit() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::open(dir.path(), "bucket", u64::MAX)?;
        assert!(cache.write(name(1), 0, &[1; 10]));
        let map = dir.path().join("bucket").join(format!("{}.map", name(1)));
        fs::write(map, [1; 4])?;
        let again = Cache::open(dir.path(), "bucket", u64::MAX)?;
        assert_eq!(again.read(name(1), &(BLOCK_BYTES..BLOCK_BYTES + 10)), None);
        Ok(())
    }
}
