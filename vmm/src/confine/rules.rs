//! The system calls of each [`Role`]: those that the tests are seen to need, with
//! arguments where they are few.
//!
//! What no role has is what an attacker needs next: to execute, to open files by
//! descriptors other than that of its own `/proc`, sockets other than UNIX ones, memory
//! that can be executed, other processes, new rights, namespaces or mounts.

use std::mem::size_of;

use kvm_bindings as kvm;

use super::program::Argument::{self, Is, IsLong, Lacks};
use super::program::{Rules, Verdict};
use super::role::Role;

/// Numbers of this process.
pub(super) struct Known {
    pub pid: u32,
    /// The descriptor of its `/proc`.
    pub proc: i32,
}

/// The rules of a role.
pub(super) fn of(role: Role, known: &Known) -> Rules {
    let mut rules = Allowed::default();
    rules.thread(known);
    match role {
        Role::Main => {
            rules.devices();
            rules.resuming();
            // Lets go of the pipe to who started it.
            rules.plain(&[libc::SYS_dup2]);
        }
        Role::Vcpu => {
            rules.devices();
            rules.ioctls(&[KVM_RUN]);
            // Whether the code that it could not run can still be read.
            rules.ioctls(&[KVM_GET_REGS, KVM_TRANSLATE]);
            let look = u32_of(libc::MADV_POPULATE_READ);
            rules.with(libc::SYS_madvise, &[Is(2, look)]);
        }
        Role::Control => {
            rules.devices();
            rules.resuming();
            rules.clients();
            rules.threads();
            rules.looking(known);
            rules.freezing();
            rules.standing_still();
        }
        Role::Vsock => {
            rules.sockets();
            rules.interrupts();
        }
        Role::Net => {
            rules.frames();
            rules.interrupts();
        }
        Role::Watch => {
            rules.devices();
            rules.resuming();
        }
        Role::Agent => {
            rules.sockets();
            rules.plain(&[libc::SYS_setsockopt]);
        }
    }
    rules.0
}

#[derive(Default)]
struct Allowed(Rules);

impl Allowed {
    /// Calls with whatever arguments.
    fn plain(&mut self, calls: &[i64]) {
        for call in calls {
            self.0.insert(number(*call), Verdict::Allow);
        }
    }

    /// A call with these arguments; those named before stay allowed.
    fn with(&mut self, call: i64, arguments: &[Argument]) {
        let none = || Verdict::If(Vec::new());
        if let Verdict::If(any) = self.0.entry(number(call)).or_insert_with(none) {
            any.push(arguments.to_vec());
        }
    }

    /// A call that is not there.
    fn missing(&mut self, call: i64) {
        self.0.insert(number(call), Verdict::Fail(ENOSYS));
    }

    fn ioctls(&mut self, requests: &[u32]) {
        for request in requests {
            self.with(libc::SYS_ioctl, &[Is(1, *request)]);
        }
    }

    /// What every thread does: memory, locks, time, its log, its end.
    fn thread(&mut self, known: &Known) {
        self.plain(&[
            libc::SYS_brk,
            // Where the vDSO cannot tell the time: by the host's clock source.
            libc::SYS_clock_gettime,
            libc::SYS_clock_nanosleep,
            libc::SYS_close,
            libc::SYS_exit,
            libc::SYS_exit_group,
            libc::SYS_futex,
            libc::SYS_getpid,
            libc::SYS_getrandom,
            libc::SYS_gettid,
            libc::SYS_mremap,
            libc::SYS_munmap,
            libc::SYS_read,
            libc::SYS_restart_syscall,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_sched_getaffinity,
            // A channel of the standard library whose other end is at work.
            libc::SYS_sched_yield,
            libc::SYS_sigaltstack,
            libc::SYS_write,
        ]);
        let given_back = u32_of(libc::MADV_DONTNEED);
        for advice in [given_back, GUARD_INSTALL, GUARD_REMOVE] {
            self.with(libc::SYS_madvise, &[Is(2, advice)]);
        }
        // Nothing becomes code.
        self.with(libc::SYS_mmap, &[Lacks(2, u32_of(libc::PROT_EXEC))]);
        self.with(libc::SYS_mprotect, &[Lacks(2, u32_of(libc::PROT_EXEC))]);
        for command in [libc::F_GETFD, libc::F_DUPFD_CLOEXEC] {
            self.with(libc::SYS_fcntl, &[Is(1, u32_of(command))]);
        }
        // The log, which is standard error, is made anew when it is full.
        for call in [libc::SYS_pread64, libc::SYS_ftruncate] {
            self.with(call, &[Is(0, u32_of(libc::STDERR_FILENO))]);
        }
        // Signals to its own threads.
        self.with(libc::SYS_tgkill, &[Is(0, known.pid)]);
    }

