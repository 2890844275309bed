//! The seam without an observer: nothing.

use std::io;
use std::path::Path;

use super::{Fault, StepKind};

#[inline]
pub(crate) const fn on(_: Fault) -> bool {
    false
}

#[inline]
pub(crate) fn before(_: StepKind, _: &Path) -> io::Result<()> {
    Ok(())
}

#[inline]
pub(crate) fn reads(_: &Path, _: u64, _: usize) -> io::Result<()> {
    Ok(())
}

#[inline]
pub(crate) const fn pack_chunks() -> Option<usize> {
    None
}

#[inline]
pub(crate) fn changed(_: &Path) {}

#[inline]
pub(crate) fn synced_file(_: &Path) {}

#[inline]
pub(crate) fn synced_dir(_: &Path) {}

#[inline]
pub(crate) fn locked(_: &Path) {}

#[inline]
pub(crate) fn released(_: &Path) {}

/// Waits until a lock may be free again. False: there is no simulator, and the
/// caller has to wait by itself.
#[inline]
pub(crate) fn wait_for(_: &Path) -> io::Result<bool> {
    Ok(false)
}

#[inline]
pub(crate) const fn is_simulated() -> bool {
    false
}

#[inline]
pub(crate) const fn process_id() -> Option<u32> {
    None
}

#[inline]
pub(crate) const fn now_unix_seconds() -> Option<u64> {
    None
}
