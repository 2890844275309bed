//! Reading an image through the maps that lie over its base.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::base::BLOCK_BYTES;
use crate::map::{Map, Place};

/// Where a run of bytes is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Zeros,
    Base,
    /// In the overlay's file, at this offset.
    Overlay(u64),
}

/// The bytes of a block from `at` to the end of the block or to `end`.
pub(crate) fn piece(at: u64, end: u64) -> (u64, u64) {
    let block = at / BLOCK_BYTES;
    (block, end.min((block + 1) * BLOCK_BYTES) - at)
}

/// The end of the bytes, if the image has them all.
pub(crate) fn checked_end(size_bytes: u64, offset: u64, length: u64) -> io::Result<u64> {
    let end = offset.checked_add(length);
    end.filter(|end| *end <= size_bytes)
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Reads from the newest of the maps that knows a block; what none knows is filled by
/// `from_base`, which is given a run of bytes and its offset in the image.
pub(crate) fn read(
    newest_first: &[&Map],
    overlay: &File,
    size_bytes: u64,
    offset: u64,
    mut bytes: &mut [u8],
    from_base: &mut dyn FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let end = checked_end(size_bytes, offset, bytes.len() as u64)?;
    let mut at = offset;
    while at < end {
        let source = source(newest_first, at);
        let (_, mut length) = piece(at, end);
        while at + length < end {
            if self::source(newest_first, at + length) != source.after(length) {
                break;
            }
            length += piece(at + length, end).1;
        }
        let length_here = usize::try_from(length).map_err(io::Error::other)?;
        let (run, rest) = bytes.split_at_mut(length_here);
        match source {
            Source::Zeros => run.fill(0),
            Source::Base => from_base(run, at)?,
            Source::Overlay(file_offset) => overlay.read_exact_at(run, file_offset)?,
        }
        bytes = rest;
        at += length;
    }
    Ok(())
}

fn source(newest_first: &[&Map], at: u64) -> Source {
    let block = at / BLOCK_BYTES;
    match newest_first.iter().find_map(|map| map.get(block)) {
        None => Source::Base,
        Some(Place::Zeros) => Source::Zeros,
        Some(Place::Slot(slot)) => Source::Overlay(slot.offset() + at % BLOCK_BYTES),
    }
}

impl Source {
    /// Where the run would go on.
    fn after(self, length: u64) -> Self {
        match self {
            Self::Overlay(file_offset) => Self::Overlay(file_offset + length),
            other => other,
        }
    }
}
