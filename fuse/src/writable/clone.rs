//! One clone: a directory of images and files that are its own as soon as somebody writes
//! to them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use snapstore_overlay::{Budget, Frozen, Survived, step};
use snapstore_store::{ImageReader, ImageRole, Manifest, SnapshotId, Store};

use super::file::{Around, ExtraFile, FrozenFile, Look, Origin};
use super::image::WritableImage;
use super::record::sync_dir;
use super::state::{State, boot};
use crate::error::{Error, Result, cannot};

/// An image that nobody has opened for writing, which all clones share.
pub(crate) struct SharedImage {
    pub ino: u64,
    /// A snapshot that has it.
    pub snapshot: SnapshotId,
    pub reader: ImageReader,
    pub size_bytes: u64,
    pub data_bytes: u64,
    pub created: SystemTime,
}

pub(crate) struct ViewClone {
    pub ino: u64,
    pub number: u32,
    pub images: Vec<(Arc<SharedImage>, Arc<WritableImage>)>,
    pub created: SystemTime,
    /// Whoever writes holds it shared: a freeze is one instant for all of a clone. It is
    /// locked before `base`, and that before `names`.
    gate: RwLock<()>,
    names: Mutex<BTreeMap<String, Named>>,
    dir: PathBuf,
    budget: Budget,
    /// How many freezes there were. Each file that lives has it, too.
    freezes: Arc<AtomicU64>,
    most_files: usize,
    /// The names of files that the layout makes.
    made: Vec<String>,
    /// The freeze that will be the first to know of the last change of a name.
    names_changed: AtomicU64,
    /// Names could not be brought to the disk: the kernel tells that once.
    is_lost: AtomicBool,
    base: Mutex<CloneBase>,
}

/// What a name that is no image's leads to.
#[derive(Clone)]
pub(crate) enum Named {
    File(Arc<ExtraFile>),
    /// A socket, which is no part of a snapshot.
    Socket(Arc<ExtraFile>),
}

struct CloneBase {
    id: SnapshotId,
    manifest: Manifest,
    state: State,
    /// The freeze that it is of.
    number: u64,
}

/// A clone at one instant.
pub(crate) struct FrozenClone {
    pub number: u64,
    pub base: SnapshotId,
    pub images: Vec<(Arc<WritableImage>, Frozen)>,
    pub files: Vec<FrozenNamed>,
}

pub(crate) struct FrozenNamed {
    pub name: String,
    pub size_bytes: u64,
    pub is_fresh: bool,
    pub content: FrozenFile,
}

