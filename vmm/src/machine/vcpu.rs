//! The thread of one vCPU: into the guest, and back for what KVM leaves to us.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::devices::{Devices, Effect};
use crate::ending::Ending;
use crate::machine::run_control::RunControl;
use crate::memory::{GuestMemory, MemoryLayout};
use crate::signals::may_panic;

/// Runs the guest until the vCPU is interrupted (`Ok`) or the machine ends.
///
/// The vCPU leaves only when `KVM_RUN` was interrupted: after any other exit KVM
/// may still have to hand the guest what it asked for, which it does on the way
/// in. A state saved with such a hand-over pending would repeat or lose it.
pub(super) fn run_guest(
    vcpu: &mut VcpuFd,
    run_control: &RunControl,
    devices: &Devices,
    memory: &GuestMemory,
) -> Result<(), Ending> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::InternalError) => return Err(not_emulated(vcpu, memory)),
            Ok(exit) => {
                may_panic("vcpu");
                handle(exit, run_control, devices, memory.layout())?;
            }
            Err(error) => match error.errno() {
                libc::EINTR => return Ok(()),
                libc::EAGAIN => {}
                libc::EFAULT => {
                    return Err(Ending::MemoryLost {
                        guest_address: None,
                    });
                }
                _ => {
                    return Err(Ending::Failed {
                        reason: format!("KVM_RUN: {error}"),
                    });
                }
            },
        }
    }
}

/// Why KVM could not emulate an instruction: it says the same of code that it cannot
/// fetch.
fn not_emulated(vcpu: &VcpuFd, memory: &GuestMemory) -> Ending {
    let code = vcpu.get_regs().ok().and_then(|regs| {
        let found = vcpu.translate_gva(regs.rip).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    });
    let lost = code.filter(|address| memory.is_lost(*address));
    match lost {
        Some(address) => Ending::MemoryLost {
            guest_address: Some(address),
        },
        None => Ending::Failed {
            reason: "KVM could not emulate what the guest did".to_owned(),
        },
    }
}

fn handle(
    exit: VcpuExit<'_>,
    run_control: &RunControl,
    devices: &Devices,
    layout: &MemoryLayout,
) -> Result<(), Ending> {
    let failed = |reason: String| Err(Ending::Failed { reason });
    match exit {
        VcpuExit::IoIn(port, data) => devices.port_read(port, data),
        VcpuExit::IoOut(port, data) => match devices.port_write(port, data) {
            Effect::None => {}
            Effect::Reset => return Err(Ending::Reset),
            Effect::PowerOff => return Err(Ending::PoweredOff),
            Effect::Ready => run_control.guest_is_ready(),
        },
        // KVM asks the monitor about RAM when it could not get the page itself.
        VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _)
            if layout.is_ram(address) =>
        {
            return Err(Ending::MemoryLost {
                guest_address: Some(address),
            });
        }
        VcpuExit::MemoryFault { gpa, .. } => {
            return Err(Ending::MemoryLost {
                guest_address: Some(gpa),
            });
        }
        VcpuExit::MmioRead(address, data) => devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => {
            devices.mmio_write(address, data);
            if devices.host().has_fault() {
                run_control.stop_for_fault();
            }
        }
        VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => return Err(Ending::TripleFault),
        VcpuExit::SystemEvent(kind, _) => match kind {
            KVM_SYSTEM_EVENT_RESET => return Err(Ending::Reset),
            KVM_SYSTEM_EVENT_SHUTDOWN => return Err(Ending::PoweredOff),
            KVM_SYSTEM_EVENT_CRASH => return failed("the guest reported a crash".to_owned()),
            _ => return failed(format!("system event {kind}")),
        },
        VcpuExit::FailEntry(reason, cpu) => {
            return failed(format!(
                "hardware refused vCPU state, reason {reason:#x} on CPU {cpu}"
            ));
        }
        other => {
            return failed(format!(
                "KVM left the guest for an unknown cause: {other:?}"
            ));
        }
    }
    Ok(())
}
