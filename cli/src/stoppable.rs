//! Pipes and the like that a command reads or writes for long: a signal stops it while
//! it waits for the other end, too.

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use snapstore_store::Cancel;

/// How long it may take until a signal is noticed.
const LOOKS_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// So much can be written to a pipe that has room, without waiting (pipe(7)).
const AT_ONCE_BYTES: usize = 4096;

/// One end of a pipe, or a file.
pub struct Stoppable {
    file: File,
    cancel: Cancel,
}

impl Stoppable {
    pub fn new(file: File, cancel: Cancel) -> Self {
        Self { file, cancel }
    }

    fn wait_for(&self, what: PollFlags) -> io::Result<()> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(io::Error::other("stopped by a signal"));
            }
            let mut descriptors = [PollFd::new(&self.file, what)];
            match poll(&mut descriptors, Some(&LOOKS_EVERY)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
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
