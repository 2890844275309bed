//! What each kind of payload holds, in postcard's wire format; KVM's structures are the
//! bytes of the kernel's ABI.
//!
//! | kind | number | version 1 |
//! |---|---|---|
//! | `clock` | 0 | the guest's kvmclock in nanoseconds |
//! | `interrupts` | 0 | both 8259s and the I/O APIC |
//! | `machine` | 0 | the size of memory in bytes |
//! | `serial` | 0 | the first serial port |
//! | `timer` | 0 | the 8254 |
//! | `vcpu` | its index | what KVM holds of it |
//! | `virtio-*` | its window | the transport, and what only this kind has (`virtio.rs`) |
//! | `vm-generation` | 0 | the address of the VM generation identifier |
//!
//! All must be understood. `clock`, `interrupts`, `machine`, `serial`, `timer` and a
//! `vcpu` are in every state.
//!
//! A payload's layout never changes: another one is another version, with a decoder
//! beside those that there are ([`KINDS`]). A new device is a new kind: states without
//! it stay what they are.

use kvm_bindings::kvm_irqchip;

use super::parts::{Kind, parts};
use super::payload::Payload;
use super::virtio;
use super::wire::{exactly, wire};
use crate::Result;
use crate::state::{MAX_CPUS, MachineState, StateError, VcpuState};

/// Every kind that is known.
pub(super) const KINDS: &[&[Kind]] = &[MACHINE, virtio::KINDS];

/// The kinds of what every machine has, in the order of their names.
const MACHINE: &[Kind] = &[
    Kind {
        name: "clock",
        versions: &[|parts, number, bytes| only(&mut parts.clock_nanos, number, bytes)],
    },
    Kind {
        name: "interrupts",
        versions: &[|parts, number, bytes| {
            let mut chips: Option<(kvm_irqchip, kvm_irqchip, kvm_irqchip)> = None;
            only(&mut chips, number, bytes)?;
            parts.interrupts = chips.map(|(master, slave, ioapic)| [master, slave, ioapic]);
            Ok(())
        }],
    },
    Kind {
        name: "machine",
        versions: &[|parts, number, bytes| only(&mut parts.memory_bytes, number, bytes)],
    },
    Kind {
        name: "serial",
        versions: &[|parts, number, bytes| only(&mut parts.serial, number, bytes)],
    },
    Kind {
        name: "timer",
        versions: &[|parts, number, bytes| only(&mut parts.timer, number, bytes)],
    },
    Kind {
        name: "vcpu",
        versions: &[|parts, number, bytes| {
            // One too many is enough to see that they are.
            if number <= MAX_CPUS {
                let vcpu = exactly(bytes, |vcpu: &VcpuState| vcpu.validate(number as usize))?;
                parts.vcpus.insert(number, vcpu);
            }
            Ok(())
        }],
    },
    Kind {
        name: "vm-generation",
        versions: &[|parts, number, bytes| only(&mut parts.vm_generation, number, bytes)],
    },
];

/// The one payload of its kind.
fn only<T>(place: &mut Option<T>, number: u32, bytes: &[u8]) -> Result<(), StateError>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    if number != 0 {
        return Err(StateError::Payloads {
            what: "a second payload of a kind of which a machine has one",
        });
    }
    *place = Some(exactly(bytes, |_| Ok(()))?);
    Ok(())
}

/// The state of these payloads.
pub(super) fn decode(payloads: Vec<Payload<'_>>, kinds: &[&[Kind]]) -> Result<MachineState> {
    parts(payloads, kinds)?.machine()
}

/// The payloads of a state, each of the newest version of its kind.
pub(super) fn payloads(state: &MachineState) -> Vec<Payload<'static>> {
    let vm = &state.vm;
    let mut payloads = vec![
        Payload::needed("clock", 1, 0, wire(&vm.clock_nanos)),
        Payload::needed(
            "interrupts",
            1,
            0,
            wire(&(&vm.pic_master, &vm.pic_slave, &vm.ioapic)),
        ),
        Payload::needed("machine", 1, 0, wire(&state.memory_bytes)),
        Payload::needed("serial", 1, 0, wire(&state.devices.serial)),
        Payload::needed("timer", 1, 0, wire(&vm.pit)),
    ];
    for (number, vcpu) in (0..).zip(&state.vcpus) {
        payloads.push(Payload::needed("vcpu", 1, number, wire(vcpu)));
    }
    for (window, device) in (0..).zip(&state.devices.virtio) {
        payloads.push(virtio::payload(window, device));
    }
    if let Some(address) = state.vm_generation {
        payloads.push(Payload::needed("vm-generation", 1, 0, wire(&address)));
    }
    payloads
}
