//! Machine state through a real KVM: out of one machine, into another.

#![allow(clippy::unwrap_used)]

mod machine;
mod malformed_states;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_VCPUEVENT_VALID_NMI_PENDING, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd};
use machine::Machine;
use snapstore_vmm::Error;
use snapstore_vmm::state::{MachineState, StateError, VcpuState, announce_stop};
use vm_memory::{Bytes, GuestAddress};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// The state without what goes on while nothing runs: the clocks.
fn still(mut state: MachineState) -> MachineState {
    state.vm.clock_nanos = 0;
    for channel in &mut state.vm.pit.channels {
        channel.count_load_time = 0;
    }
    for vcpu in &mut state.vcpus {
        vcpu.msrs.retain(|msr| msr.index != TSC);
    }
    state
}

fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let set = vcpu.set_msrs(&kvm_bindings::Msrs::from_entries(&[entry]).unwrap());
    assert_eq!(set.unwrap(), 1, "MSR {index:#x}");
}

fn msr(state: &VcpuState, index: u32) -> Option<u64> {
    let entry = state.msrs.iter().find(|msr| msr.index == index)?;
    Some(entry.data)
}

/// Gives a vCPU values that no reset leaves behind.
fn disturb(vcpu: &VcpuFd, salt: u64) {
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip, regs.rflags) = (salt, !salt, 0x1000 + salt, 0x246);
    vcpu.set_regs(&regs).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x8000_0033, 0x620, 0xd01);
    (sregs.cr2, sregs.cr3) = (0xdead_0000 + salt, 0x3000);
    (sregs.cs.l, sregs.cs.db, sregs.cs.selector, sregs.cs.base) = (1, 0, 8, 0);
    (sregs.gdt.base, sregs.gdt.limit) = (0x500, 0x17);
    vcpu.set_sregs(&sregs).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db = [0x1111, 0x2222, 0x3333, 0x4444 + salt];
    vcpu.set_debug_regs(&debug).unwrap();
    let mut xsave = vcpu.get_xsave().unwrap();
    // The x87 and SSE components are in use; MXCSR; the first XMM register.
    (xsave.region[128], xsave.region[6]) = (3, 0x1fa0);
    xsave.region[40..44].fill(0x5a5a_0000 + salt as u32);
    // SAFETY: an area of 4096 bytes, on a KVM whose area has no more.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    // Spurious vector with the APIC on; LINT0 as external interrupt.
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (0xff_u8.cast_signed(), 1);
    (lapic.regs[0x350], lapic.regs[0x351], lapic.regs[0x352]) = (0, 7, 0);
    vcpu.set_lapic(&lapic).unwrap();
    for (index, value) in [
        (0x174, 0x10),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_0000 + salt),
        (0x277, 0x0007_0406_0007_0406),
        (0x4b56_4d01, 0x5001),
    ] {
        set_msr(vcpu, index, value);
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.nmi.pending = 1;
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    vcpu.set_vcpu_events(&events).unwrap();
}

#[test]
fn a_restored_machine_is_the_one_that_was_saved() {
    let Some(one) = Machine::new(2) else { return };
    for (salt, vcpu) in (1..).zip(&one.vcpus) {
        disturb(vcpu, salt);
    }
    let halted = kvm_bindings::kvm_mp_state {
        mp_state: KVM_MP_STATE_HALTED,
    };
    one.vcpus[0].set_mp_state(halted).unwrap();
    one.vm.set_irq_line(4, true).unwrap();
    let saved = one.save();
    assert_eq!(saved.vcpus[0].regs.rax, 1);
    assert_eq!(saved.vcpus[1].events.nmi.pending, 1);
    assert_eq!(msr(&saved.vcpus[0], 0x4b56_4d01), Some(0x5001));

    let decoded = MachineState::decode(&saved.encode()).unwrap();
    drop(one);
    let two = Machine::bare(2).unwrap();
    two.restore(&decoded).unwrap();
    let again = two.save();
    for (was, is) in still(saved.clone())
        .vcpus
        .iter()
        .zip(&still(again.clone()).vcpus)
    {
        assert_eq!(was, is);
    }
    assert!(still(saved.clone()).encode() == still(again.clone()).encode());

    for (was, is) in saved.vcpus.iter().zip(&again.vcpus) {
        let (was, is) = (msr(was, TSC).unwrap(), msr(is, TSC).unwrap());
        assert!(is >= was, "the TSC went back from {was} to {is}");
        let seconds = (is - was) / 1000 / u64::from(saved.vcpus[0].tsc_khz);
        assert!(seconds < 60, "the TSC jumped by {seconds} s");
    }
    assert!(
        again.vm.clock_nanos >= saved.vm.clock_nanos,
        "the clock went back"
    );
    let jump = again.vm.clock_nanos - saved.vm.clock_nanos;
    assert!(jump < 60_000_000_000, "the clock jumped by {jump} ns");
}

