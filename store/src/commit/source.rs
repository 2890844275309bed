//! An input being read: its length, its data and its holes, read by position.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::commit::grain;
use crate::commit::holes::seek_data;
use crate::commit::input::{Extent, Input, InputData, InputKind, check_extents};
use crate::commit::read_at::ReadAt;
use crate::commit::unchanging::Unchanging;
use crate::error::{Error, IoContext as _, Result};
use crate::manifest::{ImageRole, MAX_IMAGE_BYTES, SECTOR_BYTES};
use crate::page::PageSize;

/// The longest attached file (VM state and the like).
const MAX_FILE_BYTES: u64 = 1 << 30;

/// An input that fits the store.
pub(crate) struct Source<'a> {
    data: Data<'a>,
    /// The file's path, or what messages call the input.
    path: PathBuf,
    size_bytes: u64,
}

enum Data<'a> {
    File {
        file: Unchanging,
        /// The extent found last. On some filesystems finding the end of an extent
        /// takes time in proportion to its length, and leaves ask again and again.
        found: Mutex<Range<u64>>,
    },
    Extents {
        files: &'a [Arc<File>],
        label: &'a str,
        extents: &'a [Extent],
    },
    Bytes(&'a [u8]),
    Reader(&'a dyn ReadAt),
}

impl<'a> Source<'a> {
    /// Opens an input and checks its length.
    pub fn open(input: &'a Input, page_size: PageSize) -> Result<Self> {
        let (data, path, size_bytes) = match &input.data {
            InputData::File(path) => {
                let (file, size_bytes) = open_file(path)?;
                if input.kind == InputKind::Diff {
                    grain::check(file.file(), path, size_bytes)?;
                }
                let found = Mutex::new(0..0);
                (Data::File { file, found }, path.clone(), size_bytes)
            }
            InputData::Extents {
                files,
                label,
                size_bytes,
                extents,
            } => {
                let data = Data::Extents {
                    files,
                    label,
                    extents,
                };
                (data, label.into(), *size_bytes)
            }
            InputData::Bytes(bytes) => {
                let path = input.name.clone().into();
                (Data::Bytes(bytes), path, bytes.len() as u64)
            }
            InputData::Reader(reader) => {
                let path = input.name.clone().into();
                (Data::Reader(&**reader), path, reader.size_bytes())
            }
        };
        check_size(&path, size_bytes, input.role, page_size)?;
        if let Data::Extents {
            files,
            label,
            extents,
        } = &data
        {
            check_extents(label, size_bytes, files.len(), extents)?;
        }
        Ok(Self {
            data,
            path,
            size_bytes,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The first data at or after `from`: where it begins and ends. More data
    /// may begin where it ends.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.size_bytes {
            return Ok(None);
        }
        match &self.data {
            Data::File { file, found } => {
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                if !found.contains(&from) {
                    let Some(next) = seek_data(file.file(), &self.path, from)? else {
                        return Ok(None);
                    };
                    if next.start >= self.size_bytes {
                        return Ok(None);
                    }
                    *found = next.start..next.end.min(self.size_bytes);
                }
                Ok(Some(found.start.max(from)..found.end))
            }
            Data::Extents { extents, .. } => {
                let next = extents.get(first_after(extents, from));
                Ok(next.map(|extent| extent.image_offset.max(from)..extent.image_end()))
            }
            Data::Bytes(_) => Ok(Some(from..self.size_bytes)),
            Data::Reader(reader) => {
                let next = reader
                    .next_data(from)
                    .map_err(|source| self.lost(from, source))?;
                let Some(next) = next.filter(|next| next.start < self.size_bytes) else {
                    return Ok(None);
                };
                if next.start < from || next.end <= next.start {
                    let problem = io::Error::other("it says that data ends before it begins");
                    return Err(self.lost(from, problem));
                }
                Ok(Some(next.start..next.end.min(self.size_bytes)))
            }
        }
    }

    /// Fills `out` from `offset` on; holes are zero, and so are bytes beyond the
    /// end of the image if `offset + out.len()` is in its last page.
    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        let inside =
            usize::try_from(self.size_bytes - offset).map_or(out.len(), |n| n.min(out.len()));
        let (data, padding) = out.split_at_mut(inside);
        padding.fill(0);
        match &self.data {
            Data::File { file, .. } => match file.file().read_exact_at(data, offset) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(self.changed()),
                other => other.context("read", &self.path),
            },
            Data::Extents {
                files,
                label,
                extents,
            } => read_extents(files, label, extents, data, offset),
            Data::Bytes(bytes) => {
                let start = usize::try_from(offset).expect("bytes are in memory");
                data.copy_from_slice(&bytes[start..start + inside]);
                Ok(())
            }
            Data::Reader(reader) => {
                let read = reader.read_exact_at(data, offset);
                read.map_err(|source| self.lost(offset, source))
            }
        }
    }

    /// Fails if a file is not what it was at the beginning.
    pub fn check_unchanged(&self) -> Result<()> {
        match &self.data {
            Data::File { file, .. } => file.check(),
            Data::Extents { .. } | Data::Bytes(_) | Data::Reader(_) => Ok(()),
        }
    }

    fn lost(&self, offset_bytes: u64, source: io::Error) -> Error {
        Error::InputLost {
            label: self.path.display().to_string(),
            offset_bytes,
            source,
        }
    }

    /// The error for an input that is not what it was when it was first read.
    fn changed(&self) -> Error {
        Error::InputChanged {
            path: self.path.clone(),
        }
    }
}