/// What a clone is made of.
pub(crate) struct CloneOf<'a> {
    pub store: &'a Store,
    pub id: SnapshotId,
    pub manifest: Manifest,
    pub state: State,
    pub owner: (u32, u32),
    pub mode: u32,
    pub limit_bytes: Option<u64>,
    /// How many files there may be that are no images: each is open while it lives.
    pub most_files: usize,
    /// Files that the layout makes.
    pub made: &'a [(String, Arc<[u8]>)],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ViewClone {
    /// A clone whose files are in `dir`. `ino` gives numbers, `share` the shared file of
    /// an image.
    pub fn open(
        number: u32,
        dir: PathBuf,
        of: CloneOf<'_>,
        ino: &dyn Fn() -> u64,
        share: &dyn Fn(&snapstore_store::Image, &Manifest) -> Arc<SharedImage>,
    ) -> Result<Self> {
        let created = of.manifest.created();
        let budget = Budget::new(of.limit_bytes);
        let page_bytes = of.store.page_size().bytes();
        let is_image = |image: &&snapstore_store::Image| image.role != ImageRole::File;
        let images = of.manifest.images.iter().filter(is_image).map(|image| {
            let reader = of.store.image_reader(image);
            let own = WritableImage::new(ino(), image, reader, page_bytes, created, &dir, &budget);
            (share(image, &of.manifest), Arc::new(own))
        });
        let clone = Self {
            ino: ino(),
            number,
            images: images.collect(),
            created,
            names: Mutex::default(),
            gate: RwLock::default(),
            budget,
            freezes: Arc::default(),
            most_files: of.most_files,
            made: of.made.iter().map(|(name, _)| name.clone()).collect(),
            names_changed: AtomicU64::new(0),
            is_lost: AtomicBool::new(false),
            base: Mutex::new(CloneBase {
                id: of.id,
                manifest: of.manifest,
                state: of.state,
                number: 0,
            }),
            dir,
        };
        clone.load_names(of.store, of.owner, of.mode, of.made, ino)?;
        Ok(clone)
    }

    /// How much room what was written takes.
    pub fn overlay_bytes(&self) -> u64 {
        self.budget.used_bytes()
    }

    fn around(&self) -> Around<'_> {
        Around {
            budget: &self.budget,
            freezes: &self.freezes,
            clone: &self.dir,
        }
    }

    fn load_names(
        &self,
        store: &Store,
        owner: (u32, u32),
        mode: u32,
        made: &[(String, Arc<[u8]>)],
        ino: &dyn Fn() -> u64,
    ) -> Result<()> {
        let base = lock(&self.base);
        let mut names = lock(&self.names);
        let look = |size_bytes| Look {
            size_bytes,
            mode,
            owner,
            modified: self.created,
        };
        let is_file = |image: &&snapstore_store::Image| image.role == ImageRole::File;
        for image in base.manifest.images.iter().filter(is_file) {
            if self.gone(&image.name).exists() {
                continue;
            }
            let origin = Origin::Base(store.image_reader(image));
            let look = look(image.size_bytes);
            let file = ExtraFile::of_base(ino(), origin, look, &self.around());
            names.insert(image.name.clone(), Named::File(Arc::new(file)));
        }
        for (name, bytes) in made {
            if self.gone(name).exists() || names.contains_key(name) {
                continue;
            }
            let look = look(bytes.len() as u64);
            let origin = Origin::Made(bytes.clone());
            let file = ExtraFile::of_base(ino(), origin, look, &self.around());
            names.insert(name.clone(), Named::File(Arc::new(file)));
        }
        let files = self.dir.join("files");
        let failed = |error| cannot("list", &files, error);
        for entry in fs::read_dir(&files).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let file = ExtraFile::own(ino(), entry.path(), look(0), &self.around());
            names.insert(name, Named::File(Arc::new(file.map_err(failed)?)));
        }
        Ok(())
    }

    /// Has all that was written so far on the disk.
    pub fn sync(&self) -> Result<()> {
        let failed = |error| cannot("bring to the disk what is in", &self.dir, error);
        for (_, image) in &self.images {
            image.sync().map_err(failed)?;
        }
        for (_, named) in self.names() {
            if let Named::File(file) = named {
                file.sync().map_err(failed)?;
            }
        }
        self.sync_names().map_err(failed)
    }

    /// Has all of it on the disk, and how much there is of the journals, for whoever goes on
    /// with them. Nobody writes any more. False if there is nothing.
    pub fn ends(&self) -> Result<bool> {
        if !self
            .has_something()
            .map_err(|it| cannot("list", &self.dir, it))?
        {
            return Ok(false);
        }
        // Before the state: it says how much of the journals is there.
        self.sync()?;
        let mut base = lock(&self.base);
        let mut state = base.state.clone();
        for (_, image) in &self.images {
            if let Some(entries) = image.journal_entries() {
                state.entries.insert(image.name.clone(), entries);
            }
        }
        state.write(&self.dir)?;
        base.state = state;
        Ok(true)
    }

    /// Whether anything was ever written to it.
    fn has_something(&self) -> io::Result<bool> {
        let has = |name| Ok::<_, io::Error>(fs::read_dir(self.dir.join(name))?.next().is_some());
        let is_own = self.images.iter().any(|(_, image)| image.is_own());
        Ok(is_own || State::is_there(&self.dir) || has("files")? || has("gone")?)
    }

    /// Finds again what was written before its server ended; `in_order` if all of it is on
    /// the disk.
    pub fn find_again(&self, in_order: bool) -> Result<()> {
        let mut base = lock(&self.base);
        let survived = match in_order || base.state.boot == boot() {
            true => Survived::Everything,
            false => Survived::OnlySynced,
        };
        let mut state = base.state.clone();
        let mut found = false;
        for (_, image) in &self.images {
            let first = state.first_segments.get(&image.name).copied();
            let entries = state.entries.get(&image.name).copied();
            let again = image.find_again(first.unwrap_or(0), entries.unwrap_or(0), survived);
            let again = again.map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => Error::OverlayDamaged {
                    clone: self.dir.clone(),
                    source: error,
                },
                _ => cannot("go on with", &self.dir, error),
            })?;
            if let Some(segment) = again {
                state.first_segments.insert(image.name.clone(), segment);
                found = true;
            }
        }
        // One that has a state has to tell of this boot: what is written from now on is there
        // if only the server ends.
        if !found && !State::is_there(&self.dir) {
            return Ok(());
        }
        sync_dir(&self.dir)?;
        state.boot = boot();
        state.base = base.id.to_string();
        state.write(&self.dir)?;
        base.state = state;
        for (_, image) in &self.images {
            image.begins_here();
        }
        Ok(())
    }

    fn gone(&self, name: &str) -> PathBuf {
        self.dir.join("gone").join(name)
    }

    fn file_path(&self, name: &str) -> PathBuf {
        self.dir.join("files").join(name)
    }

    /// Held by whoever changes something.
    pub fn writing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn image(&self, file_name: &str) -> Option<&(Arc<SharedImage>, Arc<WritableImage>)> {
        let mut images = self.images.iter();
        images.find(|(_, own)| own.file_name == file_name)
    }

    /// Whether a file of this name would stand for an image in a snapshot of the clone.
    pub fn is_of_image(&self, name: &str) -> bool {
        let mut images = self.images.iter();
        images.any(|(_, own)| own.file_name == name || own.name == name)
    }

    pub fn named(&self, name: &str) -> Option<Named> {
        lock(&self.names).get(name).cloned()
    }

    pub fn names(&self) -> Vec<(String, Named)> {
        let names = lock(&self.names);
        let all = names.iter();
        all.map(|(name, named)| (name.clone(), named.clone()))
            .collect()
    }

    /// Where the file is, or is to be, if it has a name.
    pub fn path_of(&self, file: &ExtraFile) -> Option<PathBuf> {
        let names = lock(&self.names);
        let name = names.iter().find_map(|(name, named)| match named {
            Named::File(it) if it.ino == file.ino => Some(name),
            _ => None,
        });
        name.map(|name| self.file_path(name))
    }

    /// Makes an empty file, or a socket.
    pub fn create(&self, name: &str, look: Look, ino: u64, socket: bool) -> io::Result<Named> {
        let _writing = self.writing();
        let mut names = lock(&self.names);
        if self.image(name).is_some() || names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // With those that have no name any more and are still open.
        if Arc::strong_count(&self.freezes) > self.most_files {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let named = if socket {
            let path = self.dir.join(format!("socket-{ino}"));
            let file = ExtraFile::own(ino, path.clone(), look, &self.around())?;
            let _ = fs::remove_file(path);
            Named::Socket(Arc::new(file))
        } else {
            let file = ExtraFile::own(ino, self.file_path(name), look, &self.around())?;
            Named::File(Arc::new(file))
        };
        names.insert(name.to_owned(), named.clone());
        Ok(named)
    }

    pub fn unlink(&self, name: &str) -> io::Result<()> {
        let _writing = self.writing();
        let mut names = lock(&self.names);
        let named = names.get(name).ok_or(io::ErrorKind::NotFound)?;
        if let Named::File(file) = named {
            self.hide_base(name)?;
            step("remove a file");
            match fs::remove_file(self.file_path(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => file.moved(None),
            }
            self.note_change_of_names();
        }
        names.remove(name);
        Ok(())
    }

    pub fn rename(&self, from: &str, to: &str, replaces: bool) -> io::Result<()> {
        let _writing = self.writing();
        let mut names = lock(&self.names);
        let named = names.get(from).ok_or(io::ErrorKind::NotFound)?.clone();
        if from == to {
            return Ok(());
        }
        if !replaces && names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        match &named {
            Named::File(file) => {
                let path = self.file_path(to);
                file.copy_to(&self.file_path(from))?;
                self.hide_base(from)?;
                step("rename a file");
                fs::rename(self.file_path(from), &path)?;
                file.moved(Some(path));
                self.note_change_of_names();
            }
            Named::Socket(_) => {
                if names.contains_key(to) {
                    self.hide_base(to)?;
                    let _ = fs::remove_file(self.file_path(to));
                    self.note_change_of_names();
                }
            }
        }
        names.remove(from);
        if let Some(Named::File(replaced)) = names.insert(to.to_owned(), named) {
            replaced.moved(None);
        }
        Ok(())
    }

    /// A file of this name that the base has, or will have once a commit that is under
    /// way is done, is not found again.
    fn hide_base(&self, name: &str) -> io::Result<()> {
        step("hide a file of the base");
        File::create(self.gone(name)).map(drop)
    }

    /// Gives up what hides nothing.
    fn tidy_gone(&self, manifest: &Manifest) {
        let entries = fs::read_dir(self.dir.join("gone"));
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let is_made = self.made.iter().any(|made| *made == name);
            if manifest.image(&name).is_none() && !is_made {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Has on the disk what names there are.
    pub fn sync_names(&self) -> io::Result<()> {
        if self.is_lost.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "names could not be brought to the disk before",
            ));
        }
        let dirs = [
            self.dir.join("files"),
            self.dir.join("gone"),
            self.dir.clone(),
        ];
        let mut dirs = dirs.iter();
        let synced = dirs.try_for_each(|dir| File::open(dir)?.sync_all());
        if synced.is_err() {
            self.is_lost.store(true, Ordering::Release);
        }
        synced
    }

    /// The snapshot that it is made from.
    pub fn base_id(&self) -> SnapshotId {
        lock(&self.base).id
    }

    /// How many bytes of images are in no commit, and whether anything at all is not.
    pub fn uncommitted(&self) -> (u64, bool) {
        let images = self.images.iter();
        let bytes = images.map(|(_, image)| image.uncommitted_bytes()).sum();
        let changed = self.images.iter().any(|(_, image)| image.is_changed());
        (bytes, changed || self.files_differ())
    }

    /// Whether a file was written, made, renamed or removed that the base has otherwise, or
    /// not at all: a commit leaves some out.
    pub fn files_differ(&self) -> bool {
        let base = lock(&self.base);
        if self.names_changed.load(Ordering::Relaxed) > base.number {
            return true;
        }
        let names = lock(&self.names);
        let of_base = |name: &str| {
            let image = base.manifest.image(name);
            image.is_some_and(|image| image.role == ImageRole::File)
        };
        let differs = names.iter().any(|(name, named)| match named {
            Named::File(file) => file.is_fresh(base.number) || !of_base(name) && !file.is_made(),
            Named::Socket(_) => false,
        });
        let is_there = |name: &str| matches!(names.get(name), Some(Named::File(_)));
        let mut files = base.manifest.images.iter();
        differs || files.any(|it| it.role == ImageRole::File && !is_there(&it.name))
    }

    /// To be called under [`ViewClone::writing`]: no freeze comes between.
    fn note_change_of_names(&self) {
        let next = self.freezes.load(Ordering::Relaxed) + 1;
        self.names_changed.store(next, Ordering::Relaxed);
    }

    /// All of it as it is now, for as long as the result lives.
    pub fn freeze(&self) -> io::Result<FrozenClone> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let (id, committed) = {
            let base = lock(&self.base);
            (base.id, base.number)
        };
        let names = lock(&self.names);
        let number = self.freezes.load(Ordering::Relaxed) + 1;
        let mut images = Vec::new();
        for (_, image) in &self.images {
            if let Some(frozen) = image.freeze(number)? {
                images.push((image.clone(), frozen));
            }
        }
        let files = names.iter().filter_map(|(name, named)| match named {
            Named::Socket(_) => None,
            Named::File(file) if file.is_made() => None,
            Named::File(file) => Some(FrozenNamed {
                name: name.clone(),
                size_bytes: file.look().size_bytes,
                is_fresh: file.is_fresh(committed),
                content: file.freeze(),
            }),
        });
        let files = files.collect();
        self.freezes.store(number, Ordering::Relaxed);
        Ok(FrozenClone {
            number,
            base: id,
            images,
            files,
        })
    }

    /// Freeze `number` is the snapshot `id`, which is durable and pinned.
    pub fn rebase(
        &self,
        store: &Store,
        number: u64,
        id: SnapshotId,
        manifest: Manifest,
    ) -> Result<()> {
        let mut base = lock(&self.base);
        let mut state = State {
            base: id.to_string(),
            boot: boot(),
            ..State::default()
        };
        for (_, image) in &self.images {
            if let Some(first) = image.first_segment_after(number) {
                state.first_segments.insert(image.name.clone(), first);
            }
        }
        // Before anything that the old state leads to is given up.
        state.write(&self.dir)?;
        step("go on as the child");
        for (_, own) in &self.images {
            if let Some(image) = manifest.image(&own.name) {
                own.rebase(number, store.image_reader(image));
            }
        }
        for (name, named) in self.names() {
            if let (Named::File(file), Some(image)) = (named, manifest.image(&name)) {
                file.rebase(store.image_reader(image));
            }
        }
        self.tidy_gone(&manifest);
        *base = CloneBase {
            id,
            manifest,
            state,
            number,
        };
        Ok(())
    }

    /// Where it is kept.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
