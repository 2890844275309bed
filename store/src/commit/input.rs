//! What a commit reads: whole files, parts of files, bytes.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::commit::read_at::ReadAt;
use crate::error::{Error, Result};
use crate::manifest::ImageRole;

/// Extents begin and end at multiples of this: the smallest page of any store.
/// Only the end of an image may be none.
const EXTENT_GRAIN_BYTES: u64 = 4096;

/// What holes of an input mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputKind {
    /// The whole image: holes are zeros.
    Full,
    /// Changes to the parent's image of this name: holes are the parent's bytes.
    /// Data that is zero is zero. A file must have holes, on a filesystem that
    /// keeps them apart from data at the grain of 4096 bytes: else data that
    /// nobody wrote would replace the parent's bytes.
    Diff,
    /// The same of a file whose data is all meant, however it came to be there.
    DenseDiff,
}

impl InputKind {
    /// Whether holes are the parent's bytes.
    #[must_use]
    pub fn is_diff(self) -> bool {
        matches!(self, Self::Diff | Self::DenseDiff)
    }
}

/// One image to commit.
#[derive(Clone, Debug)]
pub struct Input {
    /// The image's name in the snapshot.
    pub name: String,
    /// What it is.
    pub role: ImageRole,
    /// Where its bytes are now.
    pub data: InputData,
    /// What its holes mean.
    pub kind: InputKind,
}

/// Where the bytes of an input are. None of it may change during the commit.
#[derive(Clone, Debug)]
pub enum InputData {
    /// A regular file, which is the image. Its holes are those of the file.
    File(PathBuf),
    /// Parts of files, which need not be regular: `/proc/PID/mem` will do, and
    /// `/dev/zero` for zeros. All outside of the extents is a hole. Nothing but
    /// the extents is read, and the time taken follows their bytes, not the
    /// image's length.
    Extents {
        /// Read with pread(2), by several threads.
        files: Vec<Arc<File>>,
        /// What messages call it.
        label: String,
        /// The length of the image.
        size_bytes: u64,
        /// Which parts of the image are where in the files: in the order of their
        /// place in the image, not overlapping there, inside the image, and
        /// at multiples of 4096 bytes of it whatever the store's page size is; only
        /// the image's end may be no such multiple.
        extents: Vec<Extent>,
    },
    /// The image itself. It has no holes.
    Bytes(Arc<[u8]>),
    /// Whatever the caller reads it from. Its holes are what it says.
    Reader(Arc<dyn ReadAt>),
}

/// A part of an image, and where its bytes are.
///
/// ```
/// use std::sync::Arc;
///
/// use snapstore_store::{
///     CommitRequest, Extent, ImageRole, Input, InputData, InputKind, PageSize, Silent, Store,
/// };
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// # let path = dir.path().join("pages");
/// # std::fs::write(&path, [7; 8192])?;
/// // The file's second page is the image's tenth; all others are zero.
/// let data = InputData::Extents {
///     files: vec![Arc::new(std::fs::File::open(path)?)],
///     label: "the frozen memory".to_owned(),
///     size_bytes: 1 << 20,
///     extents: vec![Extent {
///         image_offset: 9 * 4096,
///         file: 0,
///         file_offset: 4096,
///         length: 4096,
///     }],
/// };
/// let request = CommitRequest {
///     tag: "base".to_owned(),
///     inputs: vec![Input {
///         name: "memory".to_owned(),
///         role: ImageRole::Memory,
///         data,
///         kind: InputKind::Full,
///     }],
///     ..CommitRequest::default()
/// };
/// let committed = store.commit(&request, &Silent)?;
/// assert_eq!(committed.manifest.images[0].nonzero_pages, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Where it begins in the image, in bytes.
    pub image_offset: u64,
    /// The file it is in, by its place in the list of files.
    pub file: usize,
    /// Where it begins in the file, in bytes.
    pub file_offset: u64,
    /// How many bytes it has.
    pub length: u64,
}

impl Extent {
    /// Where it ends in the image. Checked extents end inside of it.
    pub(crate) fn image_end(&self) -> u64 {
        self.image_offset + self.length
    }
}

/// Checks the rules of [`InputData::Extents`].
pub(crate) fn check_extents(
    label: &str,
    size_bytes: u64,
    files: usize,
    extents: &[Extent],
) -> Result<()> {
    let mut previous_end = 0;
    for (number, extent) in extents.iter().enumerate() {
        let image_end = extent.image_offset.checked_add(extent.length);
        let file_end = extent.file_offset.checked_add(extent.length);
        let aligned = |bytes: u64| bytes.is_multiple_of(EXTENT_GRAIN_BYTES);
        let problem = if extent.file >= files {
            Some("is in a file that is not in the list")
        } else if extent.length == 0 {
            Some("is empty")
        } else if !aligned(extent.image_offset)
            || !aligned(extent.length) && image_end != Some(size_bytes)
        {
            Some("does not begin and end at multiples of 4096 bytes")
        } else if image_end.is_none_or(|end| end > size_bytes) {
            Some("ends beyond the image")
        } else if file_end.is_none_or(|end| i64::try_from(end).is_err()) {
            Some("ends beyond what a file can hold")
        } else if extent.image_offset < previous_end {
            Some("begins before the one before it ends; extents are sorted and do not overlap")
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(Error::BadExtent {
                label: label.to_owned(),
                number,
                image_offset: extent.image_offset,
                length: extent.length,
                problem,
            });
        }
        previous_end = extent.image_end();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(image_offset: u64, file_offset: u64, length: u64) -> Extent {
        Extent {
            image_offset,
            file: 0,
            file_offset,
            length,
        }
    }

    #[test]
    fn sorted_extents_that_may_touch_are_accepted() {
        let extents = [
            extent(0, 1 << 46, 4096),
            extent(4096, 7, 8192),
            extent(61440, 7, 4096),
        ];
        check_extents("memory", 65536, 1, &extents).unwrap();
        check_extents("memory", 65536, 1, &[]).unwrap();
    }

    #[test]
    fn the_last_one_may_end_where_the_image_does() {
        check_extents("disk", 8192 + 512, 1, &[extent(8192, 0, 512)]).unwrap();
        check_extents("disk", 8192 + 512, 1, &[extent(4096, 0, 512)]).unwrap_err();
    }

    #[test]
    fn each_rule_is_named_when_it_is_broken() {
        let max = u64::MAX - 4095;
        for (extents, says) in [
            (vec![extent(0, 0, 0)], "is empty"),
            (vec![extent(512, 0, 4096)], "multiples of 4096"),
            (vec![extent(0, 0, 4097)], "multiples of 4096"),
            (vec![extent(61440, 0, 8192)], "beyond the image"),
            (vec![extent(max, 0, 8192)], "beyond the image"),
            (vec![extent(0, u64::MAX, 4096)], "beyond what a file"),
            (vec![extent(0, i64::MAX as u64, 4096)], "beyond what a file"),
            (vec![extent(0, 0, 8192), extent(4096, 0, 4096)], "extent 1 "),
            (vec![extent(8192, 0, 4096), extent(0, 0, 4096)], "sorted"),
        ] {
            let error = check_extents("memory", 65536, 1, &extents).unwrap_err();
            assert!(matches!(error, Error::BadExtent { .. }), "{extents:?}");
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