    /// New threads, and what they do at their beginning.
    fn threads(&mut self) {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID;
        self.with(libc::SYS_clone, &[IsLong(0, u64_of(flags))]);
        self.with(libc::SYS_prctl, &[Is(0, u32_of(libc::PR_SET_NAME))]);
        // Its flags are in memory, where no filter sees them: the C library then does
        // the same by `clone`.
        self.missing(libc::SYS_clone3);
        self.plain(&[libc::SYS_rseq, libc::SYS_set_robust_list]);
    }

    /// Working on the queues of any device, on the thread that notifies it.
    fn devices(&mut self) {
        self.interrupts();
        self.sockets();
        self.frames();
        // Disks.
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.with(libc::SYS_fallocate, &[Is(1, u32_of(punch))]);
        self.plain(&[
            libc::SYS_fdatasync,
            libc::SYS_fstatfs,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
        ]);
    }

    fn interrupts(&mut self) {
        self.ioctls(&[KVM_IRQ_LINE]);
    }

    /// UNIX sockets: the guest's, to the host.
    fn sockets(&mut self) {
        self.with(libc::SYS_socket, &[Is(0, u32_of(libc::AF_UNIX))]);
        self.ioctls(&[FIONBIO]);
        self.plain(&[
            libc::SYS_accept4,
            libc::SYS_connect,
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_pwait,
            libc::SYS_ppoll,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ]);
    }

    /// A tap, which is read and written.
    fn frames(&mut self) {
        self.plain(&[libc::SYS_epoll_ctl, libc::SYS_epoll_pwait]);
    }

    /// The machine's clients.
    fn clients(&mut self) {
        self.plain(&[
            libc::SYS_accept4,
            libc::SYS_getsockopt,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_setsockopt,
        ]);
    }

    /// Letting the vCPUs run.
    fn resuming(&mut self) {
        self.ioctls(&[KVM_KVMCLOCK_CTRL, KVM_SET_CLOCK]);
    }

    /// Files of its own `/proc`: of itself, and of its frozen copies.
    fn looking(&mut self, known: &Known) {
        self.plain(&[libc::SYS_lseek, libc::SYS_statx]);
        self.with(libc::SYS_openat, &[Is(0, known.proc.cast_unsigned())]);
    }

    /// Freezing: KVM's state, what was written, the frozen child, files for its committer.
    fn freezing(&mut self) {
        self.ioctls(&SAVED);
        self.ioctls(&WRITTEN);
        let flags = u32_of(libc::O_CLOEXEC | USER_MODE_ONLY);
        self.with(libc::SYS_userfaultfd, &[Is(0, flags)]);
        self.with(libc::SYS_clone, &[IsLong(0, u64_of(libc::CLONE_PIDFD))]);
        self.with(libc::SYS_pidfd_send_signal, &[Is(1, u32_of(libc::SIGKILL))]);
        self.with(libc::SYS_waitid, &[Is(0, libc::P_PIDFD)]);
        self.with(libc::SYS_memfd_create, &[Is(1, libc::MFD_CLOEXEC)]);
        self.with(libc::SYS_pipe2, &[Is(1, u32_of(libc::O_CLOEXEC))]);
        self.plain(&[libc::SYS_ftruncate]);
    }

