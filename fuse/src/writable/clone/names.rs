//! The names of a clone that are no image's: files and sockets that are made, renamed and
//! removed.
//!
//! What has a name of its own lies in `files`; a file in `gone` hides one of the base.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use snapstore_overlay::step;
use snapstore_store::{ImageRole, Manifest, Store};

use super::{Named, ViewClone, lock};
use crate::error::{Error, Result, cannot};
use crate::writable::file::{ExtraFile, Look, Origin};
use crate::writable::image::is_lost;
use crate::writable::state::ENDED;

impl ViewClone {
    pub(super) fn load_names(
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

    fn gone(&self, name: &str) -> PathBuf {
        self.dir.join("gone").join(name)
    }

    fn file_path(&self, name: &str) -> PathBuf {
        self.dir.join("files").join(name)
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
    pub(super) fn tidy_gone(&self, manifest: &Manifest) {
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

    /// What lies in `files`, and how long each is.
    pub(super) fn own_files(&self) -> BTreeMap<String, u64> {
        let names = self.names().into_iter();
        let own = names.filter_map(|(name, named)| match named {
            Named::File(file) => Some((name, file.own_bytes()?)),
            Named::Socket(_) => None,
        });
        own.collect()
    }

    /// That what lay in `files` when the view ended is found there.
    pub(super) fn has_files(&self, wanted: &BTreeMap<String, u64>) -> Result<()> {
        let found = self.own_files();
        for (name, wanted) in wanted {
            let what = match found.get(name) {
                Some(bytes) if bytes == wanted => continue,
                Some(bytes) => format!("has {bytes} bytes, and had {wanted}"),
                None => "is gone".to_owned(),
            };
            let ended = self.dir.with_file_name(ENDED);
            return Err(Error::OverlayDamaged {
                clone: self.dir.clone(),
                source: is_lost(&format!(
                    "{} {what} (to go on with what is there, remove {})",
                    self.file_path(name).display(),
                    ended.display()
                )),
            });
        }
        Ok(())
    }

    /// To be called under [`ViewClone::writing`]: no freeze comes between.
    fn note_change_of_names(&self) {
        let next = self.freezes.load(Ordering::Relaxed) + 1;
        self.names_changed.store(next, Ordering::Relaxed);
    }
}
