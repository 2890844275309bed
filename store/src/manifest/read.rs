//! Reading the manifest of a snapshot.

use crate::chunks::Chunks;
use crate::error::{Damage, Error, Result};
use crate::format::manifest::Malformed;
use crate::id::SnapshotId;
use crate::manifest::{MAX_LEN, Manifest};

/// Reads the manifest of a snapshot.
pub(crate) fn read(chunks: &Chunks, id: SnapshotId) -> Result<Manifest> {
    let mut bytes = vec![0; MAX_LEN];
    let len = chunks.read(id.chunk(), None, &mut bytes)?;
    Manifest::decode(&bytes[..len], chunks.page_size()).map_err(|malformed| match malformed {
        Malformed::Newer { version } => {
            let what = format!("the manifest of snapshot {} in version", id.short());
            Error::newer(chunks.path(), what, version)
        }
        Malformed::NewerField { number } => {
            let what = format!("the manifest of snapshot {} with field", id.short());
            Error::newer(chunks.path(), what, u32::from(number))
        }
        Malformed::Wrong(reason) => Damage::Manifest {
            snapshot: id.short(),
            reason,
        }
        .into(),
    })
}
