//! System calls, by what a thread is for. What a role may not make ends the process
//! (`SECCOMP_RET_KILL_PROCESS`), and its supervisor says so.
//!
//! The filters are made while the process is confined, and each thread installs its own
//! when it begins: none can be taken off, and a thread that it starts inherits it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::OnceLock;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

use super::refused::refused;
use super::role::Role;
use super::rules::{self, Known};
use crate::error::Result;

/// By role, what its threads install, in this order.
static PROGRAMS: OnceLock<BTreeMap<Role, Vec<BpfProgram>>> = OnceLock::new();

/// Makes the filters of this process, which has one thread.
pub(super) fn prepare(proc: BorrowedFd<'_>) -> Result<()> {
    share_one_heap();
    let known = Known {
        pid: std::process::id(),
        proc: proc.as_raw_fd(),
    };
    let mut programs = BTreeMap::new();
    for role in Role::ALL {
        programs.insert(
            role,
            compile(role, &known).map_err(refused("make a filter"))?,
        );
    }
    PROGRAMS.get_or_init(|| programs);
    Ok(())
}

/// Whether this process is confined, so that threads that begin are filtered.
#[must_use]
pub fn is_confined() -> bool {
    PROGRAMS.get().is_some()
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

fn compile(role: Role, known: &Known) -> io::Result<Vec<BpfProgram>> {
    let mut programs = Vec::new();
    if rules::starts_threads(role) {
        // Its flags are in memory, where no filter sees them: the C library then does
        // the same by `clone`.
        let missing = u32::try_from(libc::ENOSYS).map_err(io::Error::other)?;
        programs.push(program(
            [(libc::SYS_clone3, Vec::new())].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(missing),
        )?);
    }
    programs.push(program(
        rules::of(role, known)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
    )?);
    Ok(programs)
}

fn program(
    rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>>,
    otherwise: SeccompAction,
    named: SeccompAction,
) -> io::Result<BpfProgram> {
    SeccompFilter::new(rules, otherwise, named, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

/// From here on this thread makes the system calls of its role only, if the process is
/// confined.
///
/// A thread that cannot be filtered does not go on: it ends the process.
pub fn enter(role: Role) {
    let Some(programs) = PROGRAMS.get() else {
        return;
    };
    for program in &programs[&role] {
        if let Err(error) = apply_filter(program) {
            eprintln!("error: cannot confine a thread ({role:?}): {error}");
            std::process::exit(1);
        }
    }
}
