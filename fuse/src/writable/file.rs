//! A file of a clone that is no image: a machine's state, a configuration, whatever else
//! is put there.
//!
//! One that the base has is the store's until somebody writes to it; then it is copied.
//! While it is frozen, the next write makes a copy of it first.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use snapstore_overlay::{Budget, step, sync_file};
use snapstore_store::{ImageReader, ReadAt as _};

/// The longest file: what a store takes.
pub(crate) const MAX_BYTES: u64 = 1 << 30;
const COPIED_BYTES: usize = 1 << 20;

pub(crate) struct ExtraFile {
    pub ino: u64,
    state: Mutex<State>,
    budget: Budget,
    /// How many freezes there were.
    freezes: Arc<AtomicU64>,
    /// Where a copy is made before it takes its place.
    scratch: PathBuf,
    /// Something of it could not be brought to the disk: the kernel tells that once.
    is_lost: AtomicBool,
}

/// What the files of a clone have in common.
pub(crate) struct Around<'a> {
    pub budget: &'a Budget,
    pub freezes: &'a Arc<AtomicU64>,
    /// The clone's directory.
    pub clone: &'a Path,
}

/// What a file looks like.
#[derive(Clone, Copy)]
pub(crate) struct Look {
    pub size_bytes: u64,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified: SystemTime,
}

struct State {
    body: Body,
    look: Look,
    /// How many freezes there had been when it was last written to.
    written: Option<u64>,
}

/// Where a file comes from that nobody has written to.
#[derive(Clone)]
pub(crate) enum Origin {
    /// The base has it.
    Base(ImageReader),
    /// The layout does. It is in no commit.
    Made(Arc<[u8]>),
}

