//! Every way in which bytes are not a state, and the bytes that are one for ever.

use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip, kvm_msr_entry, kvm_pit_state2, kvm_vcpu_events};
use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::state::{
    DeviceState, MAX_VIRTIO_DEVICES, MAX_VIRTIO_QUEUES, SerialState, VcpuState, VirtioDeviceState,
    VirtioQueueState, VirtioState, VmState,
};

/// The golden state's bytes. Readers of this version read them for ever.
const GOLDEN: &[u8] = include_bytes!("golden-2.bin");

/// A structure of KVM's filled with a pattern, by its wire form.
pub(super) fn filled<T: serde::de::DeserializeOwned>(seed: u8) -> T {
    let bytes: Vec<u8> = (0..size_of::<T>())
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed))
        .collect();
    postcard::from_bytes(&postcard::to_stdvec(&bytes).unwrap()).unwrap()
}

fn vcpu(seed: u8) -> VcpuState {
    VcpuState {
        cpuid: (0..5)
            .map(|i| filled::<kvm_cpuid_entry2>(seed ^ i))
            .collect(),
        tsc_khz: 2_300_000 + u32::from(seed),
        mp_state: filled(seed),
        regs: filled(seed),
        sregs: filled(seed),
        xsave: (0..4096_u32).map(|at| at as u8 ^ seed).collect(),
        xcrs: filled(seed),
        debug_regs: filled(seed),
        lapic: filled(seed),
        msrs: (0..7).map(|i| filled::<kvm_msr_entry>(seed ^ i)).collect(),
        events: filled::<kvm_vcpu_events>(seed),
    }
}

fn chip(chip_id: u32) -> kvm_irqchip {
    let mut chip: kvm_irqchip = filled(chip_id as u8);
    chip.chip_id = chip_id;
    chip
}

/// A virtio device in use.
pub(super) fn virtio(device: VirtioDeviceState) -> VirtioState {
    VirtioState {
        device,
        status: 0xf,
        driver_features: 1 << 32 | 0x2676,
        device_features_select: 1,
        driver_features_select: 1,
        queue_select: 0,
        interrupt_status: 1,
        config_generation: 3,
        queues: vec![VirtioQueueState {
            max_size: 128,
            size: 64,
            ready: true,
            descriptor_table: 0x12_3450,
            available_ring: 0x1_0000_0002,
            used_ring: 0x23_4564,
            next_available: 0xfffe,
            next_used: 0xfffd,
        }],
    }
}

/// The state in the golden file.
pub(super) fn golden() -> MachineState {
    MachineState {
        memory_bytes: 512 << 20,
        vm: VmState {
            pic_master: chip(0),
            pic_slave: chip(1),
            ioapic: chip(2),
            pit: filled::<kvm_pit_state2>(9),
            clock_nanos: 0x1234_5678_9abc_def0,
        },
        devices: DeviceState {
            serial: SerialState {
                baud_divisor_low: 12,
                interrupt_enable: 1,
                line_control: 3,
                line_status: 0x60,
                modem_control: 8,
                modem_status: 0xb0,
                scratch: 0x5a,
                in_buffer: b"typed".to_vec(),
                pending_input: b" ahead\n".to_vec(),
                ..SerialState::default()
            },
            virtio: vec![
                virtio(VirtioDeviceState::Block {
                    capacity_sectors: 1_228_800,
                    read_only: false,
                }),
                virtio(VirtioDeviceState::Entropy),
                virtio(VirtioDeviceState::Net {
                    mac: [2, 0x11, 0x22, 0x33, 0x44, 0x55],
                }),
            ],
        },
        vm_generation: Some(0xf_f000),
        vcpus: vec![vcpu(1), vcpu(2)],
    }
}

/// The least state that is valid, for tests that try every byte of it.
pub(super) fn small() -> MachineState {
    let mut state = golden();
    state.vcpus.truncate(1);
    state.vcpus[0].xsave.fill(0);
    state
}

/// Bytes with the checksum that they should have.
pub(super) fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum_at = bytes.len() - CHECKSUM_BYTES;
    let checksum = blake3::hash(&bytes[..checksum_at]);
    bytes[checksum_at..].copy_from_slice(checksum.as_bytes());
    bytes
}