fn open_file(path: &Path) -> Result<(Unchanging, u64)> {
    // Before opening: to open a named pipe would wait for its writer.
    let file_type = fs::metadata(path).context("open", path)?.file_type();
    if !file_type.is_file() {
        return Err(Error::NotAFile {
            path: path.to_owned(),
            what: what_it_is(file_type),
        });
    }
    let file = File::open(path).context("open", path)?;
    let metadata = file.metadata().context("inspect", path)?;
    Ok((Unchanging::now(Arc::new(file), path)?, metadata.len()))
}

fn what_it_is(file_type: fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else if file_type.is_socket() {
        "a socket"
    } else if file_type.is_block_device() {
        "a block device; copy it to a file first"
    } else {
        "a device"
    }
}

fn check_size(path: &Path, size_bytes: u64, role: ImageRole, page_size: PageSize) -> Result<()> {
    let path = path.to_owned();
    if size_bytes == 0 {
        return Err(Error::EmptyInput { path });
    }
    if size_bytes > MAX_IMAGE_BYTES {
        return Err(Error::ImageSize { path, size_bytes });
    }
    let grain_bytes = match role {
        ImageRole::Memory => page_size.bytes(),
        ImageRole::Disk => SECTOR_BYTES,
        ImageRole::File if size_bytes > MAX_FILE_BYTES => {
            return Err(Error::TooLarge {
                path,
                size_bytes,
                limit_bytes: MAX_FILE_BYTES,
            });
        }
        ImageRole::File => 1,
    };
    if !size_bytes.is_multiple_of(grain_bytes) {
        return Err(Error::PartialPage {
            path,
            size_bytes,
            what: match role {
                ImageRole::Disk => "a disk's sectors of",
                ImageRole::Memory | ImageRole::File => "the store's page size of",
            },
            grain_bytes,
        });
    }
    Ok(())
}

/// The number of the first extent that ends after `offset`.
fn first_after(extents: &[Extent], offset: u64) -> usize {
    extents.partition_point(|extent| extent.image_end() <= offset)
}

