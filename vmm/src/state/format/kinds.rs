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
//! | `virtio-*` | its window | the transport, and what only this kind has |
//! | `vm-generation` | 0 | the address of the VM generation identifier |
//!
//! All must be understood. `clock`, `interrupts`, `machine`, `serial`, `timer` and a
//! `vcpu` are in every state.
//!
//! A payload's layout never changes: another one is another version, with a decoder
//! beside those that there are ([`KINDS`]). A new device is a new kind: states without
//! it stay what they are.

use std::collections::BTreeMap;

use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use serde::{Deserialize, Serialize};

use super::super::{
    DeviceState, MAX_CPUS, MAX_VIRTIO_DEVICES, MAX_VIRTIO_QUEUES, MachineState, SerialState,
    StateError, VcpuState, VirtioDeviceState, VirtioQueueState, VirtioState, VmState, bounded,
};
use super::payload::Payload;
use super::wire::{exactly, wire};
use crate::{Error, Result};

/// A kind of payload, with a decoder for each version from 1 on.
pub(super) struct Kind {
    pub name: &'static str,
    pub versions: &'static [Decoder],
}

/// Puts what a payload holds where it belongs.
type Decoder = fn(&mut Parts, u32, &[u8]) -> Result<(), StateError>;

/// The parts of a machine, as its payloads are read.
#[derive(Default)]
pub(super) struct Parts {
    clock_nanos: Option<u64>,
    interrupts: Option<[kvm_irqchip; 3]>,
    memory_bytes: Option<u64>,
    serial: Option<SerialState>,
    timer: Option<kvm_pit_state2>,
    vcpus: BTreeMap<u32, VcpuState>,
    /// By their windows; several of one window are found when they are counted.
    virtio: Vec<(u32, VirtioState)>,
    vm_generation: Option<u64>,
    /// Of a kind that only tests know.
    #[cfg(test)]
    pub lamp: Option<u64>,
}

/// Every kind that is known, in the order of their names.
pub(super) const KINDS: &[Kind] = &[
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
        name: "virtio-block",
        versions: &[|parts, number, bytes| {
            let block: Block1 = exactly(bytes, |block: &Block1| block.transport.check(number))?;
            let device = VirtioDeviceState::Block {
                capacity_sectors: block.capacity_sectors,
                read_only: block.read_only,
            };
            parts.virtio(number, device, block.transport)
        }],
    },
    Kind {
        name: "virtio-entropy",
        versions: &[|parts, number, bytes| {
            let transport = exactly(bytes, |transport: &Transport1| transport.check(number))?;
            parts.virtio(number, VirtioDeviceState::Entropy, transport)
        }],
    },
    Kind {
        name: "virtio-net",
        versions: &[|parts, number, bytes| {
            let net: Net1 = exactly(bytes, |net: &Net1| net.transport.check(number))?;
            parts.virtio(
                number,
                VirtioDeviceState::Net { mac: net.mac },
                net.transport,
            )
        }],
    },
    Kind {
        name: "virtio-vsock",
        versions: &[|parts, number, bytes| {
            let vsock: Vsock1 = exactly(bytes, |vsock: &Vsock1| vsock.transport.check(number))?;
            let device = VirtioDeviceState::Vsock {
                guest_cid: vsock.guest_cid,
            };
            parts.virtio(number, device, vsock.transport)
        }],
    },
    Kind {
        name: "vm-generation",
        versions: &[|parts, number, bytes| only(&mut parts.vm_generation, number, bytes)],
    },
];

/// The registers of a virtio device's transport.
#[derive(Serialize, Deserialize)]
struct Transport1 {
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u8,
    config_generation: u32,
    #[serde(deserialize_with = "bounded::list::<_, _, { MAX_VIRTIO_QUEUES }>")]
    queues: Vec<VirtioQueueState>,
}

#[derive(Serialize, Deserialize)]
struct Block1 {
    transport: Transport1,
    capacity_sectors: u64,
    read_only: bool,
}

#[derive(Serialize, Deserialize)]
struct Net1 {
    transport: Transport1,
    mac: [u8; 6],
}

#[derive(Serialize, Deserialize)]
struct Vsock1 {
    transport: Transport1,
    guest_cid: u64,
}

impl Transport1 {
    /// A list that is too long is not kept whole.
    fn check(&self, window: u32) -> Result<(), StateError> {
        if self.queues.len() > MAX_VIRTIO_QUEUES {
            return Err(StateError::Virtio {
                device: window as usize,
                what: "an impossible number of queues",
            });
        }
        Ok(())
    }
}

/// The one payload of its kind.
fn only<T>(place: &mut Option<T>, number: u32, bytes: &[u8]) -> Result<(), StateError>
where
    T: Serialize + serde::de::DeserializeOwned,
{
    if number != 0 {
        return Err(StateError::Payloads {
            what: "a second payload of a kind of which a machine has one",
        });
    }
    *place = Some(exactly(bytes, |_| Ok(()))?);
    Ok(())
}

