//! Where a file has data, and where holes.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::error::{IoContext as _, Result};

/// The first data of a file at or after `from`.
pub(super) fn seek_data(file: &File, path: &Path, from: u64) -> Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno).context("find data in", path),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start)).context("find a hole in", path)?;
    Ok(Some(start..end))
}
