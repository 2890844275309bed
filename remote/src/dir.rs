//! A bucket that is a directory, such as one that hosts share over a network
//! filesystem: an object is a file, which appears whole and durable, or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::objects::{
    self, MOST_LISTED, Objects, Part, Requests, TOO_LONG, kind_of, longest_bytes, wrong,
};
use crate::protocol::{Listed, Unanswered};

/// Where files are until they are whole.
const UNFINISHED: &str = "unfinished";

const LINKED_DIRECTORY: &str = "it is a symbolic link, and links in a bucket are not followed: \
    remove the link, and put the directory itself there";

const NO_TEXT: &str = "its name is no text (UTF-8), and no host gives such a one: remove it";

/// Directories in each other that keys lead through.
const MOST_LEVELS: u32 = 8;
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

    /// The bucket's own directory. A filesystem that is not mounted is no bucket without
    /// objects. Links on the way to it are the user's own.
    fn root(&self, what: &'static str, key: &str) -> Result<OwnedFd, Unanswered> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&self.root, flags, Mode::empty())
            .map_err(|error| no(what, key, &error.into()))
    }

    /// A directory below the root. Each step is taken from the open directory above, and no
    /// step follows a link: who can write to the bucket must not lead others out of it.
    fn dir(
        &self,
        what: &'static str,
        key: &str,
        create: bool,
    ) -> Result<Option<OwnedFd>, Unanswered> {
        let mut dir = self.root(what, key)?;
        let mut so_far = String::new();
        for name in key.split('/').filter(|name| !name.is_empty()) {
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far.push_str(name);
            let made = || -> io::Result<OwnedFd> {
                match rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o777)) {
                    Err(Errno::EXIST) => {}
                    other => other?,
                }
                rustix::fs::fsync(&dir)?;
                Ok(open_dir(&dir, name)?)
            };
            let opened = match open_dir(&dir, name) {
                Err(Errno::NOENT) if create => made(),
                Err(Errno::NOENT) => return Ok(None),
                other => other.map_err(io::Error::from),
            };
            dir = match opened {
                Ok(below) => below,
                Err(error) => {
                    let found = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW);
                    return Err(match found.map(|it| FileType::from_raw_mode(it.st_mode)) {
                        Ok(FileType::Symlink) => wrong(what, &so_far, LINKED_DIRECTORY),
                        Ok(FileType::Directory) | Err(_) => no(what, &so_far, &error),
                        Ok(_) => wrong(what, &so_far, "it has to be a directory"),
                    });
                }
            };
        }
        Ok(Some(dir))
    }

    /// The directory of an object.
    fn dir_of(&self, what: &'static str, key: &str) -> Result<Option<OwnedFd>, Unanswered> {
        self.dir(what, split(key).0, false)
    }

    /// A file's bytes, or a part of them; none if it is longer than this.
    fn read(mut file: File, longest_bytes: u64, part: Option<Part>) -> io::Result<Option<Vec<u8>>> {
        if file.metadata()?.len() > longest_bytes {
            return Ok(None);
        }
        let (from, len) = part.map_or((0, longest_bytes + 1), |(from, len)| (from, len as u64));
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.take(len).read_to_end(&mut bytes)?;
        // It may have grown meanwhile.
        Ok((bytes.len() as u64 <= longest_bytes).then_some(bytes))
    }
}

impl Objects for Directory {
    fn create(&self) -> Result<(), Unanswered> {
        fs::create_dir_all(&self.root).map_err(|error| no("create", "", &error))
    }