pub(super) fn refusal(bytes: &[u8]) -> Error {
    MachineState::decode(bytes).expect_err("refused")
}

pub(super) fn reason(bytes: &[u8]) -> StateError {
    match refusal(bytes) {
        Error::State(reason) => reason,
        other => panic!("{other:?}"),
    }
}

fn changed(change: impl FnOnce(&mut MachineState)) -> Vec<u8> {
    let mut state = small();
    change(&mut state);
    state.encode()
}

#[test]
fn the_golden_bytes_are_this_version() {
    let decoded = MachineState::decode(GOLDEN).unwrap();
    assert_eq!(decoded.vcpus, golden().vcpus);
    assert_eq!(decoded.devices, golden().devices);
    assert_eq!(decoded.memory_bytes, golden().memory_bytes);
    assert_eq!(decoded.vm.clock_nanos, golden().vm.clock_nanos);
    let bytes = golden().encode();
    if bytes != GOLDEN {
        let written = std::env::temp_dir().join("golden-of-this-version.bin");
        std::fs::write(&written, bytes).unwrap();
        panic!(
            "the format changed: raise its version, and keep {} beside the others",
            written.display()
        );
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = small().encode();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(MachineState::decode(&flipped).is_err(), "byte {at}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small().encode();
    for length in 0..bytes.len() {
        let refused = reason(&bytes[..length]);
        assert!(
            matches!(refused, StateError::Truncated { .. }),
            "{length}: {refused}"
        );
    }
}

#[test]
fn other_files_are_told_apart_from_damaged_states() {
    for other in [&b"\x7fELF"[..], b"SNAPVMSX and more", b"S ", &[0; 4096]] {
        assert!(matches!(reason(other), StateError::NotAState));
    }
    assert!(matches!(
        reason(b""),
        StateError::Truncated { found: 0, .. }
    ));
}

#[test]
fn a_state_of_a_newer_format_is_not_called_damaged() {
    for found in [0, 3, 4, u32::MAX] {
        // Whatever its content is made of.
        let bytes = framed(found, b"something else");
        let refused = reason(&bytes);
        assert!(
            matches!(refused, StateError::Version { found: told, supported: 2 } if told == found),
            "{refused}"
        );
        assert!(refused.to_string().contains("newer snapstore"), "{refused}");
        let mut damaged = bytes;
        damaged[HEADER_BYTES] ^= 1;
        assert!(matches!(reason(&damaged), StateError::Checksum));
    }
}

#[test]
fn a_length_beyond_the_cap_is_refused_before_it_is_used() {
    for length in [MAX_CONTENT_BYTES + 1, u64::MAX] {
        let mut bytes = small().encode();
        bytes[12..20].copy_from_slice(&length.to_le_bytes());
        let refused = reason(&sealed(bytes));
        assert!(matches!(refused, StateError::TooLarge { bytes, .. } if bytes == length));
    }
}

#[test]
fn bytes_behind_the_state_are_refused() {
    let mut bytes = small().encode();
    bytes.push(0);
    assert!(matches!(
        reason(&bytes),
        StateError::TrailingBytes { extra: 1 }
    ));
}

#[test]
fn a_wrong_checksum_is_damage() {
    let mut bytes = small().encode();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    assert!(matches!(reason(&bytes), StateError::Checksum));
}

#[test]
fn impossible_memory_is_refused() {
    for size in [0, 4096, (1 << 20) + 1, (1 << 40) + 4096, u64::MAX] {
        let refused = refusal(&changed(|state| state.memory_bytes = size));
        assert!(matches!(refused, Error::MemorySize { bytes } if bytes == size));
    }
}

#[test]
fn impossible_numbers_of_vcpus_are_refused() {
    let none = refusal(&changed(|state| state.vcpus.clear()));
    assert!(matches!(none, Error::Cpus { cpus: 0, .. }));
    let many = changed(|state| state.vcpus = vec![state.vcpus[0].clone(); 65]);
    assert!(matches!(refusal(&many), Error::Cpus { cpus: 65, .. }));
    let more = changed(|state| state.vcpus = vec![state.vcpus[0].clone(); 200]);
    assert!(matches!(refusal(&more), Error::Cpus { .. }));
    let most = changed(|state| state.vcpus = vec![state.vcpus[0].clone(); 64]);
    assert_eq!(MachineState::decode(&most).unwrap().vcpus.len(), 64);
}

#[test]
fn lists_that_are_too_long_are_refused() {
    for (count, fits) in [(256, true), (257, false), (9000, false)] {
        let bytes = changed(|state| state.vcpus[0].cpuid = vec![filled(3); count]);
        assert_eq!(
            MachineState::decode(&bytes).is_ok(),
            fits,
            "{count} CPUID entries"
        );
        let bytes = changed(|state| state.vcpus[0].msrs = vec![filled(3); 4 * count]);
        assert_eq!(
            MachineState::decode(&bytes).is_ok(),
            fits,
            "{count} times 4 MSRs"
        );
        if !fits {
            assert!(matches!(
                reason(&bytes),
                StateError::TooMany {
                    cpu: 0,
                    limit: 1024,
                    ..
                }
            ));
        }
    }
}

#[test]
fn an_impossible_xsave_area_is_refused() {
    for length in [0, 4092, 4097, (64 << 10) + 4] {
        let refused = reason(&changed(|state| state.vcpus[0].xsave = vec![0; length]));
        assert!(matches!(refused, StateError::XsaveLength { bytes, .. } if bytes == length));
    }
    for length in [4096, 11008, 64 << 10] {
        MachineState::decode(&changed(|state| state.vcpus[0].xsave = vec![0; length])).unwrap();
    }
}

#[test]
fn too_much_serial_input_is_refused() {
    let fifo = reason(&changed(|state| {
        state.devices.serial.in_buffer = vec![1; 65]
    }));
    assert!(matches!(
        fifo,
        StateError::SerialInput {
            bytes: 65,
            limit: 64
        }
    ));
    let pending = changed(|state| state.devices.serial.pending_input = vec![1; 65537]);
    assert!(matches!(
        reason(&pending),
        StateError::SerialInput { bytes: 65537, .. }
    ));
}

#[test]
fn virtio_devices_in_states_that_cannot_be_are_refused() {
    type Change = fn(&mut VirtioState);
    let cases: [(&str, Change); 13] = [
        ("an unknown status", |state| state.status |= 0x10),
        ("a driver that runs without features", |state| {
            (state.status, state.queues[0].ready) = (7, false);
        }),
        ("a driver of an older virtio", |state| {
            state.driver_features = 0;
        }),
        ("an unknown interrupt", |state| state.interrupt_status = 4),
        ("an impossible number of queues", |state| {
            state.queues.clear();
        }),
        ("an impossible number of queues", |state| {
            state.queues = vec![state.queues[0]; MAX_VIRTIO_QUEUES + 1];
        }),
        ("an impossible number of queues", |state| {
            state.queues = vec![state.queues[0]; 3000];
        }),
        ("a queue in use before its features were agreed", |state| {
            state.status = 3;
        }),
        ("a queue of an impossible size", |state| {
            state.queues[0].max_size = 100;
        }),
        ("a queue of an impossible size", |state| {
            state.queues[0].size = 256;
        }),
        ("a queue of an impossible size", |state| {
            state.queues[0].size = 0;
        }),
        ("a queue at an unaligned address", |state| {
            state.queues[0].used_ring = 2;
        }),
        ("a position in a queue that is not in use", |state| {
            state.queues[0].ready = false;
        }),
    ];
    for (expected, change) in cases {
        let refused = reason(&changed(|state| change(&mut state.devices.virtio[1])));
        assert!(
            matches!(refused, StateError::Virtio { device: 1, what } if what == expected),
            "{expected}: {refused}"
        );
    }
    for count in [MAX_VIRTIO_DEVICES + 1, 500] {
        let many = changed(|state| {
            state.devices.virtio = vec![state.devices.virtio[1].clone(); count];
        });
        assert!(matches!(
            reason(&many),
            StateError::VirtioDevices { limit: 16 }
        ));
    }
}

#[test]
fn a_generation_identifier_outside_of_memory_is_refused() {
    let end = golden().memory_bytes;
    for place in [end, end - 15, u64::MAX, u64::MAX - 15, 0xd000_0000] {
        let refused = reason(&changed(|state| state.vm_generation = Some(place)));
        assert!(
            matches!(refused, StateError::VmGeneration { address } if address == place),
            "{place:#x}: {refused}"
        );
    }
    for place in [None, Some(0), Some(end - 16)] {
        let bytes = changed(|state| state.vm_generation = place);
        assert_eq!(MachineState::decode(&bytes).unwrap().vm_generation, place);
    }
}

#[test]
fn interrupt_controllers_in_each_others_place_are_refused() {
    let refused = reason(&changed(|state| {
        std::mem::swap(&mut state.vm.pic_master, &mut state.vm.ioapic);
    }));
    assert!(matches!(
        refused,
        StateError::InterruptController { index: 0, found: 2 }
    ));
}

#[test]
fn every_message_says_what_to_make_of_it() {
    for bytes in [&b"nonsense"[..], b"SNAPVMST", &[0; 0]] {
        let text = refusal(bytes).to_string();
        assert!(text.contains(';'), "{text}");
    }
}

mod payloads;

/// The largest machine fits: no state that can be saved is one that cannot be
/// read.
const _: () = {
    let vcpu = super::super::MAX_CPUID_ENTRIES * 48
        + super::super::MAX_MSRS * 24
        + super::super::MAX_XSAVE_BYTES
        + 8192;
    let devices = super::super::MAX_PENDING_INPUT_BYTES + 8192;
    assert!(((super::super::MAX_CPUS as usize * vcpu + devices) as u64) < MAX_CONTENT_BYTES);
};

pub(super) fn any_vcpu() -> impl Strategy<Value = VcpuState> {
    let sizes = (0..256_usize, 0..300_usize, 1024..1100_usize);
    (any::<u8>(), any::<u8>(), sizes).prop_map(|(seed, other, sizes)| {
        let (cpuid, msrs, xsave_words) = sizes;
        let mut state = vcpu(seed);
        state.cpuid = vec![filled(other); cpuid];
        state.msrs = vec![filled(seed); msrs];
        state.xsave = vec![other; 4 * xsave_words];
        state.events = filled(other);
        state
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_state_survives_its_bytes(
        vcpus in proptest::collection::vec(any_vcpu(), 1..6),
        pages in 256..(1_u64 << 28),
        clock_nanos in proptest::num::u64::ANY,
        input in proptest::collection::vec(proptest::num::u8::ANY, 0..2000),
    ) {
        let mut state = golden();
        state.vcpus = vcpus;
        state.memory_bytes = pages * 4096;
        state.vm.clock_nanos = clock_nanos;
        state.devices.serial.pending_input = input;
        let bytes = state.encode();
        let decoded = MachineState::decode(&bytes).unwrap();
        prop_assert_eq!(&decoded.vcpus, &state.vcpus);
        prop_assert_eq!(&decoded.devices, &state.devices);
        prop_assert!(decoded.encode() == bytes);
    }

    #[test]
    fn a_changed_state_with_a_right_checksum_is_read_as_it_is_or_refused(
        changes in proptest::collection::vec(
            (proptest::num::usize::ANY, proptest::num::u8::ANY), 1..20),
        near_start in proptest::bool::ANY,
    ) {
        let mut bytes = small().encode();
        let end = bytes.len() - CHECKSUM_BYTES;
        let reach = if near_start { end.min(64) } else { end };
        for (at, value) in changes {
            bytes[at % reach] = value;
        }
        let bytes = sealed(bytes);
        if let Ok(state) = MachineState::decode(&bytes) {
            prop_assert!(state.encode() == bytes);
        }
    }

    #[test]
    fn any_content_with_a_right_checksum_is_read_as_it_is_or_refused(
        content in proptest::collection::vec(proptest::num::u8::ANY, 0..4000),
    ) {
        let bytes = framed(VERSION, &content);
        if let Ok(state) = MachineState::decode(&bytes) {
            prop_assert!(state.encode() == bytes);
        }
    }
}