impl Parts {
    fn virtio(
        &mut self,
        window: u32,
        device: VirtioDeviceState,
        transport: Transport1,
    ) -> Result<(), StateError> {
        let state = VirtioState {
            device,
            status: transport.status,
            driver_features: transport.driver_features,
            device_features_select: transport.device_features_select,
            driver_features_select: transport.driver_features_select,
            queue_select: transport.queue_select,
            interrupt_status: transport.interrupt_status,
            config_generation: transport.config_generation,
            queues: transport.queues,
        };
        self.virtio.push((window, state));
        Ok(())
    }

    /// The machine of these parts. Sizes and counts are the caller's to check.
    fn machine(mut self) -> Result<MachineState> {
        let lacks = |kind| StateError::LacksPayload { kind };
        let [pic_master, pic_slave, ioapic] = self.interrupts.ok_or_else(|| lacks("interrupts"))?;
        let has_gap = self.vcpus.keys().zip(0..).any(|(have, want)| *have != want);
        if has_gap {
            return Err(lacks("vcpu").into());
        }
        if self.vcpus.len() > MAX_CPUS as usize {
            return Err(Error::Cpus {
                cpus: MAX_CPUS + 1,
                limit: MAX_CPUS,
            });
        }
        self.virtio.sort_by_key(|(window, _)| *window);
        if self.virtio.len() > MAX_VIRTIO_DEVICES {
            return Err(StateError::VirtioDevices {
                limit: MAX_VIRTIO_DEVICES,
            }
            .into());
        }
        let windows = self.virtio.iter().map(|(window, _)| *window);
        if !windows.eq(0..u32::try_from(self.virtio.len()).unwrap_or(u32::MAX)) {
            return Err(StateError::Payloads {
                what: "virtio devices that are not in one window each, from the first on",
            }
            .into());
        }
        let virtio = self.virtio.into_iter();
        Ok(MachineState {
            memory_bytes: self.memory_bytes.ok_or_else(|| lacks("machine"))?,
            vm: VmState {
                pic_master,
                pic_slave,
                ioapic,
                pit: self.timer.ok_or_else(|| lacks("timer"))?,
                clock_nanos: self.clock_nanos.ok_or_else(|| lacks("clock"))?,
            },
            devices: DeviceState {
                serial: self.serial.ok_or_else(|| lacks("serial"))?,
                virtio: virtio.map(|(_, state)| state).collect(),
            },
            vm_generation: self.vm_generation,
            vcpus: self.vcpus.into_values().collect(),
        })
    }
}

/// The parts that payloads of these kinds hold. What is not known and need not be is
/// left out.
pub(super) fn parts(payloads: Vec<Payload<'_>>, kinds: &[Kind]) -> Result<Parts, StateError> {
    let mut parts = Parts::default();
    for payload in payloads {
        let kind = kinds.iter().find(|kind| kind.name == payload.kind);
        let versions = kind.map_or(&[][..], |kind| kind.versions);
        let place = usize::try_from(payload.version - 1).unwrap_or(usize::MAX);
        match (versions.get(place), payload.need()) {
            (Some(decode), Some(true)) => decode(&mut parts, payload.number, &payload.bytes)?,
            (Some(_), Some(false)) => {
                return Err(StateError::Payloads {
                    what: "a part that need not be understood and must be",
                });
            }
            (None, Some(false)) => {}
            (None, Some(true)) | (_, None) => {
                return Err(StateError::NewerPayload {
                    kind: payload.kind.to_owned(),
                    version: payload.version,
                    supported: versions.len(),
                });
            }
        }
    }
    Ok(parts)
}

/// The state of these payloads.
pub(super) fn decode(payloads: Vec<Payload<'_>>, kinds: &[Kind]) -> Result<MachineState> {
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
        payloads.push(virtio_payload(window, device));
    }
    if let Some(address) = state.vm_generation {
        payloads.push(Payload::needed("vm-generation", 1, 0, wire(&address)));
    }
    payloads
}

fn virtio_payload(window: u32, state: &VirtioState) -> Payload<'static> {
    let transport = Transport1 {
        status: state.status,
        driver_features: state.driver_features,
        device_features_select: state.device_features_select,
        driver_features_select: state.driver_features_select,
        queue_select: state.queue_select,
        interrupt_status: state.interrupt_status,
        config_generation: state.config_generation,
        queues: state.queues.clone(),
    };
    let (kind, bytes) = match state.device {
        VirtioDeviceState::Block {
            capacity_sectors,
            read_only,
        } => {
            let block = Block1 {
                transport,
                capacity_sectors,
                read_only,
            };
            ("virtio-block", wire(&block))
        }
        VirtioDeviceState::Entropy => ("virtio-entropy", wire(&transport)),
        VirtioDeviceState::Vsock { guest_cid } => {
            let vsock = Vsock1 {
                transport,
                guest_cid,
            };
            ("virtio-vsock", wire(&vsock))
        }
        VirtioDeviceState::Net { mac } => ("virtio-net", wire(&Net1 { transport, mac })),
    };
    Payload::needed(kind, 1, window, bytes)
}