    fn is_absent(&self) -> bool {
        match fs::read_dir(&self.root) {
            Ok(mut found) => found.next().is_none(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        let absent = || no("write", key, &io::ErrorKind::NotFound.into());
        let dir = self.dir("write", split(key).0, true)?;
        let dir = dir.ok_or_else(absent)?;
        let parts = self.dir("write", UNFINISHED, true)?.ok_or_else(absent)?;
        write(&dir, key, &parts, bytes)
    }

    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        let Some(dir) = self.dir_of("read", key)? else {
            return Ok(None);
        };
        let name = split(key).1;
        let Some(kind) = kind(&dir, name).map_err(|error| no("read", key, &error))? else {
            return Ok(None);
        };
        if let Some(why) = odd(kind) {
            return Err(wrong("read", key, why));
        }
        // It may be another one by now: no link is followed, and no writer waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&dir, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(no("read", key, &error.into())),
            Ok(file) => File::from(file),
        };
        match file.metadata() {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Err(wrong("read", key, "it is no file")),
            Err(error) => return Err(no("read", key, &error)),
        }
        let read = || Self::read(file, longest_bytes(key), part);
        let bytes = read().map_err(|error| no("read", key, &error))?;
        bytes.map(Some).ok_or_else(|| wrong("read", key, TOO_LONG))
    }

    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        let Some(dir) = self.dir_of("look for", key)? else {
            return Ok(false);
        };
        match kind(&dir, split(key).1) {
            Ok(found) => Ok(found == Some(FileType::RegularFile)),
            Err(error) => Err(no("look for", key, &error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        let mut found = Vec::new();
        let key = prefix.trim_end_matches('/');
        if let Some(dir) = self.dir("list", key, false)? {
            walk(&dir, key, MOST_LEVELS, &mut found)?;
        }
        if found.len() > MOST_LISTED {
            let reason = "there are more objects than a listing may have (4194304)";
            return Err(wrong("list", prefix, reason));
        }
        found.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }

    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        let Some(dir) = self.dir_of("delete", key)? else {
            return Ok(());
        };
        match rustix::fs::unlinkat(&dir, split(key).1, AtFlags::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(no("delete", key, &error.into())),
            Ok(()) => {}
        }
        // It is gone, perhaps not for good.
        rustix::fs::fsync(&dir).map_err(|error| objects::no("delete", key, error.to_string()))?;
        if let (Some(session), "lease") = (split(key).0.strip_prefix("lease/"), kind_of(key))
            && let Some(leases) = self.dir("delete", "lease", false)?
        {
            // A session's directory goes with its last beat, if that is empty.
            let _ = rustix::fs::unlinkat(&leases, session, AtFlags::REMOVEDIR);
        }
        Ok(())
    }

    fn requests(&self) -> Option<Requests> {
        None
    }
}

/// A key's directory, and its name there.
fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('/').unwrap_or(("", key))
}

fn open_dir(above: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(above, name, flags, Mode::empty())
}

/// What stands there, if anything does.
fn kind(dir: &OwnedFd, name: &str) -> io::Result<Option<FileType>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        found => Ok(Some(FileType::from_raw_mode(found?.st_mode))),
    }
}

/// Why it is no object.
fn odd(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::RegularFile => None,
        FileType::Symlink => Some("it is a symbolic link, and no object is one: remove it"),
        FileType::Directory => Some("it is a directory, and no object is one: remove it"),
        FileType::Fifo => Some("it is a named pipe, and no object is one: remove it"),
        _ => Some("it is a device or a socket, and no object is one: remove it"),
    }
}

fn write(dir: &OwnedFd, key: &str, parts: &OwnedFd, bytes: &[u8]) -> Result<(), Unanswered> {
    let name = split(key).1;
    let random = crate::random().map_err(|error| no("write", key, &error))?;
    let part = format!("{random:032x}");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o666);
    let written = || -> io::Result<()> {
        let mut file = File::from(rustix::fs::openat(parts, &part, flags, mode)?);
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(rustix::fs::renameat(parts, &part, dir, name)?)
    };
    if let Err(error) = written() {
        let _ = rustix::fs::unlinkat(parts, &part, AtFlags::empty());
        return Err(no("write", key, &error));
    }
    // From here on it may be there, whatever is told.
    rustix::fs::fsync(dir).map_err(|error| objects::no("write", key, error.to_string()))
}

/// Stops when there are too many. What is deeper than any key is nobody's object. What is
/// neither a file nor a directory may stand in an object's place: it is told, not left out.
fn walk(dir: &OwnedFd, key: &str, levels: u32, found: &mut Vec<Listed>) -> Result<(), Unanswered> {
    let failed = |error: Errno| no("list", key, &error.into());
    for entry in Dir::read_from(dir.as_fd()).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if found.len() > MOST_LISTED {
            return Ok(());
        }
        let Ok(name) = entry.file_name().to_str() else {
            let name = entry.file_name().to_string_lossy();
            return Err(wrong("list", &format!("{key}/{name}"), NO_TEXT));
        };
        if name == "." || name == ".." {
            continue;
        }
        let key = format!("{key}/{name}");
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.map_err(failed)?,
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        // A tag's records are right below it.
        let is_record = key.starts_with("refs/") && key.matches('/').count() == 2;
        match (kind, odd(kind)) {
            (FileType::Directory, _) if !is_record => {
                let below = match open_dir(dir, name) {
                    Err(Errno::NOENT) => continue,
                    below => below.map_err(failed)?,
                };
                if levels > 1 {
                    walk(&below, &key, levels - 1, found)?;
                }
            }
            (_, Some(why)) => return Err(wrong("list", &key, why)),
            (_, None) => found.push(Listed {
                key,
                len_bytes: u64::try_from(stat.st_size).unwrap_or_default(),
                modified: u64::try_from(stat.st_mtime).unwrap_or_default(),
            }),
        }
    }
    Ok(())
}

/// Of a request that has changed nothing yet.
fn no(what: &'static str, key: &str, error: &io::Error) -> Unanswered {
    let is_refused = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(errno) => [Errno::NOSPC, Errno::DQUOT, Errno::ROFS].contains(&errno),
        None => false,
    };
    match is_refused {
        true => objects::refused(what, key, error.to_string()),
        false => objects::no(what, key, error.to_string()),
    }
}