impl Origin {
    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Base(reader) => reader.read_exact_at(out, offset),
            Self::Made(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = bytes.get(start..).unwrap_or_default();
                let found = rest.get(..out.len());
                out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

enum Body {
    Base(Origin),
    Own {
        file: Arc<File>,
        /// `None` once it has no name.
        path: Option<PathBuf>,
        frozen: Weak<File>,
    },
}

/// A file at one instant.
pub(crate) enum FrozenFile {
    /// It is as the base has it.
    Base,
    /// Nobody writes to it as long as this lives.
    Own(Arc<File>),
}

impl ExtraFile {
    /// One that the base has, or the layout.
    pub fn of_base(ino: u64, origin: Origin, look: Look, around: &Around<'_>) -> Self {
        Self::build(ino, Body::Base(origin), look, false, around)
    }

    /// A new one, or one that is found again, at `path`.
    pub fn own(ino: u64, path: PathBuf, mut look: Look, around: &Around<'_>) -> io::Result<Self> {
        let file = open(&path)?;
        look.size_bytes = file.metadata()?.len();
        around.budget.take_anyway(look.size_bytes);
        let body = Body::Own {
            file: Arc::new(file),
            path: Some(path),
            frozen: Weak::new(),
        };
        Ok(Self::build(ino, body, look, true, around))
    }

    fn build(ino: u64, body: Body, look: Look, is_fresh: bool, around: &Around<'_>) -> Self {
        let state = State {
            body,
            look,
            written: is_fresh.then(|| around.freezes.load(Ordering::Relaxed)),
        };
        Self {
            ino,
            state: Mutex::new(state),
            budget: around.budget.clone(),
            freezes: around.freezes.clone(),
            scratch: around.clone.join(format!("copy-{ino}")),
            is_lost: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn look(&self) -> Look {
        self.lock().look
    }

    pub fn set_mode(&self, mode: u32) {
        self.lock().look.mode = mode & 0o777;
    }

    pub fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) {
        let owner = &mut self.lock().look.owner;
        *owner = (uid.unwrap_or(owner.0), gid.unwrap_or(owner.1));
    }

    pub fn set_modified(&self, time: SystemTime) {
        self.lock().look.modified = time;
    }

    /// Whether it was written to since freeze `number`.
    pub fn is_fresh(&self, number: u64) -> bool {
        self.lock().written.is_some_and(|written| written >= number)
    }

    /// How long its own file is, if it has one.
    pub fn own_bytes(&self) -> Option<u64> {
        let state = self.lock();
        matches!(state.body, Body::Own { .. }).then_some(state.look.size_bytes)
    }

    /// Whether it is as the layout made it.
    pub fn is_made(&self) -> bool {
        matches!(self.lock().body, Body::Base(Origin::Made(_)))
    }

    /// What it is read from in the snapshot that is the base now.
    pub fn rebase(&self, reader: ImageReader) {
        if let Body::Base(origin @ Origin::Base(_)) = &mut self.lock().body {
            *origin = Origin::Base(reader);
        }
    }

    pub fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.lock();
        let available = state.look.size_bytes.saturating_sub(offset);
        let len = usize::try_from(available).map_or(out.len(), |room| room.min(out.len()));
        let out = &mut out[..len];
        match &state.body {
            Body::Base(reader) => {
                let reader = reader.clone();
                drop(state);
                reader.read_exact_at(out, offset)?;
            }
            Body::Own { file, .. } => file.read_exact_at(out, offset)?,
        }
        Ok(len)
    }

    /// Writes; `path` is where a copy goes if it is the base's.
    pub fn write_at(&self, path: Option<&Path>, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        let end = end.filter(|end| *end <= MAX_BYTES).ok_or_else(too_large)?;
        let mut state = self.lock();
        let file = self.to_write(&mut state, path, None)?;
        let grows = end.saturating_sub(state.look.size_bytes);
        self.budget.take(grows)?;
        if let Err(error) = file.write_all_at(bytes, offset) {
            // What was written of it beyond the end is cut off.
            let _ = file.set_len(state.look.size_bytes);
            self.budget.give_back(grows);
            return Err(error);
        }
        state.look.size_bytes = state.look.size_bytes.max(end);
        state.touched(&self.freezes);
        Ok(())
    }

    pub fn set_len(&self, path: Option<&Path>, size_bytes: u64) -> io::Result<()> {
        if size_bytes > MAX_BYTES {
            return Err(too_large());
        }
        let mut state = self.lock();
        let file = self.to_write(&mut state, path, Some(size_bytes))?;
        let before = state.look.size_bytes;
        let grows = size_bytes.saturating_sub(before);
        self.budget.take(grows)?;
        if let Err(error) = file.set_len(size_bytes) {
            self.budget.give_back(grows);
            return Err(error);
        }
        self.budget.give_back(before.saturating_sub(size_bytes));
        state.look.size_bytes = size_bytes;
        state.touched(&self.freezes);
        Ok(())
    }

    /// Makes bytes inside of the file zeros.
    pub fn zero(&self, path: Option<&Path>, offset: u64, length: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let mut state = self.lock();
        let file = self.to_write(&mut state, path, None)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*file, flags, offset, length)?;
        state.touched(&self.freezes);
        Ok(())
    }

    /// Has it on the disk. Once that has failed, what the file holds need not be what was
    /// written.
    pub fn sync(&self) -> io::Result<()> {
        let file = match &self.lock().body {
            Body::Base(_) => return Ok(()),
            Body::Own { file, .. } => file.clone(),
        };
        if self.is_lost.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "something that was written before could not be brought to the disk",
            ));
        }
        let synced = sync_file(&file);
        if synced.is_err() {
            self.is_lost.store(true, Ordering::Release);
        }
        synced
    }

    /// Has it in a file of its own at `path`.
    pub fn copy_to(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        self.to_write(&mut state, Some(path), None).map(drop)
    }

    /// It is at `path` now, or nowhere.
    pub fn moved(&self, to: Option<PathBuf>) {
        if let Body::Own { path, .. } = &mut self.lock().body {
            *path = to;
        }
    }

    pub fn freeze(&self) -> FrozenFile {
        match &mut self.lock().body {
            Body::Base(_) => FrozenFile::Base,
            Body::Own { file, frozen, .. } => {
                // A handle of its own: the weak one tells whether somebody has it.
                let held = frozen
                    .upgrade()
                    .or_else(|| file.try_clone().ok().map(Arc::new));
                let held = held.unwrap_or_else(|| file.clone());
                *frozen = Arc::downgrade(&held);
                FrozenFile::Own(held)
            }
        }
    }

    /// The file to write to, which is nobody else's. `keeps` says how much of it matters.
    fn to_write(
        &self,
        state: &mut State,
        path: Option<&Path>,
        keeps: Option<u64>,
    ) -> io::Result<Arc<File>> {
        let keeps = keeps.unwrap_or(u64::MAX).min(state.look.size_bytes);
        let size = state.look.size_bytes;
        let target = match &state.body {
            Body::Own { file, frozen, .. } if frozen.strong_count() == 0 => return Ok(file.clone()),
            Body::Own { path, .. } => path.clone(),
            Body::Base(_) => {
                self.budget.take(size)?;
                path.map(Path::to_owned)
            }
        };
        let copied = copy(&state.body, keeps, size, &self.scratch, target.as_deref());
        if copied.is_err() && matches!(state.body, Body::Base(_)) {
            self.budget.give_back(size);
        }
        let file = Arc::new(copied?);
        state.body = Body::Own {
            file: file.clone(),
            path: target,
            frozen: Weak::new(),
        };
        Ok(file)
    }
}

impl Drop for ExtraFile {
    fn drop(&mut self) {
        let state = self.lock();
        if matches!(state.body, Body::Own { .. }) {
            self.budget.give_back(state.look.size_bytes);
        }
    }
}

impl State {
    fn touched(&mut self, freezes: &AtomicU64) {
        self.look.modified = SystemTime::now();
        self.written = Some(freezes.load(Ordering::Relaxed));
    }
}

fn too_large() -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// A copy of the first bytes, as long as the whole, which takes the place of what is at
/// `path` once it is complete.
fn copy(body: &Body, keeps: u64, size: u64, new: &Path, path: Option<&Path>) -> io::Result<File> {
    let _ = fs::remove_file(new);
    let file = open(new)?;
    file.set_len(size)?;
    let mut bytes = vec![0; COPIED_BYTES];
    let mut at = 0;
    while at < keeps {
        let len = usize::try_from(keeps - at).map_or(bytes.len(), |left| left.min(bytes.len()));
        match body {
            Body::Base(reader) => reader.read_exact_at(&mut bytes[..len], at)?,
            Body::Own { file, .. } => file.read_exact_at(&mut bytes[..len], at)?,
        }
        file.write_all_at(&bytes[..len], at)?;
        at += len as u64;
    }
    step("put a copy in its place");
    match path {
        Some(path) => fs::rename(new, path)?,
        // It has no name any more.
        None => fs::remove_file(new)?,
    }
    Ok(file)
}
