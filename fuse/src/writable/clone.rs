//! One clone: a directory of images and files that are its own as soon as somebody writes
//! to them.

mod names;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use snapstore_overlay::{Budget, Frozen, Survived, step};
use snapstore_store::{ImageReader, ImageRole, Manifest, SnapshotId, Store};

use super::file::{Around, ExtraFile, FrozenFile};
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
        state.files = self.own_files();
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
        if in_order {
            self.has_files(&base.state.files)?;
        }
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

    /// Held by whoever changes something.
    pub fn writing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn image(&self, file_name: &str) -> Option<&(Arc<SharedImage>, Arc<WritableImage>)> {
        let mut images = self.images.iter();
        images.find(|(_, own)| own.file_name == file_name)
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
