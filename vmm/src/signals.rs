//! What a machine's process does when memory under the monitor itself goes away.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use crate::error::{OsContext as _, Result};

/// The exit code of a process whose guest memory went away.
pub const MEMORY_LOST_EXIT_CODE: i32 = 1;

const MESSAGE: &[u8] = b"error: guest memory can no longer be read: the server of the \
mounted snapshot ended or met damaged data\n";

/// Ends the process when one of its threads panics: a machine that has lost a vCPU or a
/// device would be waited for without end. What happened is said on standard error.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("a thread");
        let words = format!("error: a fault of this program, in {thread}: {panic}\n");
        // Without a place for it there is nobody to tell.
        let _ = io::Write::write_all(&mut io::stderr(), words.replace(":\n", ": ").as_bytes());
        // SAFETY: ends the process, whatever it holds.
        unsafe { libc::_exit(PANICKED_EXIT_CODE) }
    }));
}

/// The exit code of a process one of whose threads has panicked.
pub const PANICKED_EXIT_CODE: i32 = 101;

/// Where a test can have a thread panic: in builds with debug assertions,
/// `SNAPSTORE_PANIC_IN` names the thread.
#[cfg(debug_assertions)]
pub(crate) fn may_panic(thread: &str) {
    static PANIC_IN: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("SNAPSTORE_PANIC_IN").ok());
    assert!(PANIC_IN.as_deref() != Some(thread), "asked to panic");
}

#[cfg(not(debug_assertions))]
pub(crate) fn may_panic(_thread: &str) {}

/// From here on this process's memory is not merged with equal pages of others (KSM),
/// whatever it inherited: how long a write takes would tell what those hold.
pub fn forbid_merging() {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    // SAFETY: a setting of this process; no pointers. A kernel before 6.4 or without KSM
    // refuses it, and merges nothing that is not asked for by `madvise`.
    unsafe {
        libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0);
    }
}

/// A file that would get longer than this process may make one (`RLIMIT_FSIZE`) is an
/// error of whoever writes it, and not the end of the process (SIGXFSZ). For a process that
/// executes no other program, which would inherit that.
///
/// # Errors
/// The operating system refuses it.
pub fn outlive_long_files() -> Result<()> {
    // SAFETY: no handler of this program's, nor of another's, is there for this signal.
    let before = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error()).os("ignore the signal of files that are too long");
    }
    Ok(())
}

/// Ends the process with a message on standard error when it reads mapped memory
/// whose file cannot be read any more (SIGBUS), instead of a silent death.
///
/// # Errors
/// The operating system refuses the handler.
pub fn end_on_lost_memory() -> Result<()> {
    extern "C" fn end(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: both are async-signal-safe; the buffer is a constant.
        unsafe {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(MEMORY_LOST_EXIT_CODE);
        }
    }
    register_signal_handler(libc::SIGBUS, end)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
        .os("handle lost memory")
}
