//! Files that must stay as they are while a commit reads them.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, IoContext as _, Result};

/// A file that must not change until a snapshot is set. Only regular files are
/// watched, by their length and the time of their last change: others tell
/// neither.
#[derive(Clone, Debug)]
pub struct Unchanging {
    file: Arc<File>,
    label: PathBuf,
    since: Option<FileState>,
}

/// The length of a regular file, and when it was last changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileState {
    /// The length in bytes.
    pub size_bytes: u64,
    /// Seconds since 1970 of the last change.
    pub modified_seconds: i64,
    /// Nanoseconds of that.
    pub modified_nanoseconds: i64,
}

impl FileState {
    /// The present state of a file; `None` if it is not a regular one.
    ///
    /// # Errors
    /// The operating system's.
    pub fn of(file: &File) -> std::io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        Ok(metadata.is_file().then(|| Self {
            size_bytes: metadata.len(),
            modified_seconds: metadata.mtime(),
            modified_nanoseconds: metadata.mtime_nsec(),
        }))
    }
}

impl Unchanging {
    /// A file as it is now; messages call it `label`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn now(file: Arc<File>, label: impl Into<PathBuf>) -> Result<Self> {
        let label = label.into();
        let since = FileState::of(&file).context("inspect", &label)?;
        Ok(Self { file, label, since })
    }

    /// Fails if the file is not what it was.
    pub(crate) fn check(&self) -> Result<()> {
        match FileState::of(&self.file).context("inspect", &self.label)? {
            now if now == self.since => Ok(()),
            _ => Err(Error::InputChanged {
                path: self.label.clone(),
            }),
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn another_length_or_time_is_a_change() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(8192).unwrap();
        let watched = Unchanging::now(file.clone(), "the disk").unwrap();
        watched.check().unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        let error = watched.check().unwrap_err();
        assert!(error.to_string().contains("the disk changed"), "{error}");
        let watched = Unchanging::now(file.clone(), "the disk").unwrap();
        file.set_len(4096).unwrap();
        assert!(watched.check().is_err());
        let watched = Unchanging::now(file.clone(), "the disk").unwrap();
        file.set_modified(std::time::SystemTime::now()).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        assert!(watched.check().is_err());
    }
}