/// `inc ax; out 0x10, ax; jmp` back to the start.
const COUNTER: &[u8] = &[0x40, 0xe7, 0x10, 0xeb, 0xfb];

/// Runs a counting guest until it has told `count` numbers; returns the last.
fn count(vcpu: &mut VcpuFd, count: usize) -> u16 {
    let mut last = 0;
    for _ in 0..count {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, data) => last = u16::from_le_bytes([data[0], data[1]]),
            exit => panic!("{exit:?}"),
        }
    }
    last
}

#[test]
fn a_restored_guest_goes_on_where_it_was() {
    let Some(mut one) = Machine::new(1) else {
        return;
    };
    one.memory
        .write_slice(COUNTER, GuestAddress(0x1000))
        .unwrap();
    let vcpu = &mut one.vcpus[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rax, regs.rflags) = (0x1000, 100, 2);
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(count(vcpu, 5), 105);
    // Lets KVM finish the output before the state is read.
    vcpu.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
    let saved = one.save();

    for _ in 0..2 {
        let mut two = Machine::bare(1).unwrap();
        two.memory
            .write_slice(COUNTER, GuestAddress(0x1000))
            .unwrap();
        two.restore(&saved).unwrap();
        announce_stop(&two.vcpus[0]).unwrap();
        assert_eq!(count(&mut two.vcpus[0], 3), 108);
    }
}

/// Puts a vCPU's local APIC timer into TSC deadline mode, vector 0xec.
fn use_deadline_timer(vcpu: &VcpuFd, deadline: u64) {
    let mut lapic = vcpu.get_lapic().unwrap();
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (0xff_u8.cast_signed(), 1);
    let timer = 0x400ec_u32.to_le_bytes().map(u8::cast_signed);
    lapic.regs[0x320..0x324].copy_from_slice(&timer);
    vcpu.set_lapic(&lapic).unwrap();
    set_msr(vcpu, TSC_DEADLINE, deadline);
}

#[test]
fn an_armed_deadline_timer_stays_armed() {
    let Some(one) = Machine::new(1) else { return };
    if !one.kvm.check_extension(Cap::TscDeadlineTimer) {
        println!("SKIPPED an_armed_deadline_timer_stays_armed: this KVM has no TSC deadline timer");
        return;
    }
    let far = 1 << 60;
    use_deadline_timer(&one.vcpus[0], far);
    let saved = one.save();
    assert_eq!(msr(&saved.vcpus[0], TSC_DEADLINE), Some(far));
    let two = Machine::bare(1).unwrap();
    two.restore(&saved).unwrap();
    assert_eq!(msr(&two.save().vcpus[0], TSC_DEADLINE), Some(far));
}

#[test]
fn a_host_can_run_what_it_saved_and_not_more() {
    let Some(one) = Machine::new(1) else { return };
    let mut saved = one.save();
    saved.check_host(&one.host, &one.vcpus[0]).unwrap();
    for leaf in saved.vcpus[0].cpuid.iter_mut() {
        if (leaf.function, leaf.index) == (7, 0) {
            leaf.edx = u32::MAX;
        }
    }
    match saved.check_host(&one.host, &one.vcpus[0]).unwrap_err() {
        Error::State(StateError::HostLacks { features }) => {
            assert!(
                features.iter().any(|name| name == "leaf 7.0 edx bit 0"),
                "{features:?}"
            );
        }
        other => panic!("{other}"),
    }
}

