//! Threads that others start for us: whether there can be any.
//!
//! RocksDB ends the process, or hangs, where it cannot start a thread, and rayon
//! panics. So before either does, as many are started here, which end at once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{IoContext as _, Result};
use crate::{memory, patience};

/// As many threads as RocksDB starts when it is first opened, and a few more.
const OF_AN_INDEX: usize = 4;
static INDEX_HAS_THREADS: AtomicBool = AtomicBool::new(false);
const STACK_BYTES: usize = 64 << 10;
/// What a commit takes for its buffers, besides the threads.
const POOL_BYTES: usize = 64 << 20;

/// Fails if the threads that RocksDB needs cannot be started.
pub(crate) fn check_for_index(path: &Path) -> Result<()> {
    match INDEX_HAS_THREADS.load(Ordering::Relaxed) {
        true => Ok(()),
        false => check_threads(OF_AN_INDEX, STACK_BYTES).context("start threads for", path),
    }
}

/// RocksDB has been opened: its threads stay as long as the process.
pub(crate) fn index_is_open() {
    INDEX_HAS_THREADS.store(true, Ordering::Relaxed);
}

/// Starts the threads that share the work of commits and verifications.
pub(crate) fn start_pool(path: &Path) -> Result<()> {
    memory::check(POOL_BYTES).context("get memory for", path)?;
    match rayon::ThreadPoolBuilder::new()
        .start_handler(|_| patience::at_start_of_thread())
        .build_global()
    {
        Ok(()) => Ok(()),
        Err(error) => match std::error::Error::source(&error) {
            // It has been started before.
            None => Ok(()),
            Some(source) => Err(as_io(source)).context("start threads for", path),
        },
    }
}

fn as_io(source: &(dyn std::error::Error + 'static)) -> std::io::Error {
    let errno = source
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::raw_os_error);
    errno.map_or_else(
        || std::io::Error::other(source.to_string()),
        std::io::Error::from_raw_os_error,
    )
}

/// Whether so many more threads with stacks of this size can be there at the same time: so many
/// are started, and end.
///
/// # Errors
/// What the operating system says of the first that cannot be started.
pub fn check_threads(count: usize, stack_bytes: usize) -> std::io::Result<()> {
    let gate = Mutex::new(());
    thread::scope(|scope| {
        // Held until all are there.
        let _closed = gate.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..count {
            thread::Builder::new()
                .stack_size(stack_bytes)
                .spawn_scoped(scope, || drop(gate.lock()))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_there_can_be_are_no_error() {
        check_threads(3, STACK_BYTES).unwrap();
        start_pool(Path::new("store")).unwrap();
        start_pool(Path::new("store")).unwrap();
    }
}
