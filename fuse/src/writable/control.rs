//! The server's end of its socket: freezing clones for commits.
//!
//! Each connection has a thread. What it froze is let go of when it ends, however that is.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

use rustix::fs::{Mode, OFlags};

use super::clone::{FrozenClone, ViewClone};
use super::file::FrozenFile;
use super::views::Views;
use super::wire::{
    Answer, CloneStatus, FrozenFileInfo, FrozenImage, FrozenView, Request, Status, receive, send,
    send_fd, sent,
};
use crate::error::{Result, cannot};

const SOCKET: &str = "control.sock";

/// Answers whoever connects, until the process ends.
pub(crate) struct Control {
    views: Arc<Views>,
    /// Whether what is in no commit goes when the mount does.
    discards: AtomicBool,
    /// By the clones' numbers.
    committing: Vec<AtomicBool>,
}

/// A path of any length, through the directory that is open.
pub(crate) fn short_path(place: &std::path::Path) -> io::Result<(std::os::fd::OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(place, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, path.into()))
}

impl Control {
    /// Begins to listen. Whether what is in no commit is given up is as told, until somebody
    /// says otherwise.
    pub fn start(views: Arc<Views>, discard: bool) -> Result<Arc<Self>> {
        let place = views.overlays().to_owned();
        let failed = |error| cannot("listen in", &place, error);
        let _ = std::fs::remove_file(place.join(SOCKET));
        let (_dir, path) = short_path(&place).map_err(failed)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        let committing = views.clones.iter().map(|_| AtomicBool::new(false));
        let control = Arc::new(Self {
            committing: committing.collect(),
            discards: AtomicBool::new(discard),
            views,
        });
        let answering = control.clone();
        Builder::new()
            .name("control".to_owned())
            .spawn(move || answering.listen(&listener))
            .map_err(failed)?;
        Ok(control)
    }

    /// Whether what is in no commit is given up at the end.
    pub fn discards(&self) -> bool {
        self.discards.load(Ordering::Relaxed)
    }

    fn listen(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Descriptors are used up: whoever waits is answered later.
                std::thread::sleep(std::time::Duration::from_millis(50));
                continue;
            };
            let serving = self.clone();
            let started = Builder::new().name("commit".to_owned()).spawn(move || {
                if let Err(error) = serving.serve(stream) {
                    tracing::warn!(%error, "a connection to a view ended");
                }
            });
            if let Err(error) = started {
                tracing::warn!(%error, "a connection to a view is not answered");
            }
        }
    }

    fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut held: Option<Held<'_>> = None;
        while let Some(request) = receive(&mut stream)? {
            let answer = match request {
                Request::Status => Answer::Status(self.status()),
                Request::AtEnd { keep } => {
                    self.discards.store(!keep, Ordering::Relaxed);
                    Answer::Done
                }
                Request::Sync => match self.views.sync() {
                    Ok(()) => Answer::Done,
                    Err(error) => refused(&error.to_string(), false),
                },
                Request::Freeze { clone } => {
                    // A connection has one at a time.
                    drop(held.take());
                    match self.freeze(clone) {
                        Ok(frozen) => {
                            send(&mut stream, &Answer::Frozen(frozen.told()))?;
                            frozen.send_descriptors(&stream)?;
                            held = Some(frozen);
                            continue;
                        }
                        Err(refused) => refused,
                    }
                }
                Request::Committed { id } => match held.take() {
                    None => refused("nothing is frozen on this connection", false),
                    Some(held) => {
                        let done = self.views.committed(held.clone, held.frozen.number, &id);
                        match done {
                            Ok(()) => Answer::Done,
                            Err(error) => refused(&error.to_string(), false),
                        }
                    }
                },
            };
            send(&mut stream, &answer)?;
        }
        Ok(())
    }

    fn status(&self) -> Status {
        let views = &self.views;
        let clones = views.clones.iter().map(|clone| {
            let (uncommitted_bytes, is_uncommitted) = clone.uncommitted();
            let images = clone.images.iter().filter(|(_, own)| own.is_own());
            let images = images.map(|(_, own)| own.file_name.clone());
            let files = clone.names().into_iter().map(|(name, _)| name);
            CloneStatus {
                base: clone.base_id().to_string(),
                writable: images
                    .chain(files)
                    .map(|name| views.shown.layout.shown(&name).to_owned())
                    .collect(),
                uncommitted_bytes,
                is_uncommitted,
                has_uncommitted_files: clone.files_differ(),
            }
        });
        Status {
            store: views.store.path().to_owned(),
            overlays: views.overlays().to_owned(),
            is_many: views.shown.count.is_some(),
            clones: clones.collect(),
        }
    }

    fn freeze(&self, number: u32) -> Result<Held<'_>, Answer> {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let (Some(clone), Some(committing)) =
            (self.views.clones.get(index), self.committing.get(index))
        else {
            return Err(refused("there is no such clone", false));
        };
        if committing.swap(true, Ordering::AcqRel) {
            return Err(refused(
                "another commit of it is under way; try again",
                true,
            ));
        }
        let frozen = clone.freeze();
        match frozen {
            Ok(frozen) => Ok(Held {
                clone,
                frozen,
                committing,
            }),
            Err(error) => {
                committing.store(false, Ordering::Release);
                Err(refused(&format!("it cannot be frozen: {error}"), false))
            }
        }
    }
}

fn refused(message: &str, busy: bool) -> Answer {
    Answer::Refused {
        message: message.to_owned(),
        busy,
    }
}

/// What is frozen for one connection.
struct Held<'a> {
    clone: &'a ViewClone,
    frozen: FrozenClone,
    committing: &'a AtomicBool,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.committing.store(false, Ordering::Release);
    }
}

impl Held<'_> {
    fn told(&self) -> FrozenView {
        let images = self
            .frozen
            .images
            .iter()
            .map(|(image, frozen)| FrozenImage {
                name: image.name.clone(),
                file_name: image.file_name.clone(),
                size_bytes: image.size_bytes,
                extents: frozen.changed().iter().map(sent).collect(),
            });
        let files = self.frozen.files.iter().map(|file| FrozenFileInfo {
            name: file.name.clone(),
            size_bytes: file.size_bytes,
            is_fresh: file.is_fresh,
            is_base: matches!(file.content, FrozenFile::Base),
        });
        FrozenView {
            base: self.frozen.base.to_string(),
            images: images.collect(),
            files: files.collect(),
        }
    }

    fn send_descriptors(&self, stream: &UnixStream) -> io::Result<()> {
        for (_, frozen) in &self.frozen.images {
            send_fd(stream, frozen.file())?;
        }
        for file in &self.frozen.files {
            if let FrozenFile::Own(file) = &file.content {
                send_fd(stream, file)?;
            }
        }
        Ok(())
    }
}
