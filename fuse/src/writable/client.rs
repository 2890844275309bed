//! A commit's end of the socket of a view.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use snapstore_store::SnapshotId;

use super::control::short_path;
use super::operations::{BASE_ATTRIBUTE, PLACE_ATTRIBUTE};
use super::place::lock_for_commit;
use super::wire::{Answer, FrozenView, Request, Status, receive, receive_fd, send};
use crate::error::{Error, Result, cannot};
use crate::mountpoint::{Mountpoint, Seen};

/// How long a server that has nothing to do any more may take to be gone.
const AT_ITS_END: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// A connection to the server of a writable view.
pub struct ViewClient {
    dir: PathBuf,
    /// Which clone the directory is.
    clone: Option<u32>,
    stream: UnixStream,
    /// Where what is written is kept.
    place: PathBuf,
}

/// A clone at one instant, as long as the connection lives.
pub struct FrozenForCommit {
    /// What there is.
    pub view: FrozenView,
    /// The overlays of the images, in order.
    pub overlays: Vec<File>,
    /// The files that are not the base's, in order.
    pub files: Vec<File>,
    /// Without it the view could be gone on with, and written to, once its server has ended.
    _lock: Option<File>,
}

/// A snapshot that has this image of a writable view; `None` if somebody has opened the image
/// for writing, or it is none. Waits for the view's server.
#[must_use]
pub fn image_of(file: &Path) -> Option<SnapshotId> {
    let mut id = [0; 64];
    let len = rustix::fs::getxattr(file, BASE_ATTRIBUTE, &mut id[..]).ok()?;
    SnapshotId::from_hex(std::str::from_utf8(id.get(..len)?).ok()?)
}

impl ViewClient {
    /// Connects to whoever serves `dir`: the root of a writable mount, or a clone in it.
    ///
    /// # Errors
    /// [`Error::NotWritable`]; its server does not answer.
    pub fn connect(dir: &Path) -> Result<Self> {
        let not_writable = || Error::NotWritable {
            path: dir.to_owned(),
        };
        let seen = Seen::at(dir).map_err(|error| match error.kind() {
            // No clone has that number.
            io::ErrorKind::NotFound => not_writable(),
            _ => cannot("inspect", dir, error),
        })?;
        let mount = crate::mountpoint::table()?;
        let mount = mount.into_iter().find(|entry| entry.id == seen.mount);
        let mount = mount.ok_or_else(not_writable)?;
        let ours = Mountpoint::of(&mount).ok_or_else(not_writable)?;
        // Another user's server could lead anywhere.
        let trusted = [0, rustix::process::geteuid().as_raw()];
        if !trusted.contains(&ours.user) {
            return Err(not_writable());
        }
        let within = seen
            .path
            .strip_prefix(&mount.dir)
            .map_err(|_| not_writable())?;
        let clone = match within.to_str() {
            Some("") => None,
            Some(name) => Some(name.parse().map_err(|_| not_writable())?),
            None => return Err(not_writable()),
        };
        let mut place = vec![0; 4096];
        let len = rustix::fs::getxattr(&seen.path, PLACE_ATTRIBUTE, &mut place[..])
            .map_err(|_| not_writable())?;
        place.truncate(len);
        let mut place = PathBuf::from(OsString::from_vec(place));
        if !place.join("view.json").exists() {
            place.pop();
        }
        let failed = |error| cannot("reach the server of", dir, error);
        let (_dir, path) = short_path(&place).map_err(failed)?;
        Ok(Self {
            dir: seen.path,
            clone,
            stream: UnixStream::connect(path).map_err(failed)?,
            place,
        })
    }

    fn ask(&mut self, request: &Request) -> Result<Answer> {
        let failed = |error| cannot("speak with the server of", &self.dir, error);
        send(&mut self.stream, request).map_err(failed)?;
        let answer = receive(&mut self.stream).map_err(failed)?;
        let gone = || failed(io::ErrorKind::UnexpectedEof.into());
        match answer.ok_or_else(gone)? {
            Answer::Refused { message, busy } => Err(Error::ViewRefused {
                path: self.dir.clone(),
                message,
                busy,
            }),
            answer => Ok(answer),
        }
    }

    fn odd(&self) -> Error {
        cannot(
            "understand the server of",
            &self.dir,
            io::ErrorKind::InvalidData.into(),
        )
    }

