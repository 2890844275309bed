//! Whether the holes of a diff tell which pages changed.
//!
//! A file says what it holds at the grain of its filesystem. Where that is coarser
//! than a page, or where a copy has filled the holes, data surrounds each changed
//! page that nobody wrote: zeros that would replace the parent's bytes. So the
//! grain is tried out where the file lies, with a file that is alike; where none
//! can be made, the file's own data has to show it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, OFlags};

use crate::commit::holes::seek_data;
use crate::error::{Error, Result};

/// What a diff has to tell apart: the smallest page of any store.
const PAGE_BYTES: u64 = 4096;
/// The length of the file that is tried: some huge pages, which are only used
/// where they fit into the file.
const TRIED_BYTES: u64 = 8 << 20;
/// The page of it that is written, at no multiple of a larger grain.
const TRIED_OFFSET: u64 = (2 << 20) + 5 * PAGE_BYTES;
/// How many pieces of data are looked at where nothing can be tried.
const PIECES_LOOKED_AT: usize = 1 << 16;

/// Refuses a diff that has no holes, or whose holes lie at a coarser grain than
/// that of a page.
pub(super) fn check(file: &File, path: &Path, size_bytes: u64) -> Result<()> {
    if !has_hole(file, path, size_bytes)? {
        return Err(Error::DiffWithoutHoles {
            path: path.to_owned(),
        });
    }
    let grain_bytes = match tried(file, path) {
        Some(grain_bytes) => grain_bytes,
        None => shown(file, path, size_bytes)?,
    };
    if grain_bytes > PAGE_BYTES {
        return Err(Error::DiffGrain {
            path: path.to_owned(),
            grain_bytes,
        });
    }
    Ok(())
}

fn has_hole(file: &File, path: &Path, size_bytes: u64) -> Result<bool> {
    let first = seek_data(file, path, 0)?;
    Ok(first.is_none_or(|data| data.start > 0 || data.end < size_bytes))
}

/// The grain of a file beside this one; `None` if none can be made there.
fn tried(file: &File, path: &Path) -> Option<u64> {
    let beside = beside(file, path)?;
    beside.set_len(TRIED_BYTES).ok()?;
    beside
        .write_all_at(&[1; PAGE_BYTES as usize], TRIED_OFFSET)
        .ok()?;
    let data = seek_data(&beside, path, 0).ok()??;
    Some(data.end - data.start)
}

/// An unnamed file on the same filesystem, made as the diff was.
fn beside(file: &File, path: &Path) -> Option<File> {
    // The file of a name under /proc/PID/fd is elsewhere, or nowhere.
    let path = fs::canonicalize(path).ok();
    let directory = path.as_deref().and_then(Path::parent);
    let made = directory.and_then(|directory| {
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(OFlags::TMPFILE.bits().cast_signed())
            .open(directory);
        unnamed.or_else(|_| named(directory)).ok()
    });
    let made = made.or_else(|| {
        let memory = rustix::fs::memfd_create("snapstore", MemfdFlags::CLOEXEC).ok()?;
        Some(File::from(memory))
    })?;
    // A single file can be mounted over a directory's.
    let device = |file: &File| file.metadata().map(|metadata| metadata.dev()).ok();
    (device(file).is_some() && device(file) == device(&made)).then_some(made)
}

/// Where filesystems make no unnamed files.
fn named(directory: &Path) -> std::io::Result<File> {
    let name = format!(
        ".snapstore-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let path: PathBuf = directory.join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

/// The largest number of bytes that all data of the file begins and ends at
/// multiples of: its grain or a multiple of it.
fn shown(file: &File, path: &Path, size_bytes: u64) -> Result<u64> {
    let mut common = 0;
    let mut from = 0;
    for _ in 0..PIECES_LOOKED_AT {
        let Some(data) = seek_data(file, path, from)? else {
            break;
        };
        common = greatest_common_divisor(common, data.start);
        if data.end < size_bytes {
            common = greatest_common_divisor(common, data.end);
        }
        if common != 0 && common <= PAGE_BYTES {
            break;
        }
        from = data.end;
    }
    // Of a file without data, or with data at its beginning up to its end, nothing
    // is known.
    Ok(common)
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(dir: &Path, size_bytes: u64, pages: &[u64]) -> (File, PathBuf) {
        let path = dir.join("diff");
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len(size_bytes).unwrap();
        for page in pages {
            file.write_all_at(&[7; 4096], page * PAGE_BYTES).unwrap();
        }
        (file, path)
    }

    #[test]
    fn a_diff_with_holes_of_a_page_is_accepted_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, path) = sparse(dir.path(), 1 << 20, &[3, 64]);
        assert_eq!(
            tried(&file, &path),
            Some(PAGE_BYTES),
            "of the test's directory"
        );
        check(&file, &path, 1 << 20).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_diff_without_holes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (file, path) = sparse(dir.path(), 8192, &[0, 1]);
        let error = check(&file, &path, 8192).unwrap_err();
        assert!(matches!(error, Error::DiffWithoutHoles { .. }), "{error}");
        // One that has nothing but holes changes nothing, which is fine.
        let (file, path) = sparse(dir.path(), 8192, &[]);
        check(&file, &path, 8192).unwrap();
    }

    #[test]
    fn the_data_of_a_file_shows_its_grain() {
        let dir = tempfile::tempdir().unwrap();
        let huge: Vec<u64> = (512..1024).collect();
        let (file, path) = sparse(dir.path(), 16 << 20, &huge);
        assert_eq!(shown(&file, &path, 16 << 20).unwrap(), 2 << 20);
        let (file, path) = sparse(dir.path(), 16 << 20, &[&huge[..], &[2001]].concat());
        assert_eq!(shown(&file, &path, 16 << 20).unwrap(), PAGE_BYTES);
        let (file, path) = sparse(dir.path(), 16 << 20, &[]);
        assert_eq!(shown(&file, &path, 16 << 20).unwrap(), 0);
    }

    #[test]
    fn a_file_in_memory_is_tried_by_another_one() {
        let file = rustix::fs::memfd_create("diff", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[7; 4096], 8192).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert!(tried(&file, Path::new(&path)).is_some());
    }
}
