//! The one place where an overlay asks the kernel to have something on the disk, so that
//! tests know what a power cut leaves.

use std::fs::File;
use std::io;
use std::path::Path;

/// Has the data of a file on the disk, and its length. With debug assertions,
/// `SNAPSTORE_NO_OVERLAY_SYNC` has it fail.
///
/// # Errors
/// The operating system's.
pub fn sync_file(file: &File) -> io::Result<()> {
    #[cfg(test)]
    crate::tests::power::fails()?;
    #[cfg(debug_assertions)]
    if std::env::var_os("SNAPSTORE_NO_OVERLAY_SYNC").is_some() {
        return Err(rustix::io::Errno::IO.into());
    }
    file.sync_data()?;
    #[cfg(test)]
    crate::tests::power::synced(file);
    Ok(())
}

/// Has the names of a directory on the disk.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()?;
    #[cfg(test)]
    crate::tests::power::synced_dir(dir);
    Ok(())
}