/// Reads a part of the image that begins at `offset`.
fn read_extents(
    files: &[Arc<File>],
    label: &str,
    extents: &[Extent],
    out: &mut [u8],
    offset: u64,
) -> Result<()> {
    let end = offset + out.len() as u64;
    let in_out = |at: u64| usize::try_from(at - offset).expect("it is inside the buffer");
    let mut position = offset;
    for extent in &extents[first_after(extents, offset)..] {
        let start = extent.image_offset.max(position);
        if start >= end {
            break;
        }
        let stop = extent.image_end().min(end);
        out[in_out(position)..in_out(start)].fill(0);
        let at = extent.file_offset + (start - extent.image_offset);
        files[extent.file]
            .read_exact_at(&mut out[in_out(start)..in_out(stop)], at)
            .map_err(|error| Error::InputLost {
                label: label.to_owned(),
                offset_bytes: start,
                source: match error.kind() {
                    ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "nothing is there"),
                    _ => error,
                },
            })?;
        position = stop;
    }
    out[in_out(position)..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB_4: u64 = 4096;

    /// Blocks 1, 2 and 5 of eight; the file has block n of the image filled with n.
    fn extents(file: File) -> Input {
        let extent = |image, file, blocks| Extent {
            image_offset: image * KIB_4,
            file: 0,
            file_offset: file * KIB_4,
            length: blocks * KIB_4,
        };
        Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Extents {
                files: vec![Arc::new(file)],
                label: "a copy".to_owned(),
                size_bytes: 8 * KIB_4,
                extents: vec![extent(1, 2, 1), extent(2, 1, 1), extent(5, 0, 1)],
            },
            kind: InputKind::Full,
        }
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        for (at, fill) in [5, 2, 1].into_iter().enumerate() {
            file.write_all_at(&[fill; 4096], at as u64 * KIB_4).unwrap();
        }
        file
    }

    #[test]
    fn extents_are_data_and_all_else_is_a_hole() {
        let input = extents(file());
        let source = Source::open(&input, PageSize::KIB_16).unwrap();
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(data) = source.next_data(from).unwrap() {
            from = data.end;
            found.push((data.start / KIB_4, data.end / KIB_4));
        }
        assert_eq!(found, [(1, 2), (2, 3), (5, 6)]);
        assert_eq!(source.next_data(5000).unwrap(), Some(5000..8192));
        let mut out = vec![9; 8 * 4096];
        source.read_exact_at(&mut out, 0).unwrap();
        let blocks: Vec<u8> = out.chunks(4096).map(|block| block[7]).collect();
        assert_eq!(blocks, [0, 1, 2, 0, 0, 5, 0, 0]);
        let mut out = vec![9; 8000];
        source.read_exact_at(&mut out, 3 * KIB_4 - 2).unwrap();
        assert_eq!(out[..4], [2, 2, 0, 0]);
        assert!(out[2..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn extents_can_be_in_several_files() {
        let mut input = extents(file());
        if let InputData::Extents { files, extents, .. } = &mut input.data {
            files.push(Arc::new(File::open("/dev/zero").unwrap()));
            extents[1].file = 1;
        }
        let source = Source::open(&input, PageSize::KIB_4).unwrap();
        let mut out = vec![9; 4 * 4096];
        source.read_exact_at(&mut out, 0).unwrap();
        let blocks: Vec<u8> = out.chunks(4096).map(|block| block[7]).collect();
        assert_eq!(blocks, [0, 1, 0, 0]);
        assert_eq!(
            source.next_data(2 * KIB_4).unwrap(),
            Some(2 * KIB_4..3 * KIB_4)
        );
    }

    #[test]
    fn a_file_that_has_shrunk_is_lost() {
        let file = file();
        file.set_len(2 * KIB_4).unwrap();
        let input = extents(file);
        let source = Source::open(&input, PageSize::KIB_4).unwrap();
        source.read_exact_at(&mut [0; 4096], 2 * KIB_4).unwrap();
        let error = source.read_exact_at(&mut [0; 4096], KIB_4).unwrap_err();
        assert!(matches!(error, Error::InputLost { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("a copy went away"), "{message}");
        assert!(message.contains("try again"), "{message}");
    }

    #[test]
    fn bytes_are_all_data_and_padded_to_a_page() {
        let input = Input {
            name: "vmstate".to_owned(),
            role: ImageRole::File,
            data: InputData::Bytes(vec![7; 5000].into()),
            kind: InputKind::Full,
        };
        let source = Source::open(&input, PageSize::KIB_4).unwrap();
        assert_eq!(source.next_data(4096).unwrap(), Some(4096..5000));
        let mut out = vec![9; 4096];
        source.read_exact_at(&mut out, 4096).unwrap();
        assert!(out[..904].iter().all(|byte| *byte == 7));
        assert!(out[904..].iter().all(|byte| *byte == 0));
    }
}
