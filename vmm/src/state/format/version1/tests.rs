//! States of version 1 are read for ever, and in one form only.

use proptest::prelude::*;

use super::super::framed;
use super::super::tests::{any_vcpu, filled, golden, reason, refusal, sealed, small};
use super::*;
use crate::Error;

/// Written by a program of that time.
const GOLDEN: &[u8] = include_bytes!("../golden-1.bin");

impl From<&MachineState> for Content {
    fn from(state: &MachineState) -> Self {
        Self {
            memory_bytes: state.memory_bytes,
            vm: Vm {
                pic_master: state.vm.pic_master,
                pic_slave: state.vm.pic_slave,
                ioapic: state.vm.ioapic,
                pit: state.vm.pit,
                clock_nanos: state.vm.clock_nanos,
            },
            devices: Devices {
                serial: state.devices.serial.clone(),
                virtio: state.devices.virtio.iter().map(Virtio::from).collect(),
            },
            vm_generation: state.vm_generation,
            vcpus: state.vcpus.clone(),
        }
    }
}

impl From<&VirtioState> for Virtio {
    fn from(state: &VirtioState) -> Self {
        Self {
            device: match state.device {
                VirtioDeviceState::Block {
                    capacity_sectors,
                    read_only,
                } => Device::Block {
                    capacity_sectors,
                    read_only,
                },
                VirtioDeviceState::Entropy => Device::Entropy,
                VirtioDeviceState::Vsock { guest_cid } => Device::Vsock { guest_cid },
                VirtioDeviceState::Net { mac } => Device::Net { mac },
                // Devices of later come with version 2.
                #[allow(unreachable_patterns)]
                ref other => unreachable!("no state of version 1 has {other:?}"),
            },
            status: state.status,
            driver_features: state.driver_features,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            queue_select: state.queue_select,
            interrupt_status: state.interrupt_status,
            config_generation: state.config_generation,
            queues: state.queues.clone(),
        }
    }
}

fn content(state: &MachineState) -> Vec<u8> {
    wire(&Content::from(state))
}

fn encode(state: &MachineState) -> Vec<u8> {
    framed(1, &content(state))
}

fn changed(change: impl FnOnce(&mut MachineState)) -> Vec<u8> {
    let mut state = small();
    change(&mut state);
    encode(&state)
}

#[test]
fn the_bytes_of_version_1_are_read_for_ever() {
    let decoded = MachineState::decode(GOLDEN).unwrap();
    assert_eq!(decoded.vcpus, golden().vcpus);
    assert_eq!(decoded.devices, golden().devices);
    assert_eq!(decoded.memory_bytes, golden().memory_bytes);
    assert_eq!(decoded.vm_generation, golden().vm_generation);
    assert_eq!(decoded.vm.clock_nanos, golden().vm.clock_nanos);
    assert!(encode(&golden()) == GOLDEN, "the structures have changed");
    // And written as a newer version, it is the same state.
    let again = decoded.encode();
    assert_eq!(again[8], 2);
    assert!(again == golden().encode());
}

#[test]
fn bytes_behind_the_content_are_refused() {
    let mut content = content(&small());
    content.extend([0; 3]);
    let refused = reason(&framed(1, &content));
    assert!(matches!(refused, StateError::TrailingBytes { extra: 3 }));
}

#[test]
fn content_that_ends_early_is_malformed() {
    let content = content(&small());
    for length in [0, 1, 100, content.len() - 1] {
        let refused = reason(&framed(1, &content[..length]));
        assert!(
            matches!(refused, StateError::Malformed { .. }),
            "{length}: {refused}"
        );
    }
}

#[test]
fn an_overlong_number_is_not_the_valid_form() {
    let mut content = content(&small());
    // The memory size, 0x20000000, as 80 80 80 80 02; the same value in six bytes.
    assert_eq!(content[..5], [0x80, 0x80, 0x80, 0x80, 0x02]);
    content.splice(4..5, [0x82, 0x00]);
    assert!(matches!(
        reason(&framed(1, &content)),
        StateError::NotCanonical
    ));
}

#[test]
fn lists_that_are_too_long_are_refused() {
    for count in [65, 200] {
        let many = changed(|state| state.vcpus = vec![state.vcpus[0].clone(); count]);
        assert!(matches!(refusal(&many), Error::Cpus { cpus: 65, .. }));
    }
    let entries = changed(|state| state.vcpus[0].cpuid = vec![filled(3); 257]);
    assert!(matches!(
        reason(&entries),
        StateError::TooMany { limit: 256, .. }
    ));
    let devices = changed(|state| {
        state.devices.virtio = vec![state.devices.virtio[1].clone(); 500];
    });
    assert!(matches!(
        reason(&devices),
        StateError::VirtioDevices { limit: 16 }
    ));
    let queues = changed(|state| {
        state.devices.virtio[1].queues = vec![state.devices.virtio[1].queues[0]; 3000];
    });
    assert!(matches!(
        reason(&queues),
        StateError::Virtio { device: 1, .. }
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_state_of_version_1_is_read(
        vcpus in proptest::collection::vec(any_vcpu(), 1..6),
        pages in 256..(1_u64 << 28),
    ) {
        let mut state = golden();
        state.vcpus = vcpus;
        state.memory_bytes = pages * 4096;
        let decoded = MachineState::decode(&encode(&state)).unwrap();
        prop_assert_eq!(&decoded.vcpus, &state.vcpus);
        prop_assert_eq!(&decoded.devices, &state.devices);
        prop_assert!(decoded.encode() == state.encode());
    }

    #[test]
    fn a_changed_state_with_a_right_checksum_is_read_as_it_is_or_refused(
        changes in proptest::collection::vec(
            (proptest::num::usize::ANY, proptest::num::u8::ANY), 1..20),
    ) {
        let mut bytes = encode(&small());
        let end = bytes.len() - 32;
        for (at, value) in changes {
            // Not the version.
            bytes[20 + at % (end - 20)] = value;
        }
        let bytes = sealed(bytes);
        if let Ok(state) = MachineState::decode(&bytes) {
            prop_assert!(encode(&state) == bytes);
        }
    }
}
