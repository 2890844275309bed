//! Many machine processes from one: fork(2) without exec.
//!
//! The processes share this program's relocated and initialised pages, which an
//! exec for each would make anew.

use crate::error::{Error, OsContext as _, Result};

/// Calls `child` in `count` new processes, with their numbers from 0; what it
/// returns is the process's exit code. Returns the children's process ids.
///
/// # Errors
/// The calling process has more than one thread (a child would inherit the
/// others' locks, but not the threads that open them), or fork(2) fails; the
/// children so far then run on.
pub fn fork_each(count: usize, child: impl Fn(usize) -> u8) -> Result<Vec<i32>> {
    let threads = std::fs::read_dir("/proc/self/task")
        .os("count this process's threads")?
        .count();
    if threads != 1 {
        return Err(Error::Threads { threads });
    }
    let mut children = Vec::new();
    for number in 0..count {
        // SAFETY: this process has a single thread, so that the child finds
        // every lock free and every structure whole.
        match unsafe { libc::fork() } {
            -1 => {
                return Err(std::io::Error::last_os_error()).os("start a machine's process");
            }
            0 => std::process::exit(child(number).into()),
            pid => children.push(pid),
        }
    }
    Ok(children)
}
