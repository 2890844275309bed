//! What a machine's process does when memory under the monitor itself goes away.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use crate::error::{OsContext as _, Result};

/// The exit code of a process whose guest memory went away.
pub const MEMORY_LOST_EXIT_CODE: i32 = 1;

const MESSAGE: &[u8] = b"error: guest memory can no longer be read: the server of the \
mounted snapshot ended or met damaged data\n";

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
