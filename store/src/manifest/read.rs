//! Reading the manifest of a snapshot.

use std::path::Path;

use crate::chunks::Chunks;
use crate::error::{Damage, Error, Result};
use crate::format::manifest::Malformed;
use crate::id::SnapshotId;
use crate::manifest::{MAX_LEN, Manifest};
use crate::page::PageSize;

/// Reads the manifest of a snapshot.
pub(crate) fn read(chunks: &Chunks, id: SnapshotId) -> Result<Manifest> {
    let mut bytes = vec![0; MAX_LEN];
    let len = chunks.read(id.chunk(), None, &mut bytes)?;
    decode(&bytes[..len], chunks.page_size(), id, chunks.path())
}

/// Decodes the manifest of a snapshot, which comes from `path`.
pub(crate) fn decode(
    bytes: &[u8],
    page_size: PageSize,
    id: SnapshotId,
    path: &Path,
) -> Result<Manifest> {
    let newer = |what: &str, number| {
        let what = format!("the manifest of snapshot {} {what}", id.short());
        Error::newer(path, what, number)
    };
    Manifest::decode(bytes, page_size).map_err(|malformed| match malformed {
        Malformed::Newer { version } => newer("in version", version),
        Malformed::NewerField { number } => newer("with field", number.into()),
        Malformed::Wrong(reason) => Damage::Manifest {
            snapshot: id.short(),
            reason,
        }
        .into(),
    })
}
