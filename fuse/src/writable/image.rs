//! An image of one clone: what was written over what the store has.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::SystemTime;

use snapstore_overlay::{
    BLOCK_BYTES, Base, Budget, Frozen, Journal, Overlay, Replayed, SegmentPath, Survived, Under,
};
use snapstore_store::{Image, ImageReader, ReadAt as _, Region};

/// An image that can be written.
pub(crate) struct WritableImage {
    pub ino: u64,
    /// What it is called in the store.
    pub name: String,
    /// And in the view.
    pub file_name: String,
    pub size_bytes: u64,
    base: RwLock<ImageReader>,
    base_data_bytes: u64,
    /// From when it was first opened for writing on.
    overlay: OnceLock<RwLock<Overlay>>,
    modified: RwLock<SystemTime>,
    /// Pages that the kernel gave up: what was stored to them through a mapping could not
    /// be written.
    lost: Mutex<BTreeSet<u64>>,
    dir: PathBuf,
    budget: Budget,
}

/// A reader as an overlay needs it.
struct Below<'a>(&'a ImageReader);

impl Base for Below<'_> {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that was written is not there any more.
pub(super) fn is_lost(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn pages(bytes: Range<u64>) -> Range<u64> {
    bytes.start / BLOCK_BYTES..bytes.end.div_ceil(BLOCK_BYTES)
}

impl WritableImage {
    pub fn new(
        ino: u64,
        image: &Image,
        base: ImageReader,
        page_bytes: u64,
        modified: SystemTime,
        dir: &Path,
        budget: &Budget,
    ) -> Self {
        Self {
            ino,
            name: image.name.clone(),
            file_name: image.file_name(),
            size_bytes: image.size_bytes,
            base: RwLock::new(base),
            base_data_bytes: (image.nonzero_pages * page_bytes).min(image.size_bytes),
            overlay: OnceLock::new(),
            modified: RwLock::new(modified),
            lost: Mutex::default(),
            dir: dir.to_owned(),
            budget: budget.clone(),
        }
    }

    /// Whether it is one of its own: it was opened for writing.
    pub fn is_own(&self) -> bool {
        self.overlay.get().is_some()
    }

    fn journal_path(&self) -> SegmentPath {
        SegmentPath {
            dir: self.dir.clone(),
            name: self.file_name.clone(),
        }
    }

    fn data_file(&self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.dir.join(format!("{}.data", self.file_name)))
    }

    /// Gives it an overlay if it has none. Of several at once one does.
    pub fn make_own(&self) -> io::Result<()> {
        if self.is_own() {
            return Ok(());
        }
        // The first entry of a journal is written into a segment that is there.
        let _making = write(&self.modified);
        if self.is_own() {
            return Ok(());
        }
        let journal = Journal::create(self.journal_path())?;
        let file = self.data_file()?;
        let overlay = Overlay::journaled(file, self.size_bytes, self.budget.clone(), journal);
        let _ = self.overlay.set(RwLock::new(overlay));
        Ok(())
    }

    /// How many entries the journal has, if there is one.
    pub fn journal_entries(&self) -> Option<u64> {
        let overlay = self.overlay.get();
        overlay.map(|overlay| read(overlay).journal_entries())
    }

    /// Finds its overlay again, if it has one, with so many entries of its journal at least if
    /// everything has survived. Returns the first segment of its journal from now on; the
    /// earlier ones go with [`WritableImage::begins_here`].
    pub fn find_again(
        &self,
        first_segment: u64,
        entries: u64,
        survived: Survived,
    ) -> io::Result<Option<u64>> {
        let path = self.journal_path();
        let blocks = self.size_bytes.div_ceil(BLOCK_BYTES);
        let replayed = Replayed::read(&path, first_segment, blocks, survived)?;
        let data = self.dir.join(format!("{}.data", self.file_name));
        let is_all = survived == Survived::Everything;
        // It was made before the data; a power cut may leave either.
        if is_all && replayed.is_missing() && (data.exists() || entries > 0) {
            return Err(is_lost(&format!(
                "the journal of {} is gone",
                self.file_name
            )));
        }
        if is_all {
            replayed.has_at_least(entries, &path)?;
        }
        let needed = replayed.file_bytes(self.size_bytes);
        if !data.exists() && needed == 0 {
            return Ok(None);
        }
        let there = match fs::metadata(&data) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(is_lost(&format!("{} is gone", data.display())));
            }
            found => found?.len(),
        };
        // Each block was there before the journal told of it.
        if there < needed {
            return Err(is_lost(&format!(
                "{} is cut off: of {needed} bytes {there} are there",
                data.display()
            )));
        }
        let file = self.data_file()?;
        let journal = Journal::go_on(path, &replayed, &file)?;
        let segment = journal.segment();
        let budget = self.budget.clone();
        let overlay = Overlay::found_again(file, self.size_bytes, budget, replayed, journal);
        let _ = self.overlay.set(RwLock::new(overlay));
        Ok(Some(segment))
    }

    /// What [`WritableImage::find_again`] returned is on the disk.
    pub fn begins_here(&self) {
        if let Some(overlay) = self.overlay.get() {
            write(overlay).begins_here();
        }
    }

    pub fn modified(&self) -> SystemTime {
        *read(&self.modified)
    }

    /// What it takes where holes take nothing, about.
    pub fn data_bytes(&self) -> u64 {
        self.base_data_bytes
    }

    pub fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let available = self.size_bytes.saturating_sub(offset);
        let len = usize::try_from(available).map_or(out.len(), |room| room.min(out.len()));
        let out = &mut out[..len];
        let Some(overlay) = self.overlay.get() else {
            read(&self.base).clone().read_exact_at(out, offset)?;
            return Ok(len);
        };
        // The store is read without the lock: others go on meanwhile. What they write to
        // these bytes may be seen or not.
        let (below, base) = {
            let overlay = read(overlay);
            (overlay.read_held(offset, out)?, read(&self.base).clone())
        };
        for run in below {
            let at = |position: u64| usize::try_from(position - offset).map_err(io::Error::other);
            base.read_exact_at(&mut out[at(run.start)?..at(run.end)?], run.start)?;
        }
        Ok(len)
    }

    /// Writes; `cached` if the kernel gives up what is not taken, so that nobody can write
    /// it again.
    pub fn write_at(&self, offset: u64, bytes: &[u8], cached: bool) -> io::Result<()> {
        let written = self.change(|overlay, under| overlay.write(under, offset, bytes));
        let end = offset.saturating_add(bytes.len() as u64);
        match written {
            Ok(()) => self.found(offset..end),
            Err(_) if cached => lock(&self.lost).extend(pages(offset..end)),
            Err(_) => {}
        }
        written
    }

    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(|overlay, under| overlay.zero(under, offset, length))?;
        self.found(offset..offset.saturating_add(length));
        Ok(())
    }

    /// All of these pages is written again.
    fn found(&self, bytes: Range<u64>) {
        let mut lost = lock(&self.lost);
        if lost.is_empty() {
            return;
        }
        let (start, end) = (bytes.start.div_ceil(BLOCK_BYTES), bytes.end / BLOCK_BYTES);
        lost.retain(|page| !(start..end).contains(page));
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Overlay, Under<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let not_open = || io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
        let mut overlay = write(self.overlay.get().ok_or_else(not_open)?);
        let base = read(&self.base).clone();
        let under = Under {
            base: &Below(&base),
            size_bytes: self.size_bytes,
        };
        let changed = change(&mut overlay, under);
        drop(overlay);
        *write(&self.modified) = SystemTime::now();
        changed
    }

    /// Has what was written so far on the disk; all goes on meanwhile.
    pub fn sync(&self) -> io::Result<()> {
        let Some(overlay) = self.overlay.get() else {
            return Ok(());
        };
        let mut point = read(overlay).sync_point();
        point.sync_data()?;
        write(overlay).mark(&mut point)?;
        point.sync_journal()?;
        write(overlay).synced(&point);
        Ok(())
    }

    /// The first data or hole at or after `offset`; `None` past the end.
    pub fn seek(&self, offset: u64, region: Region) -> io::Result<Option<u64>> {
        let Some(overlay) = self.overlay.get() else {
            let base = read(&self.base).clone();
            return base.seek(offset, region).map_err(io::Error::other);
        };
        let (overlay, base) = (read(overlay), read(&self.base).clone());
        let mut at = offset;
        while at < self.size_bytes {
            let (said, end) = overlay.run_at(at);
            let found = match (said, region) {
                (Some(true), Region::Data) | (Some(false), Region::Hole) => Some(at),
                (Some(_), _) => None,
                (None, _) => base
                    .seek(at, region)
                    .map_err(io::Error::other)?
                    .filter(|found| *found < end),
            };
            if found.is_some() {
                return Ok(found);
            }
            at = end;
        }
        // The end of a file is a hole.
        let at_end = region == Region::Hole && offset < self.size_bytes;
        Ok(at_end.then_some(self.size_bytes))
    }

    pub fn uncommitted_bytes(&self) -> u64 {
        let overlay = self.overlay.get();
        overlay.map_or(0, |overlay| read(overlay).uncommitted_bytes())
    }

    pub fn is_changed(&self) -> bool {
        let overlay = self.overlay.get();
        overlay.is_some_and(|overlay| read(overlay).is_changed())
    }

    /// What it holds now; `None` if nothing was written.
    pub fn freeze(&self, number: u64) -> io::Result<Option<Frozen>> {
        let lost = lock(&self.lost);
        if let Some(first) = lost.first() {
            return Err(io::Error::other(format!(
                "{} pages of {}, the first of them page {first}, were stored through a mapping \
                 and could not be kept (was there no room?); write them again",
                lost.len(),
                self.file_name
            )));
        }
        let overlay = self.overlay.get();
        overlay
            .map(|overlay| write(overlay).freeze(number))
            .transpose()
    }

    /// The first segment of its journal that is needed after freeze `number`.
    pub fn first_segment_after(&self, number: u64) -> Option<u64> {
        let overlay = self.overlay.get()?;
        Some(read(overlay).first_segment_after(number))
    }

    /// The base is what freeze `number` froze.
    pub fn rebase(&self, number: u64, base: ImageReader) {
        let Some(overlay) = self.overlay.get() else {
            *write(&self.base) = base;
            return;
        };
        let mut overlay = write(overlay);
        *write(&self.base) = base;
        overlay.rebased(number);
    }
}
