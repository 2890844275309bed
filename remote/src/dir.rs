//! A bucket that is a directory, such as one that hosts share over a network
//! filesystem: an object is a file, which appears whole and durable, or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use snapstore_store::{Opened, open_regular};

use crate::protocol::{Listed, Unanswered};

/// Where files are until they are whole.
const UNFINISHED: &str = "unfinished";

/// Directories in each other that keys lead through.
const MOST_LEVELS: u32 = 8;
/// Objects of one listing: with their keys they take half a GiB.
const MOST_LISTED: usize = 1 << 22;

/// The longest object of its kind that any host writes: whoever can write to the directory
/// can put anything there, such as a file of 1 TiB that takes no room.
fn longest_bytes(key: &str) -> u64 {
    match key.split_once('/').map_or(key, |(kind, _)| kind) {
        "packs" => 256 << 20,
        // An image of 16 TiB has 8 million leaves.
        "heads" => 1 << 30,
        // These name what collections condemn.
        "lease" | "condemn" => 64 << 20,
        _ => 64 << 10,
    }
}

/// A directory of objects.
#[derive(Clone, Debug)]
pub struct Directory {
    root: PathBuf,
}

impl Directory {
    /// The bucket in this directory, which has to be there.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Makes the directory.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn create(&self) -> Result<(), Unanswered> {
        fs::create_dir_all(&self.root).map_err(|error| no("create", "", &error))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    /// That there is a directory at all: a filesystem that is not mounted is no bucket
    /// without objects.
    fn check(&self, what: &'static str, key: &str) -> Result<(), Unanswered> {
        let found = fs::metadata(&self.root).map_err(|error| no(what, key, &error))?;
        match found.is_dir() {
            true => Ok(()),
            false => Err(no(
                what,
                key,
                &io::Error::from(io::ErrorKind::NotADirectory),
            )),
        }
    }

    /// Writes an object.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        self.check("write", key)?;
        self.write(key, bytes)
            .map_err(|error| no("write", key, &error))
    }

    fn write(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(key);
        let dir = path.parent().unwrap_or(&self.root);
        make_dirs(&self.root, dir)?;
        let unfinished = self.root.join(UNFINISHED);
        make_dirs(&self.root, &unfinished)?;
        let part = unfinished.join(format!("{:032x}", crate::random()?));
        let written = (|| {
            let mut file = File::create_new(&part)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&part, &path)?;
            File::open(dir)?.sync_all()
        })();
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written
    }

    /// Reads an object, or a part of it.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn get(
        &self,
        key: &str,
        range: Option<(u64, usize)>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        self.check("read", key)?;
        let file = match open_regular(&self.path(key)) {
            Ok(Opened::File(file)) => file,
            Ok(Opened::Absent) => return Ok(None),
            Ok(Opened::Odd(why)) => return Err(wrong("read", key, why)),
            Err(error) => return Err(no("read", key, &error)),
        };
        let read = || Self::read(file, longest_bytes(key), range);
        let bytes = read().map_err(|error| no("read", key, &error))?;
        let long = "it is longer than any object of its kind";
        bytes.map(Some).ok_or_else(|| wrong("read", key, long))
    }

    /// A file's bytes, or a part of them; none if it is longer than this.
    fn read(
        mut file: File,
        longest_bytes: u64,
        range: Option<(u64, usize)>,
    ) -> io::Result<Option<Vec<u8>>> {
        if file.metadata()?.len() > longest_bytes {
            return Ok(None);
        }
        let (from, len) = range.map_or((0, longest_bytes + 1), |(from, len)| (from, len as u64));
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.take(len).read_to_end(&mut bytes)?;
        // It may have grown meanwhile.
        Ok((bytes.len() as u64 <= longest_bytes).then_some(bytes))
    }

    /// Whether there is an object.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        self.check("look for", key)?;
        match fs::symlink_metadata(self.path(key)) {
            Ok(found) => Ok(found.is_file()),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(no("look for", key, &error)),
        }
    }

    /// The objects whose keys begin so; `prefix` ends with a slash.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        self.check("list", prefix)?;
        let mut found = Vec::new();
        self.walk(prefix.trim_end_matches('/'), MOST_LEVELS, &mut found)
            .map_err(|error| no("list", prefix, &error))?;
        if found.len() > MOST_LISTED {
            let reason = "there are more objects than a listing may have (4194304)";
            return Err(wrong("list", prefix, reason));
        }
        found.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }

    /// Stops when there are too many. What is deeper than any key is nobody's object.
    fn walk(&self, key: &str, levels: u32, found: &mut Vec<Listed>) -> io::Result<()> {
        let entries = match fs::read_dir(self.path(key)) {
            Err(error) if is_absent(&error) => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if found.len() > MOST_LISTED {
                return Ok(());
            }
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            let key = format!("{key}/{name}");
            let metadata = match entry.metadata() {
                Err(error) if is_absent(&error) => continue,
                metadata => metadata?,
            };
            if metadata.is_dir() {
                if levels > 1 {
                    self.walk(&key, levels - 1, found)?;
                }
            } else if metadata.is_file() {
                let modified = metadata.modified()?.duration_since(UNIX_EPOCH);
                found.push(Listed {
                    key,
                    len_bytes: metadata.len(),
                    modified: modified.unwrap_or_default().as_secs(),
                });
            }
        }
        Ok(())
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// As of the filesystem.
    pub fn delete(&self, key: &str) -> Result<(), Unanswered> {
        self.check("delete", key)?;
        let path = self.path(key);
        let deleted = fs::remove_file(&path).and_then(|()| {
            let dir = path.parent().unwrap_or(&self.root);
            File::open(dir)?.sync_all()?;
            if key.starts_with("lease/") {
                // A session's directory goes with its last beat, if that is empty.
                let _ = fs::remove_dir(dir);
            }
            Ok(())
        });
        match deleted {
            Err(error) if !is_absent(&error) => Err(no("delete", key, &error)),
            _ => Ok(()),
        }
    }
}

/// Makes directories that stay after a power cut.
fn make_dirs(root: &Path, dir: &Path) -> io::Result<()> {
    if dir == root || dir.is_dir() {
        return Ok(());
    }
    let above = dir.parent().unwrap_or(root);
    make_dirs(root, above)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    File::open(above)?.sync_all()
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn no(what: &'static str, key: &str, error: &io::Error) -> Unanswered {
    Unanswered {
        what,
        key: key.to_owned(),
        reason: error.to_string(),
        wrong: None,
    }
}

/// What stands there is no object.
fn wrong(what: &'static str, key: &str, why: &'static str) -> Unanswered {
    Unanswered {
        what,
        key: key.to_owned(),
        reason: why.to_owned(),
        wrong: Some(why),
    }
}
