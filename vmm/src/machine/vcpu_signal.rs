//! Getting a vCPU out of the guest, and keeping it out of frozen copies.
//!
//! `KVM_RUN` returns when a signal arrives, but a signal that arrives just
//! before the call would be lost; so the `immediate_exit` byte of the vCPU's
//! shared page is set first (KVM API documentation, "KVM_RUN"). KVM looks at it
//! only after it finished what the last exit left pending (the value of an IN,
//! the data of an MMIO read), so a vCPU that left with EINTR has nothing open.

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::{OsContext as _, Result};
use crate::proc;

/// Makes one vCPU leave the guest.
pub(crate) struct VcpuSignal {
    immediate_exit: *const AtomicU8,
    /// The `pthread_t` of the vCPU's thread; 0 before it began.
    thread: AtomicU64,
    /// The kernel's number of it; 0 before it began.
    thread_id: AtomicI32,
}

// SAFETY: the pointer is only used for atomic access to one byte, which stays
// mapped as long as the vCPU's descriptor lives (`VcpuSignal::new`).
unsafe impl Send for VcpuSignal {}
// SAFETY: as above.
unsafe impl Sync for VcpuSignal {}

impl VcpuSignal {
    /// For this vCPU. Whoever keeps it keeps the vCPU, too: the machine
    /// holds both and uses the signals only while it has the vCPUs.
    ///
    /// Also keeps the vCPU's shared page, `shared_bytes` long, out of children:
    /// a mapping of it would keep the machine alive after its process ended.
    ///
    /// # Errors
    /// The operating system refuses the advice.
    pub fn new(vcpu: &mut VcpuFd, shared_bytes: usize) -> Result<Self> {
        let run: *mut kvm_bindings::kvm_run = vcpu.get_kvm_run();
        // SAFETY: the range is the mapping that kvm-ioctls made of the vCPU's
        // descriptor; the advice changes nothing for this process.
        let advised = unsafe { libc::madvise(run.cast(), shared_bytes, libc::MADV_DONTFORK) };
        if advised != 0 {
            return Err(io::Error::last_os_error()).os("keep a vCPU out of frozen copies");
        }
        // SAFETY: `run` points to a mapped kvm_run.
        let byte = unsafe { &raw mut (*run).immediate_exit };
        Ok(Self {
            immediate_exit: byte.cast::<AtomicU8>(),
            thread: AtomicU64::new(0),
            thread_id: AtomicI32::new(0),
        })
    }

    /// Says that the calling thread is the vCPU's.
    pub fn attach_thread(&self) {
        // SAFETY: has no preconditions.
        let thread: libc::pthread_t = unsafe { libc::pthread_self() };
        self.thread.store(thread, Ordering::SeqCst);
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        self.thread_id.store(id, Ordering::SeqCst);
    }

    /// If the vCPU's thread sleeps, in the guest or before it, how often it has gone to
    /// sleep (proc(5), `status`).
    pub fn sleeps(&self) -> Option<u64> {
        let id = self.thread_id.load(Ordering::SeqCst);
        let status = proc::read(&format!("self/task/{id}/status")).ok()?;
        let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        if !value("State:")?.trim().starts_with('S') {
            return None;
        }
        value("voluntary_ctxt_switches:")?.trim().parse().ok()
    }

    /// Ends the `KVM_RUN` under way, or else the next one. The vCPU's thread
    /// must not have ended.
    pub fn fire(&self) {
        self.byte().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: the caller says that this thread lives.
            unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
        }
    }

    /// `KVM_RUN` enters the guest again.
    pub fn disarm(&self) {
        self.byte().store(0, Ordering::SeqCst);
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: mapped and aligned (a byte); the kernel writes elsewhere in
        // the page only.
        unsafe { &*self.immediate_exit }
    }
}

/// Makes the signal harmless: it only interrupts.
///
/// # Errors
/// The operating system refuses the handler.
pub(crate) fn install_handler() -> Result<()> {
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
        .os("handle the signal that stops vCPUs")
}
