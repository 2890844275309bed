//! A disk: a file, read only, written in place, or under a private overlay.
//!
//! An overlay (`snapstore_overlay`) keeps what the guest writes in an unnamed file of its
//! own, by blocks of 4 KiB. It lives as long as the machine: nothing of it is durable but
//! by a commit of the machine, so that a flush has nothing to do.
//!
//! Only a disk that does not change its file can be frozen. Absent on purpose:
//! image formats. A disk's file is the disk's bytes.

mod frozen;
#[cfg(test)]
mod tests;
mod under;

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{Error, Result};
pub use frozen::FrozenDisk;
use snapstore_overlay::{Budget, Overlay};
pub use snapstore_overlay::{
    Content, Extent, MAX_IMAGE_BYTES as MAX_DISK_BYTES, MOST_LAYERS as MOST_OVERLAY_LAYERS,
};
pub use under::DISK_BLOCK_BYTES;
use under::Under;

/// The unit of a disk's size in bytes, virtio 1.2, section 5.2.4.
pub(super) const SECTOR_BYTES: u64 = 512;

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    name: String,
    under: Under,
    access: Access,
    /// How often the disk was frozen.
    freezes: AtomicU64,
}

enum Access {
    ReadOnly,
    InPlace,
    Overlay(Box<Mutex<Overlay>>),
}

impl Disk {
    /// A disk that is only read.
    ///
    /// # Errors
    /// Its size is not one of a disk, or a machine writes to it in place.
    pub fn read_only(name: &str, file: File) -> Result<Self> {
        Self::open(name, file, Access::ReadOnly)
    }

    /// A disk whose file the guest writes to. It cannot be frozen.
    ///
    /// # Errors
    /// Its size is not one of a disk, or another machine uses it.
    pub fn in_place(name: &str, file: File) -> Result<Self> {
        Self::open(name, file, Access::InPlace)
    }

    /// A disk over a file that does not change, neither by the guest nor, while
    /// this lives, by anyone else. What the guest writes goes to an unnamed file
    /// in `directory`.
    ///
    /// # Errors
    /// Its size is not one of a disk, a machine writes to it in place, or there
    /// can be no file in the directory.
    pub fn overlay(name: &str, base: File, directory: &Path) -> Result<Self> {
        Self::limited_overlay(name, base, directory, None)
    }

    /// As [`Disk::overlay`], with at most so many bytes of what the guest wrote at a time,
    /// and what commits still read of it. Beyond that, and where the directory's
    /// filesystem is nearly full, writing fails with `StorageFull`.
    ///
    /// # Errors
    /// As there.
    pub fn limited_overlay(
        name: &str,
        base: File,
        directory: &Path,
        limit_bytes: Option<u64>,
    ) -> Result<Self> {
        let file = tempfile::tempfile_in(directory).map_err(|source| Error::File {
            action: "make an overlay in",
            path: directory.to_owned(),
            source,
        })?;
        let overlay = |size_bytes| {
            let budget = Budget::new(limit_bytes);
            Access::Overlay(Box::new(Mutex::new(Overlay::new(file, size_bytes, budget))))
        };
        Self::open_with(name, base, FlockOperation::NonBlockingLockShared, overlay)
    }

    fn open(name: &str, base: File, access: Access) -> Result<Self> {
        let lock = match access {
            Access::InPlace => FlockOperation::NonBlockingLockExclusive,
            Access::ReadOnly | Access::Overlay(_) => FlockOperation::NonBlockingLockShared,
        };
        Self::open_with(name, base, lock, |_| access)
    }

