//! Processes by fork(2) without exec, and processes of machines that execute a program and
//! begin in a control group.
//!
//! Those that are forked share this program's relocated and initialised pages, which an
//! exec for each would make anew.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::confine::Made;
use crate::error::{Error, OsContext as _, Result};

/// linux/sched.h; Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Calls `child` in `count` new processes, with their numbers from 0; what it
/// returns is the process's exit code. Adds the children's process ids to `children`.
///
/// # Errors
/// The calling process has more than one thread (a child would inherit the
/// others' locks, but not the threads that open them), or fork(2) fails; the
/// children so far then run on, and have been added.
pub fn fork_each(count: usize, child: impl Fn(usize) -> u8, children: &mut Vec<i32>) -> Result<()> {
    has_one_thread()?;
    for number in 0..count {
        children.push(fork(|| child(number)).os("start a machine's process")?);
    }
    Ok(())
}

/// Calls `child` in a new process; what it returns is the process's exit code. Returns the
/// process id.
///
/// # Errors
/// The calling process has more than one thread, or fork(2) fails.
pub fn fork_one(child: impl FnOnce() -> u8) -> Result<i32> {
    has_one_thread()?;
    fork(child).os("start a process")
}

/// Refuses a process with several threads.
pub(crate) fn has_one_thread() -> Result<()> {
    let threads = std::fs::read_dir("/proc/self/task")
        .os("count this process's threads")?
        .count();
    match threads {
        1 => Ok(()),
        _ => Err(Error::Threads { threads }),
    }
}

/// The exit code of a child that has panicked, as of any program in Rust.
const PANICKED: u8 = 101;

/// For a process with one thread.
fn fork(child: impl FnOnce() -> u8) -> io::Result<i32> {
    // SAFETY: this process has a single thread, so that the child finds
    // every lock free and every structure whole.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // What the caller has on its stack is not the child's to drop.
            let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(PANICKED);
            std::process::exit(code.into())
        }
        pid => Ok(pid),
    }
}

/// Starts `program` with these arguments, its name the first of them, and this process's
/// environment and inheritable descriptors. It begins in the group, where the kernel can do
/// that; otherwise the group is removed, and it begins where this process is. Returns its
/// process id.
///
/// # Errors
/// There can be no more processes. That the program cannot be executed is seen by its exit
/// code, 127.
pub fn execute_in(group: Option<Made>, program: &CStr, arguments: &[CString]) -> Result<i32> {
    let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|one| one.as_ptr()).collect();
    pointers.push(std::ptr::null());
    if let Some(group) = group {
        match clone_and_execute(Some(&group), program, &pointers) {
            Ok(pid) => return Ok(pid),
            Err(_) => group.discard(),
        }
    }
    clone_and_execute(None, program, &pointers).os("start a machine's process")
}

/// `arguments` ends with a null pointer.
fn clone_and_execute(
    group: Option<&Made>,
    program: &CStr,
    arguments: &[*const libc::c_char],
) -> io::Result<i32> {
    // SAFETY: without CLONE_VM the child has a copy of this memory, and calls nothing but execv
    // and _exit, which need no lock; `arguments` ends with a null pointer; `clone_args` is
    // numbers, of which zero means that nothing is asked for.
    unsafe {
        let pid = match group {
            // Some containers have no clone3.
            None => i64::from(libc::fork()),
            Some(group) => {
                let mut how: libc::clone_args = std::mem::zeroed();
                how.flags = CLONE_INTO_CGROUP;
                how.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
                how.cgroup = u64::from(group.fd().as_raw_fd().unsigned_abs());
                let bytes = size_of::<libc::clone_args>();
                libc::syscall(libc::SYS_clone3, &raw mut how, bytes)
            }
        };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                libc::execv(program.as_ptr(), arguments.as_ptr());
                libc::_exit(127)
            }
            pid => Ok(i32::try_from(pid).expect("process ids are small")),
        }
    }
}
