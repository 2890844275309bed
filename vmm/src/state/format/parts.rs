//! The parts of a machine, as the payloads of its state are read.

use std::collections::BTreeMap;

use kvm_bindings::{kvm_irqchip, kvm_pit_state2};

use super::payload::Payload;
use crate::state::{
    DeviceState, MAX_CPUS, MAX_VIRTIO_DEVICES, MachineState, SerialState, StateError, VcpuState,
    VirtioState, VmState,
};
use crate::{Error, Result};

/// A kind of payload, with a decoder for each version from 1 on. Its name has at most
/// [`KIND_BYTES`](super::payload::KIND_BYTES) letters.
pub(super) struct Kind {
    pub name: &'static str,
    pub versions: &'static [Decoder],
}

/// Puts what a payload holds where it belongs.
pub(super) type Decoder = fn(&mut Parts, u32, &[u8]) -> Result<(), StateError>;

/// The parts of a machine, as its payloads are read.
#[derive(Default)]
pub(super) struct Parts {
    pub clock_nanos: Option<u64>,
    pub interrupts: Option<[kvm_irqchip; 3]>,
    pub memory_bytes: Option<u64>,
    pub serial: Option<SerialState>,
    pub timer: Option<kvm_pit_state2>,
    pub vcpus: BTreeMap<u32, VcpuState>,
    /// By their windows; several of one window are found when they are counted.
    pub virtio: Vec<(u32, VirtioState)>,
    pub vm_generation: Option<u64>,
    /// Of a kind that only tests know.
    #[cfg(test)]
    pub lamp: Option<u64>,
}

impl Parts {
    /// The machine of these parts. Sizes and counts are the caller's to check.
    pub fn machine(mut self) -> Result<MachineState> {
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
pub(super) fn parts(payloads: Vec<Payload<'_>>, kinds: &[&[Kind]]) -> Result<Parts, StateError> {
    let mut parts = Parts::default();
    for payload in payloads {
        let kind = kinds
            .iter()
            .copied()
            .flatten()
            .find(|kind| kind.name == payload.kind);
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