    /// `access` is given the disk's size in bytes.
    fn open_with(
        name: &str,
        mut base: File,
        lock: FlockOperation,
        access: impl FnOnce(u64) -> Access,
    ) -> Result<Self> {
        let failed = |action| {
            move |source: io::Error| Error::Disk {
                name: name.to_owned(),
                action,
                source,
            }
        };
        // By seeking, which tells the size of a block device, too.
        let bytes = base.seek(SeekFrom::End(0)).map_err(failed("examine"))?;
        if !(1..=MAX_DISK_BYTES).contains(&bytes) || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::DiskSize {
                name: name.to_owned(),
                bytes,
            });
        }
        match flock(&base, lock) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::DiskBusy {
                    name: name.to_owned(),
                });
            }
            Err(error) => return Err(failed("lock")(error.into())),
        }
        let metadata = base.metadata().map_err(failed("examine"))?;
        let modified = metadata
            .is_file()
            .then(|| (metadata.mtime(), metadata.mtime_nsec()));
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            under: Under {
                base: Arc::new(base),
                size_bytes: bytes,
                modified,
            },
            access: access(bytes),
            freezes: AtomicU64::new(0),
        })))
    }

    /// Its name: of the image in a snapshot, and what the guest is told.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its size in bytes, a multiple of 512.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.0.under.size_bytes
    }

    /// Whether writing is refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        matches!(self.0.access, Access::ReadOnly)
    }

    /// Whether it can be part of a snapshot.
    #[must_use]
    pub fn can_freeze(&self) -> bool {
        !matches!(self.0.access, Access::InPlace)
    }

    /// Reads.
    ///
    /// # Errors
    /// Past the end, or the file cannot be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let under = &self.0.under;
        checked_end(under.size_bytes, offset, bytes.len() as u64)?;
        match &self.0.access {
            Access::ReadOnly | Access::InPlace => under.base.read_exact_at(bytes, offset),
            Access::Overlay(overlay) => lock(overlay).read(under.bytes(), offset, bytes),
        }
    }

    /// Writes.
    ///
    /// # Errors
    /// Past the end, a read-only disk, or the file cannot be written; then any
    /// part may be written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let under = &self.0.under;
        checked_end(under.size_bytes, offset, bytes.len() as u64)?;
        match &self.0.access {
            Access::ReadOnly => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Access::InPlace => under.base.write_all_at(bytes, offset),
            Access::Overlay(overlay) => lock(overlay).write(under.bytes(), offset, bytes),
        }
    }

    /// Makes bytes zeros, and gives the host's room for them back where it can.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let under = &self.0.under;
        checked_end(under.size_bytes, offset, length)?;
        match &self.0.access {
            _ if length == 0 => Ok(()),
            Access::ReadOnly => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Access::InPlace => zero_in_place(&under.base, offset, length),
            Access::Overlay(overlay) => lock(overlay).zero(under.bytes(), offset, length),
        }
    }

    /// Makes what was written durable; of an overlay nothing is.
    ///
    /// # Errors
    /// The operating system's.
    pub fn flush(&self) -> io::Result<()> {
        match &self.0.access {
            Access::ReadOnly | Access::Overlay(_) => Ok(()),
            Access::InPlace => self.0.under.base.sync_data(),
        }
    }

    /// The disk at this instant. Takes a time that does not depend on how much
    /// was written. The device must not be working: the machine is paused.
    ///
    /// # Errors
    /// [`Error::DiskInPlace`].
    pub fn freeze(&self) -> Result<FrozenDisk> {
        let inner = &*self.0;
        let number = inner.freezes.fetch_add(1, Ordering::Relaxed) + 1;
        let overlay = match &inner.access {
            Access::ReadOnly => None,
            Access::InPlace => {
                return Err(Error::DiskInPlace {
                    name: inner.name.clone(),
                });
            }
            Access::Overlay(overlay) => {
                let frozen = lock(overlay).freeze(number);
                Some(frozen.map_err(|source| Error::Disk {
                    name: inner.name.clone(),
                    action: "freeze",
                    source,
                })?)
            }
        };
        Ok(FrozenDisk {
            name: inner.name.clone(),
            size_bytes: inner.under.size_bytes,
            base_modified: inner.under.modified,
            number,
            base: inner.under.base.clone(),
            overlay,
        })
    }

    /// A commit of the freeze of this number ([`FrozenDisk::number`]) is durable: what
    /// it listed as changed is listed no more. A freeze for which this is never said
    /// leaves all to the next. While the frozen disk lives, this copies the map of all
    /// that was ever written.
    pub fn committed(&self, number: u64) {
        if let Access::Overlay(overlay) = &self.0.access {
            lock(overlay).committed(number);
        }
    }
}

/// The end of the bytes, if the disk has them all.
fn checked_end(size_bytes: u64, offset: u64, length: u64) -> io::Result<u64> {
    let end = offset.checked_add(length);
    end.filter(|end| *end <= size_bytes)
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Bytes that are written where zeros have to be.
const ZEROS: &[u8] = &[0; 64 << 10];

fn zero_in_place(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match retry_on_intr(|| fallocate(file, flags, offset, length)) {
        Ok(()) => return Ok(()),
        // A filesystem or a device that cannot, or not so small a part.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let piece = usize::try_from(end - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        file.write_all_at(&ZEROS[..piece], at)?;
        at += piece as u64;
    }
    Ok(())
}

fn lock(overlay: &Mutex<Overlay>) -> MutexGuard<'_, Overlay> {
    overlay.lock().unwrap_or_else(PoisonError::into_inner)
}
