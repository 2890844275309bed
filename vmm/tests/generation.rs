//! A restored machine has another VM generation identifier, and its guest is told.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use snapstore_guests::HALT;
use snapstore_vmm::memory::{GuestMemory, MemoryLayout};
use snapstore_vmm::state::MachineState;
use snapstore_vmm::{Console, Kernel, Machine};
use vm_memory::{Bytes as _, GuestAddress};

const SIZE: u64 = 2 << 20;
/// Where the identifier is; it is not at the begin of its page.
const AT: u64 = 0x8_0120;
/// The interrupt of the generic event device, and the vector the guest gives it.
const GSI: usize = 23;
const VECTOR: u8 = 0x51;
/// Of the local APIC: the spurious vector register's bit that turns the APIC on.
const SPURIOUS: usize = 0xf0;
const APIC_ON: u8 = 1;
/// Of the local APIC: the first of the interrupt request registers, 32 vectors each.
const REQUESTS: usize = 0x200;

/// The state of a machine that has not run, whose guest takes the interrupt.
fn state() -> Option<MachineState> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("SKIPPED a_restored_machine_is_another_generation: /dev/kvm: {error}");
        return None;
    }
    let program = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(program.path(), HALT).unwrap();
    let memory = GuestMemory::anonymous(MemoryLayout::new(SIZE).unwrap()).unwrap();
    let kernel = Kernel::Flat(program.path().into());
    let console = Arc::new(Console::new());
    let machine = Machine::boot(memory, 1, &kernel, &console, Vec::new()).unwrap();
    let mut state = machine.save().unwrap();
    assert_eq!(state.vm_generation, None, "a flat guest knows of none");
    // SAFETY: every bit pattern is an I/O APIC's; the tag says that it is one.
    let ioapic = unsafe { &mut state.vm.ioapic.chip.ioapic };
    // Fixed delivery to CPU 0, edge-triggered, not masked.
    ioapic.redirtbl[GSI].bits = u64::from(VECTOR);
    state.vcpus[0].lapic.regs[SPURIOUS + 1] |= APIC_ON.cast_signed();
    Some(state)
}

fn is_requested(state: &MachineState) -> bool {
    let register = REQUESTS + usize::from(VECTOR / 32) * 16 + usize::from(VECTOR % 32 / 8);
    state.vcpus[0].lapic.regs[register] & 1 << (VECTOR % 8) != 0
}

#[test]
fn a_restored_machine_is_another_generation() {
    let Some(mut state) = state() else { return };
    let image = tempfile::tempfile().unwrap();
    image.write_all_at(&[0x5a; 4096], AT / 4096 * 4096).unwrap();
    image.set_len(SIZE).unwrap();
    let restored = |state: &MachineState| {
        let memory = GuestMemory::from_image(MemoryLayout::new(SIZE).unwrap(), &image).unwrap();
        let console = Arc::new(Console::new());
        Machine::restore(state, memory, &console, Vec::new()).unwrap()
    };
    let around = |machine: &Machine| -> [u8; 48] {
        let ram = machine.memory().ram();
        let mut bytes = [0; 48];
        ram.read_slice(&mut bytes, GuestAddress(AT - 16)).unwrap();
        bytes
    };

    let same = restored(&state);
    assert_eq!(around(&same), [0x5a; 48]);
    assert!(!is_requested(&same.save().unwrap()), "told of nothing");

    state.vm_generation = Some(AT);
    let machines = [restored(&state), restored(&state)];
    let [one, other] = machines.each_ref().map(around);
    assert_ne!(one[16..32], other[16..32]);
    for found in [one, other] {
        assert_ne!(found[16..32], [0x5a; 16]);
        assert_eq!(
            (&found[..16], &found[32..]),
            (&[0x5a; 16][..], &[0x5a; 16][..])
        );
    }
    for machine in &machines {
        let saved = machine.save().unwrap();
        assert!(is_requested(&saved), "the guest is told");
        assert_eq!(
            saved.vm_generation,
            Some(AT),
            "and so is the next machine's"
        );
    }
}
