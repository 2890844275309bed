//! vCPUs and interrupt controllers as a kernel finds them at its entry.
//!
//! A flat program finds them as KVM makes them. Linux finds what firmware would
//! have set, and its other processors waiting to be started.

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::{KvmContext as _, Result};
use crate::loader::Entry;
use crate::memory::MemoryLayout;
use crate::state::guest_cpuid;

/// Puts a vCPU at the kernel's entry.
pub(super) fn power_on(
    vcpu: &VcpuFd,
    offered: &[kvm_cpuid_entry2],
    entry: Entry,
    (cpu, cpus): (u32, u32),
    layout: &MemoryLayout,
) -> Result<()> {
    // Before the registers, which KVM checks against it.
    vcpu.set_cpuid2(&guest_cpuid(offered, cpu, cpus)?)
        .kvm("take the CPUID")?;
    if entry.is_linux() {
        set_msrs(vcpu)?;
        set_fpu(vcpu)?;
        set_local_interrupts(vcpu)?;
    }
    let waits = entry.is_linux() && cpu > 0;
    if !waits {
        let mut sregs = vcpu.get_sregs().kvm("read special registers")?;
        let regs = entry.registers(&mut sregs, cpu, cpus, layout.size_bytes());
        vcpu.set_sregs(&sregs).kvm("set special registers")?;
        vcpu.set_regs(&regs).kvm("set registers")?;
    }
    // A vCPU that waits does so for an INIT and a startup interrupt.
    let mp_state = if waits {
        KVM_MP_STATE_UNINITIALIZED
    } else {
        KVM_MP_STATE_RUNNABLE
    };
    vcpu.set_mp_state(kvm_mp_state { mp_state })
        .kvm("start a vCPU")
}

/// Memory is cached, and string instructions are fast. Intel manual, volume 4.
fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLED: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    for (index, value) in [
        (IA32_MISC_ENABLE, FAST_STRINGS),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK),
    ] {
        let mut data = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut list = Msrs::from_entries(&[data]).expect("one is not too many");
        // What KVM reports there beyond this, such as what it does not have, stays.
        if vcpu.get_msrs(&mut list).kvm("read an MSR")? == 1 {
            data.data = list.as_slice()[0].data;
        }
        data.data |= value;
        let list = Msrs::from_entries(&[data]).expect("one is not too many");
        if vcpu.set_msrs(&list).kvm("set an MSR")? != 1 {
            // Linux boots without them as well, with a remark.
            tracing::warn!(index, "KVM does not take an MSR that firmware sets");
        }
    }
    Ok(())
}

/// All exceptions of the FPU masked, as FNINIT and a reset of MXCSR leave it.
fn set_fpu(vcpu: &VcpuFd) -> Result<()> {
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .kvm("set the FPU")
}

/// The pins of the local APIC: LINT0 is the 8259 interrupt controllers, LINT1 is
/// the NMI (Intel MultiProcessor Specification 1.4, section 3.6.2.2).
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<()> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTERNAL: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    let mut lapic = vcpu.get_lapic().kvm("read the local APIC")?;
    set_register(&mut lapic, LINT0, EXTERNAL);
    set_register(&mut lapic, LINT1, NMI);
    vcpu.set_lapic(&lapic).kvm("set the local APIC")
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte.cast_signed();
    }
}

/// Masks the 8259 interrupt controllers. Every interrupt goes to them as well as to
/// the I/O APIC, and a kernel that takes the machine as hardware-reduced leaves them
/// alone: it would get each twice, the second under a vector that is an exception's.
/// A kernel that uses them sets them up itself.
pub(super) fn mask_pics(vm: &VmFd) -> Result<()> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .kvm("read an interrupt controller")?;
        chip.chip.pic.imr = 0xff;
        vm.set_irqchip(&chip).kvm("set an interrupt controller")?;
    }
    Ok(())
}
