//! States that are well-formed and that no machine was ever in.

use serde::de::DeserializeOwned;
use snapstore_vmm::state::MachineState;

use crate::machine::Machine;

/// Random values, the same in each run.
struct Random(blake3::OutputReader);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// One of KVM's structures with random bytes.
    fn filled<T: DeserializeOwned>(&mut self) -> T {
        let mut bytes = vec![0; size_of::<T>()];
        self.fill(&mut bytes);
        postcard::from_bytes(&postcard::to_stdvec(&bytes).unwrap()).unwrap()
    }
}

type Harm = fn(&mut MachineState, &mut Random);

/// Each a way to make a state that decodes and that no machine was ever in.
const HOSTILE: &[(&str, Harm)] = &[
    ("CPUID", |state, random| {
        state.vcpus[0].cpuid = vec![random.filled(); 256]
    }),
    ("CPUID values", |state, random| {
        for leaf in &mut state.vcpus[0].cpuid {
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] = [(); 4].map(|()| random.number() as u32);
        }
    }),
    ("TSC frequency", |state, random| {
        state.vcpus[0].tsc_khz = random.number() as u32
    }),
    ("MP state", |state, random| {
        state.vcpus[0].mp_state = random.filled()
    }),
    ("small MP state", |state, random| {
        state.vcpus[0].mp_state.mp_state = random.number() as u32 % 16;
    }),
    ("registers", |state, random| {
        state.vcpus[0].regs = random.filled()
    }),
    ("special registers", |state, random| {
        state.vcpus[0].sregs = random.filled()
    }),
    ("control registers", |state, random| {
        let sregs = &mut state.vcpus[0].sregs;
        (sregs.cr0, sregs.cr4) = (random.number() as u32 as u64, random.number() & 0x3f_ffff);
        (sregs.efer, sregs.cr3) = (random.number() & 0xffff, random.number());
    }),
    ("APIC base", |state, random| {
        state.vcpus[0].sregs.apic_base = random.number() & 0xf_ffff_ff00
    }),
    ("XSAVE area", |state, random| {
        let area = &mut state.vcpus[0].xsave;
        random.fill(area);
    }),
    ("XSAVE registers", |state, random| {
        random.fill(&mut state.vcpus[0].xsave[..512]);
    }),
    ("extended control registers", |state, random| {
        state.vcpus[0].xcrs = random.filled()
    }),
    ("how many of them", |state, random| {
        state.vcpus[0].xcrs.nr_xcrs = random.number() as u32
    }),
    ("XCR0", |state, random| {
        state.vcpus[0].xcrs.xcrs[0].value = random.number()
    }),
    ("debug registers", |state, random| {
        state.vcpus[0].debug_regs = random.filled()
    }),
    ("local APIC", |state, random| {
        state.vcpus[0].lapic = random.filled()
    }),
    ("MSRs", |state, random| {
        state.vcpus[0].msrs = (0..1024).map(|_| random.filled()).collect()
    }),
    ("one MSR's value", |state, random| {
        let msrs = &mut state.vcpus[0].msrs;
        let at = random.number() as usize % msrs.len();
        msrs[at].data = random.number();
    }),
    ("events", |state, random| {
        state.vcpus[0].events = random.filled()
    }),
    ("event values", |state, random| {
        let flags = state.vcpus[0].events.flags;
        state.vcpus[0].events = random.filled();
        state.vcpus[0].events.flags = flags;
        state.vcpus[0].events.reserved = Default::default();
    }),
    ("first PIC", |state, random| {
        state.vm.pic_master = random.filled();
        state.vm.pic_master.chip_id = 0;
    }),
    ("second PIC", |state, random| {
        state.vm.pic_slave = random.filled();
        state.vm.pic_slave.chip_id = 1;
    }),
    ("I/O APIC", |state, random| {
        state.vm.ioapic = random.filled();
        state.vm.ioapic.chip_id = 2;
    }),
    ("timer", |state, random| state.vm.pit = random.filled()),
    ("clock", |state, random| {
        state.vm.clock_nanos = random.number()
    }),
];

/// KVM takes such a state or refuses it; nobody else may notice.
#[test]
fn a_hostile_state_does_no_harm() {
    let Some(one) = Machine::new(1) else { return };
    let good = one.save();
    let mut random = Random(blake3::Hasher::new().finalize_xof());
    let (mut taken, mut refused) = (0, 0);
    for round in 0..20 {
        for (name, change) in HOSTILE {
            let mut state = good.clone();
            change(&mut state, &mut random);
            let state = MachineState::decode(&state.encode()).expect(name);
            let machine = Machine::bare(1).unwrap();
            for (saved, vcpu) in state.vcpus.iter().zip(&machine.vcpus) {
                match saved.restore(vcpu, &machine.host) {
                    Ok(()) => taken += 1,
                    Err(error) => {
                        refused += 1;
                        assert!(!error.to_string().is_empty(), "{name} in round {round}");
                    }
                }
            }
            let _ = state.vm.restore(&machine.vm);
        }
    }
    println!("{taken} taken, {refused} refused");
    let next = Machine::bare(1).unwrap();
    next.restore(&good)
        .expect("a good state after the hostile ones");
}
