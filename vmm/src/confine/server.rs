//! What the server of a mount never does once the mount is made.
//!
//! It reads a store of its user's, takes leases, logs, and undoes its mount at the end, with
//! threads that a library starts as it needs them: a list of what it may do would be
//! guesswork, so this is a list of what it may not. Users other than root undo mounts by a
//! program that is setuid, which a filtered process cannot execute: theirs are not filtered.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::refused;
use crate::error::Result;

/// Executing, other processes, new rights and namespaces, mounts other than its own's end,
/// and the kernel's less tried parts.
const FORBIDDEN: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_modify_ldt,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Families of sockets by which a network is reached: netlink tells which addresses there
/// are (getaddrinfo(3)).
const NETWORK: [i32; 3] = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// From here on these calls, and sockets other than UNIX ones, end this process, whichever
/// of its threads makes them; a server that reads over the network keeps the sockets for
/// that. Returns whether that is so: only for root's.
///
/// # Errors
/// The kernel refuses the filter.
pub fn forbid_for_server(reaches_network: bool) -> Result<bool> {
    if !rustix::process::geteuid().is_root() {
        return Ok(false);
    }
    let action = "forbid system calls";
    let network = NETWORK.iter().filter(|_| reaches_network);
    let allowed = std::iter::once(&libc::AF_UNIX).chain(network);
    let others = allowed
        .map(|family| {
            let family = u64::try_from(*family).map_err(std::io::Error::other)?;
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
                .map_err(std::io::Error::other)
        })
        .collect::<std::io::Result<Vec<_>>>()
        .and_then(|conditions| SeccompRule::new(conditions).map_err(std::io::Error::other))
        .map_err(refused(action))?;
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        FORBIDDEN.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, vec![others]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter
        .and_then(BpfProgram::try_from)
        .map_err(std::io::Error::other)
        .map_err(refused(action))?;
    apply_filter_all_threads(&program)
        .map_err(std::io::Error::other)
        .map_err(refused(action))?;
    Ok(true)
}