    /// What the view has.
    ///
    /// # Errors
    /// Its server does not answer.
    pub fn status(&mut self) -> Result<Status> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(self.odd()),
        }
    }

    /// The clone that the directory is.
    fn number(&self, status: &Status) -> Result<u32> {
        match (self.clone, status.is_many) {
            (Some(clone), true) => Ok(clone),
            (None, false) => Ok(0),
            _ => Err(Error::ViewRefused {
                path: self.dir.clone(),
                message: "it has a directory for each clone; name one of them".to_owned(),
                busy: false,
            }),
        }
    }

    /// Has the kernel give all that was stored through shared mappings to the server, then
    /// freezes the clone.
    ///
    /// # Errors
    /// Its server refuses; a file cannot be synced.
    pub fn freeze(&mut self) -> Result<FrozenForCommit> {
        let status = self.status()?;
        let number = self.number(&status)?;
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        if let Some(clone) = status.clones.get(index) {
            let mut paths = clone.writable.iter().map(|name| self.dir.join(name));
            paths.try_for_each(|path| flush(&path))?;
        }
        let lock = lock_for_commit(&self.place)?;
        let Answer::Frozen(view) = self.ask(&Request::Freeze { clone: number })? else {
            return Err(self.odd());
        };
        let failed = |error| cannot("take what was frozen of", &self.dir, error);
        let take = || receive_fd(&self.stream).map(File::from).map_err(failed);
        let overlays = view.images.iter().map(|_| take()).collect::<Result<_>>()?;
        let own = view.files.iter().filter(|file| !file.is_base);
        let files = own.map(|_| take()).collect::<Result<_>>()?;
        Ok(FrozenForCommit {
            view,
            overlays,
            files,
            _lock: lock,
        })
    }

    /// Has the kernel give all that was stored through shared mappings to the server, of the
    /// whole view, whose root the directory is. What is stored after that may not be there.
    ///
    /// # Errors
    /// Its server does not answer; a file cannot be opened.
    pub fn write_out(&mut self) -> Result<()> {
        let status = self.status()?;
        for (number, clone) in status.clones.iter().enumerate() {
            let dir = match status.is_many {
                true => self.dir.join(number.to_string()),
                false => self.dir.clone(),
            };
            let mut paths = clone.writable.iter().map(|name| dir.join(name));
            paths.try_for_each(|path| flush(&path))?;
        }
        Ok(())
    }

    /// What was frozen is this snapshot, which is durable.
    ///
    /// # Errors
    /// Its server does not answer.
    pub fn committed(&mut self, id: &str) -> Result<()> {
        match self.ask(&Request::Committed { id: id.to_owned() })? {
            Answer::Done => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// Waits until the server has ended, with all that it does at its end, for `patience` at
    /// most. True if it has.
    pub fn wait_for_end(mut self, patience: Duration) -> bool {
        if self.stream.set_read_timeout(Some(patience)).is_err() {
            return false;
        }
        let process = socket_peercred(&self.stream).ok();
        let process = process.and_then(|peer| pidfd_open(peer.pid, PidfdFlags::empty()).ok());
        // It has nothing to say any more.
        let ended = match self.stream.read_exact(&mut [0]) {
            Ok(()) => true,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ),
        };
        if ended && let Some(process) = process {
            // A process that ends closes one file after the other: until it is gone, the
            // filesystem of its overlays is in use.
            let mut gone = [PollFd::new(&process, PollFlags::IN)];
            let _ = poll(&mut gone, Some(&AT_ITS_END));
        }
        ended
    }

    /// Has all that was written so far on the disk. Waits for that.
    ///
    /// # Errors
    /// The disk does not take it; its server does not answer.
    pub fn sync(&mut self) -> Result<()> {
        match self.ask(&Request::Sync)? {
            Answer::Done => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// Says what becomes of what is in no commit once the view is unmounted.
    ///
    /// # Errors
    /// Its server does not answer.
    pub fn at_end(&mut self, keep: bool) -> Result<()> {
        match self.ask(&Request::AtEnd { keep })? {
            Answer::Done => Ok(()),
            _ => Err(self.odd()),
        }
    }
}

fn flush(path: &Path) -> Result<()> {
    let kind = fs::symlink_metadata(path).map(|it| it.file_type());
    if !kind.is_ok_and(|kind| kind.is_file()) {
        // A socket, or gone by now.
        return Ok(());
    }
    match File::open(path) {
        // Closing it has the kernel write out all that it holds of the file (fuse_flush),
        // without the disk having to take it. What the server could not take keeps it
        // from being frozen.
        Ok(file) => drop(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(cannot("sync", path, error)),
    }
    Ok(())
}
