//! Images that a caller reads in a way of its own.

use std::fmt;
use std::io;
use std::ops::Range;

/// An image to commit that is read by position, from several threads at once: a
/// memory mapping, a file in another format, a snapshot of another store
/// ([`crate::ImageReader`] is one).
///
/// ```
/// use std::io;
/// use std::sync::Arc;
///
/// use snapstore_store::{
///     CommitRequest, ImageRole, Input, InputData, InputKind, PageSize, ReadAt, Silent, Store,
/// };
///
/// /// A page of ones at the beginning of 1 MiB of zeros.
/// #[derive(Debug)]
/// struct Ones;
///
/// impl ReadAt for Ones {
///     fn size_bytes(&self) -> u64 {
///         1 << 20
///     }
///
///     fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()> {
///         for (at, byte) in (offset_bytes..).zip(out) {
///             *byte = u8::from(at < 4096);
///         }
///         Ok(())
///     }
///
///     fn next_data(&self, from_bytes: u64) -> io::Result<Option<std::ops::Range<u64>>> {
///         Ok((from_bytes < 4096).then_some(from_bytes..4096))
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let committed = store.commit(
///     &CommitRequest {
///         tag: "ones".to_owned(),
///         inputs: vec![Input {
///             name: "memory".to_owned(),
///             role: ImageRole::Memory,
///             data: InputData::Reader(Arc::new(Ones)),
///             kind: InputKind::Full,
///         }],
///         ..CommitRequest::default()
///     },
///     &Silent,
/// )?;
/// assert_eq!(committed.manifest.images[0].nonzero_pages, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait ReadAt: fmt::Debug + Send + Sync {
    /// The image's length. Looked at once.
    fn size_bytes(&self) -> u64;

    /// Fills `out` with the bytes from `offset_bytes` on, all of which are inside of
    /// the image. Holes are zeros. Each part is read once, in no order, and by several threads
    /// at a time.
    ///
    /// # Errors
    /// The commit fails with [`crate::Error::InputLost`].
    fn read_exact_at(&self, out: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// The first data at or after `from_bytes`: where it begins, not before
    /// `from_bytes`, and where it ends. More data may begin there. All else is a hole,
    /// which is never read but beside data in the same page. Without this method
    /// everything is data.
    ///
    /// # Errors
    /// As [`ReadAt::read_exact_at`].
    fn next_data(&self, from_bytes: u64) -> io::Result<Option<Range<u64>>> {
        let size_bytes = self.size_bytes();
        Ok((from_bytes < size_bytes).then_some(from_bytes..size_bytes))
    }
}