#[test]
fn kvm_takes_the_cpuid_of_every_size_of_guest() {
    for cpus in [1, 2, 4] {
        let Some(machine) = Machine::new(cpus) else {
            return;
        };
        for (id, vcpu) in (0_u32..).zip(&machine.vcpus) {
            let saved = VcpuState::save(vcpu, &machine.host).unwrap();
            let one = saved.cpuid.iter().find(|leaf| leaf.function == 1).unwrap();
            assert_eq!(one.ebx >> 24, id);
            let ids: Vec<u32> = saved
                .cpuid
                .iter()
                .filter(|leaf| leaf.function == 0xb)
                .map(|leaf| leaf.edx)
                .collect();
            assert_eq!(ids, [id; 3]);
        }
    }
}

#[test]
fn an_xsave_area_of_another_host_is_fitted_or_refused() {
    let Some(one) = Machine::new(1) else { return };
    let mut saved = one.save();
    saved.vcpus[0].xsave.resize(64 << 10, 0);
    Machine::bare(1).unwrap().restore(&saved).unwrap();
    *saved.vcpus[0].xsave.last_mut().unwrap() = 1;
    let refused = Machine::bare(1).unwrap().restore(&saved).unwrap_err();
    assert!(matches!(
        refused,
        Error::State(StateError::XsaveBeyondHost { bytes: 65536, .. })
    ));
}

#[test]
fn an_msr_that_kvm_does_not_take_is_named() {
    let Some(one) = Machine::new(1) else { return };
    let mut saved = one.save();
    saved.vcpus[0].msrs.push(kvm_msr_entry {
        index: 0x1234_5678,
        data: 9,
        ..Default::default()
    });
    let refused = Machine::bare(1).unwrap().restore(&saved).unwrap_err();
    assert!(matches!(
        refused,
        Error::State(StateError::MsrRefused {
            index: 0x1234_5678,
            value: 9
        })
    ));
    assert!(refused.to_string().contains("0x12345678"));
}

#[test]
fn an_msr_that_kvm_does_not_know_may_be_zero() {
    let Some(one) = Machine::new(1) else { return };
    let mut saved = one.save();
    saved.vcpus[0].msrs.push(kvm_msr_entry {
        index: 0x1234_5678,
        data: 0,
        ..Default::default()
    });
    Machine::bare(1).unwrap().restore(&saved).unwrap();
}

#[test]
fn a_guest_of_less_than_a_second_keeps_its_tsc() {
    let Some(one) = Machine::new(2) else { return };
    let far = 1 << 60;
    set_msr(&one.vcpus[0], TSC, far);
    let mut saved = one.save();
    if msr(&saved.vcpus[0], TSC).unwrap() < far {
        println!(
            "SKIPPED a_guest_of_less_than_a_second_keeps_its_tsc: this KVM keeps the host's TSC"
        );
        return;
    }
    let early = u64::from(saved.vcpus[0].tsc_khz) * 900;
    for vcpu in &mut saved.vcpus {
        for msr in vcpu.msrs.iter_mut().filter(|msr| msr.index == TSC) {
            msr.data = early;
        }
    }
    let two = Machine::bare(2).unwrap();
    two.restore(&saved).unwrap();
    for vcpu in &two.save().vcpus {
        let is = msr(vcpu, TSC).unwrap();
        assert!(is >= early, "the TSC went back from {early} to {is}");
        let seconds = (is - early) / 1000 / u64::from(vcpu.tsc_khz.max(1));
        assert!(seconds < 60, "the TSC jumped by {seconds} s");
    }
}

#[test]
fn a_guest_without_kvmclock_can_be_told_that_it_was_stopped() {
    let Some(one) = Machine::new(1) else { return };
    announce_stop(&one.vcpus[0]).unwrap();
}
