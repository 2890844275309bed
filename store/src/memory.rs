//! Memory that others take for us: whether there can be as much.
//!
//! RocksDB ends the process where it gets no memory, in the middle of whatever it
//! does, and so does the standard library. So before RocksDB is opened, and before
//! threads are started, it is looked at whether there is enough for all of them.

use std::io;
use std::thread;

use rustix::process::{Resource, getrlimit};

/// Address space that is enough for a program without threads.
const LEAST_BYTES: u64 = 256 << 20;
/// What each thread may add to that: its stack, and its part of the heap, for which
/// the allocator reserves 64 MiB at a multiple of as much.
const THREAD_BYTES: u64 = 128 << 20;
/// Threads beside one for each processor: those of RocksDB, and who writes packs.
const MORE_THREADS: u64 = 8;

/// Fails if so many bytes cannot be had at the same time, or if the process may
/// have less address space (`ulimit -v`) than its threads may take up. Every process
/// that opens the index has threads: RocksDB starts some even to read.
pub(crate) fn check(bytes: usize) -> io::Result<()> {
    let threads = thread::available_parallelism().map_or(1, usize::from) as u64;
    let needed = LEAST_BYTES + (threads + MORE_THREADS) * THREAD_BYTES;
    enough(getrlimit(Resource::As).current, needed)?;
    // Untouched, it takes address space only.
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| rustix::io::Errno::NOMEM.into())
}

fn enough(limit_bytes: Option<u64>, needed_bytes: u64) -> io::Result<()> {
    match limit_bytes {
        Some(limit) if limit < needed_bytes => Err(io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!(
                "this process may have {} KiB of address space (ulimit -v), and needs {}",
                limit >> 10,
                needed_bytes >> 10
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_there_is_is_no_error_and_too_much_is() {
        check(1 << 20).unwrap();
        let error = check(1 << 46).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn a_limit_is_named_with_what_is_needed() {
        enough(None, 1 << 30).unwrap();
        enough(Some(1 << 30), 1 << 30).unwrap();
        let error = enough(Some(40_000 << 10), 1 << 30).unwrap_err().to_string();
        assert!(
            error.contains("40000 KiB") && error.contains("1048576"),
            "{error}"
        );
    }
}