    /// The frozen child, before it waits.
    fn standing_still(&mut self) {
        self.with(libc::SYS_dup2, &[Is(1, 0)]);
        self.with(libc::SYS_close_range, &[Is(0, 1), Is(2, 0)]);
    }
}

fn number(call: i64) -> u32 {
    u32::try_from(call).expect("numbers of calls are small")
}

const fn u32_of(value: i32) -> u32 {
    value.cast_unsigned()
}

const fn u64_of(value: i32) -> u64 {
    value.cast_unsigned() as u64
}

/// KVM's requests, linux/kvm.h.
const fn request(direction: u32, number: u32, bytes: usize) -> u32 {
    const KVMIO: u32 = 0xae;
    direction << 30 | (bytes as u32) << 16 | KVMIO << 8 | number
}
const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// linux/sockios.h and linux/fcntl.h do not have it in `libc` as a number of 32 bits.
const FIONBIO: u32 = 0x5421;
/// Guard pages of threads' stacks, from glibc 2.42 on: MADV_GUARD_INSTALL and
/// MADV_GUARD_REMOVE of linux/mman.h.
const GUARD_INSTALL: u32 = 102;
const GUARD_REMOVE: u32 = 103;
/// linux/userfaultfd.h.
const USER_MODE_ONLY: i32 = 1;

const ENOSYS: u16 = libc::ENOSYS as u16;

const KVM_RUN: u32 = request(NONE, 0x80, 0);
const KVM_GET_REGS: u32 = request(READ, 0x81, size_of::<kvm::kvm_regs>());
const KVM_TRANSLATE: u32 = request(READ | WRITE, 0x85, size_of::<kvm::kvm_translation>());
const KVM_IRQ_LINE: u32 = request(WRITE, 0x61, size_of::<kvm::kvm_irq_level>());
const KVM_KVMCLOCK_CTRL: u32 = request(NONE, 0xad, 0);
const KVM_SET_CLOCK: u32 = request(WRITE, 0x7b, size_of::<kvm::kvm_clock_data>());

/// Reading a machine's state. Nothing of it is set any more.
const SAVED: [u32; 15] = [
    request(READ | WRITE, 0x62, size_of::<kvm::kvm_irqchip>()),
    request(READ, 0x9f, size_of::<kvm::kvm_pit_state2>()),
    request(READ, 0x7c, size_of::<kvm::kvm_clock_data>()),
    KVM_GET_REGS,
    request(READ, 0x83, size_of::<kvm::kvm_sregs>()),
    request(READ | WRITE, 0x88, size_of::<kvm::kvm_msrs>()),
    request(READ, 0x8e, size_of::<kvm::kvm_lapic_state>()),
    request(READ | WRITE, 0x91, size_of::<kvm::kvm_cpuid2>()),
    request(READ, 0x98, size_of::<kvm::kvm_mp_state>()),
    request(READ, 0x9f, size_of::<kvm::kvm_vcpu_events>()),
    request(READ, 0xa1, size_of::<kvm::kvm_debugregs>()),
    request(NONE, 0xa3, 0),
    // Before Linux 5.17, which has 0xcf.
    request(READ, 0xa4, size_of::<kvm::kvm_xsave>()),
    request(READ, 0xa6, size_of::<kvm::kvm_xcrs>()),
    request(READ, 0xcf, size_of::<kvm::kvm_xsave>()),
];

/// Which pages were written: UFFDIO_API, UFFDIO_REGISTER, PAGEMAP_SCAN.
const WRITTEN: [u32; 3] = [0xc018_aa3f, 0xc020_aa00, 0xc060_6610];
