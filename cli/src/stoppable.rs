//! Pipes and the like that a command reads or writes for long: a signal stops it while
//! it waits for the other end, too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use snapstore_store::Cancel;

/// How long it may take until a signal is noticed.
const LOOKS_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// How often it is tried whether there is a reader.
const RETRY: Duration = Duration::from_millis(50);
/// So much can be written to a pipe that has room, without waiting (pipe(7)).
const AT_ONCE_BYTES: usize = 4096;

/// Why a [`Stoppable`] failed that a signal stopped.
#[derive(Debug, thiserror::Error)]
#[error("stopped by a signal")]
pub struct Stopped;

/// Whether the error says so.
pub fn is_stopped(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
    causes.any(|cause: &io::Error| cause.get_ref().is_some_and(|inner| inner.is::<Stopped>()))
}

/// One end of a pipe, or a file.
pub struct Stoppable {
    file: File,
    cancel: Cancel,
}

impl Stoppable {
    pub fn new(file: File, cancel: Cancel) -> Self {
        Self { file, cancel }
    }

    /// Opens a file to read it. Of a named pipe, the first read waits for a writer.
    pub fn reads(path: &Path, cancel: Cancel) -> io::Result<Self> {
        let file = opened(File::options().read(true), path)?;
        Ok(Self { file, cancel })
    }

    /// Opens what is there to write to it. Waits for a reader of a named pipe.
    pub fn writes(path: &Path, cancel: Cancel) -> anyhow::Result<Self> {
        loop {
            match opened(File::options().write(true), path) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => {
                    cancel.check()?;
                    std::thread::sleep(RETRY);
                }
                file => {
                    return Ok(Self {
                        file: file?,
                        cancel,
                    });
                }
            }
        }
    }

    /// The file that it is.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn wait_for(&self, what: PollFlags) -> io::Result<()> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(io::Error::other(Stopped));
            }
            let mut descriptors = [PollFd::new(&self.file, what)];
            match poll(&mut descriptors, Some(&LOOKS_EVERY)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Without waiting in open(2), where a signal would not be noticed.
fn opened(options: &mut std::fs::OpenOptions, path: &Path) -> io::Result<File> {
    let at_once = OFlags::NONBLOCK.bits().cast_signed();
    let file = options.custom_flags(at_once).open(path)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

impl Read for Stoppable {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::IN)?;
        self.file.read(out)
    }
}

impl Write for Stoppable {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::OUT)?;
        self.file.write(&bytes[..bytes.len().min(AT_ONCE_BYTES)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
