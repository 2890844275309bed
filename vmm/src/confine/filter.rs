//! System calls, by what a thread is for. What a role may not make ends the process
//! (`SECCOMP_RET_KILL_PROCESS`), and its supervisor says so.
//!
//! Each thread makes and installs its own filter when it begins: none can be taken off,
//! and a thread that it starts inherits it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::OnceLock;

use seccompiler::apply_filter;

use super::program::compile;
use super::role::Role;
use super::rules::{self, Known};

/// What filters depend on, once this process is confined.
static KNOWN: OnceLock<Known> = OnceLock::new();

/// From here on threads that begin are filtered.
pub(super) fn prepare(proc: BorrowedFd<'_>) {
    share_one_heap();
    KNOWN.get_or_init(|| Known {
        pid: std::process::id(),
        proc: proc.as_raw_fd(),
    });
}

/// Whether this process is confined, so that threads that begin are filtered.
#[must_use]
pub fn is_confined() -> bool {
    KNOWN.get().is_some()
}

/// Has all threads allocate from the one heap of the program break.
///
/// The C library's heaps of single threads read a file of `/proc` when they first shrink
/// (glibc, `check_may_shrink_heap`), at a moment that nobody can tell before: no role may
/// open it. One heap is also less memory for each machine.
fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// From here on this thread makes the system calls of its role only, if the process is
/// confined.
///
/// A thread that cannot be filtered does not go on: it ends the process.
pub fn enter(role: Role) {
    let Some(known) = KNOWN.get() else {
        return;
    };
    let filtered = compile(&rules::of(role, known))
        .and_then(|program| apply_filter(&program).map_err(io::Error::other));
    if let Err(error) = filtered {
        eprintln!("error: cannot confine a thread ({role:?}): {error}");
        std::process::exit(1);
    }
}
