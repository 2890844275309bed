//! An input file: its length, its data and its holes, read by position.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::error::{Error, IoContext as _, Result};
use crate::manifest::{ImageRole, MAX_IMAGE_BYTES};
use crate::page::PageSize;

/// The longest attached file (VM state and the like).
const MAX_FILE_BYTES: u64 = 1 << 30;

pub(crate) struct Source {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    /// The extent found last. On some filesystems finding the end of an extent
    /// takes time in proportion to its length, and leaves ask again and again.
    extent: Mutex<Range<u64>>,
}

impl Source {
    /// Opens an input and checks its length.
    pub fn open(path: &Path, role: ImageRole, page_size: PageSize) -> Result<Self> {
        // Before opening: to open a named pipe would wait for its writer.
        if !fs::metadata(path).context("open", path)?.is_file() {
            return Err(Error::NotAFile {
                path: path.to_owned(),
            });
        }
        let file = File::open(path).context("open", path)?;
        let metadata = file.metadata().context("inspect", path)?;
        let size_bytes = metadata.len();
        let path = path.to_owned();
        if size_bytes == 0 || size_bytes > MAX_IMAGE_BYTES {
            return Err(Error::ImageSize { path, size_bytes });
        }
        if role == ImageRole::File {
            if size_bytes > MAX_FILE_BYTES {
                return Err(Error::TooLarge {
                    path,
                    size_bytes,
                    limit_bytes: MAX_FILE_BYTES,
                });
            }
        } else if size_bytes % page_size.bytes() != 0 {
            return Err(Error::PartialPage {
                path,
                size_bytes,
                page_bytes: page_size.bytes(),
            });
        }
        Ok(Self {
            file,
            path,
            size_bytes,
            extent: Mutex::new(0..0),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The first data at or after `from`: where it begins and ends.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.size_bytes {
            return Ok(None);
        }
        let mut extent = self.extent.lock().unwrap_or_else(PoisonError::into_inner);
        if extent.contains(&from) {
            return Ok(Some(from..extent.end));
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(errno) => return Err(errno).context("find data in", &self.path),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))
            .context("find a hole in", &self.path)?;
        if start >= self.size_bytes {
            return Ok(None);
        }
        *extent = start..end.min(self.size_bytes);
        Ok(Some(extent.clone()))
    }

    /// Fills `out` from `offset` on; bytes beyond the end of the file are zero
    /// if `offset + out.len()` is in its last page.
    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        let inside =
            usize::try_from(self.size_bytes - offset).map_or(out.len(), |n| n.min(out.len()));
        let (data, padding) = out.split_at_mut(inside);
        padding.fill(0);
        match self.file.read_exact_at(data, offset) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(self.changed()),
            other => other.context("read", &self.path),
        }
    }

    /// Fails if the file has another length than at the beginning.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().context("inspect", &self.path)?.len();
        if now == self.size_bytes {
            Ok(())
        } else {
            Err(self.changed())
        }
    }

    /// The error for an input that is not what it was when it was first read.
    pub fn changed(&self) -> Error {
        Error::InputChanged {
            path: self.path.clone(),
        }
    }
}
