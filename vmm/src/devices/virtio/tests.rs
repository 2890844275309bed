//! Transports: what drivers do right and wrong, and restoring them.

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::testing::Part::{Readable, Writable};
use super::testing::{AVAILABLE, DATA, Driver, INDIRECT_FLAG, MEMORY_BYTES, NEXT, TABLE, WRITE};
use super::*;
use crate::state::VirtioState;

const RUNNING: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

fn entropy() -> Box<dyn VirtioDevice> {
    Box::new(Entropy::new())
}

fn disk() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    Disk::overlay("root", file, &std::env::temp_dir()).unwrap()
}

fn needs_reset(driver: &Driver) -> bool {
    driver.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
}

#[test]
fn windows_and_interrupts_do_not_overlap() {
    let gsis: std::collections::BTreeSet<_> = (0..16).map(|at| virtio_gsi(at).unwrap()).collect();
    assert_eq!(gsis.len(), 16);
    assert!(!gsis.contains(&4) && gsis.iter().all(|gsi| *gsi < 23));
    assert_eq!(virtio_gsi(16), None);
    assert_eq!(virtio_address(15), 0xd000_f000);
}

#[test]
fn the_registers_are_those_of_a_modern_device() {
    let driver = Driver::new(entropy());
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    let mut narrow = [0xff; 2];
    driver.transport.read(0, &mut narrow);
    assert_eq!(narrow, [0; 2]);
}

#[test]
fn an_interrupt_is_told_until_it_is_acknowledged() {
    let mut driver = Driver::running(entropy());
    driver.request(&[Writable(8)]);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_that_looks_anyway_is_not_interrupted() {
    let mut driver = Driver::running(entropy());
    let flags = GuestAddress(AVAILABLE);
    driver.memory.write_obj(1_u16, flags).unwrap();
    driver.submit(&[Writable(8)]);
    driver.notify();
    assert_eq!(driver.take_used(), Some((1, 8)));
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.interrupts(), 0);
    driver.memory.write_obj(0_u16, flags).unwrap();
    driver.request(&[Writable(8)]);
}

#[test]
fn a_driver_must_take_version_1_and_only_what_is_offered() {
    let mut driver = Driver::new(entropy());
    let offered = driver.features();
    assert_eq!(offered, 1 << 32 | 1 << 28);
    for features in [0, 1 << 28, offered | 1, offered | 1 << 63] {
        driver.write(VIRTIO_MMIO_STATUS, 0);
        driver.take_features(features);
        driver.write(VIRTIO_MMIO_STATUS, RUNNING);
        assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 3, "{features:#x}");
    }
    driver.transport.resume();
    driver.start(1 << 32);
    // They stand from then on.
    driver.take_features(0);
    assert_eq!(driver.transport.save().driver_features, 1 << 32);
}

#[test]
fn nothing_is_worked_on_before_the_driver_is_ready() {
    let mut driver = Driver::new(entropy());
    driver.transport.resume();
    driver.take_features(1 << 32);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.write(VIRTIO_MMIO_STATUS, RUNNING & !VIRTIO_CONFIG_S_DRIVER_OK);
    driver.set_up_queue(0);
    driver.submit(&[Writable(8)]);
    driver.notify();
    assert_eq!((driver.take_used(), driver.interrupts()), (None, 0));
    // What was notified too early is done with the driver's last step.
    driver.write(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.take_used(), Some((1, 8)));
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_reset_forgets_all_and_the_device_starts_again() {
    let mut driver = Driver::running(entropy());
    driver.request(&[Writable(8)]);
    driver.write(VIRTIO_MMIO_STATUS, 0);
    for register in [
        VIRTIO_MMIO_STATUS,
        VIRTIO_MMIO_INTERRUPT_STATUS,
        VIRTIO_MMIO_QUEUE_READY,
    ] {
        assert_eq!(driver.read(register), 0);
    }
    driver.submit(&[Writable(8)]);
    driver.notify();
    assert_eq!(driver.take_used(), None);
    driver.start(u64::MAX);
    driver.request(&[Writable(8)]);
}

#[test]
fn queues_that_cannot_be_make_the_device_wait_for_a_reset() {
    let cases: &[(u32, u32)] = &[
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 256),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0001),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, 8),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, 1),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 2),
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, 1),
        (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, u32::MAX),
        (VIRTIO_MMIO_QUEUE_USED_LOW, MEMORY_BYTES as u32 - 64),
    ];
    for (register, value) in cases {
        let mut driver = Driver::running(entropy());
        driver.write(VIRTIO_MMIO_QUEUE_READY, 0);
        driver.write(*register, *value);
        driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
        assert!(needs_reset(&driver), "{register:#x} = {value:#x}");
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(driver.interrupts(), 1);
        driver.start(u64::MAX);
        driver.request(&[Writable(8)]);
    }
}

#[test]
fn chains_that_are_none_make_the_device_wait_for_a_reset() {
    let data = DATA;
    type Descriptors<'a> = &'a [(u16, (u64, u32, u16, u16))];
    let cases: &[(&str, u16, Descriptors<'_>)] = &[
        ("a loop of one", 0, &[(0, (data, 8, NEXT | WRITE, 0))]),
        (
            "a loop of two",
            0,
            &[
                (0, (data, 8, NEXT | WRITE, 1)),
                (1, (data, 8, NEXT | WRITE, 0)),
            ],
        ),
        ("a head out of the table", 64, &[]),
        (
            "a next out of the table",
            0,
            &[(0, (data, 8, NEXT | WRITE, 64))],
        ),
        (
            "an indirect table of odd length",
            0,
            &[(0, (data, 17, INDIRECT_FLAG, 0))],
        ),
        (
            "an empty indirect table",
            0,
            &[(0, (data, 0, INDIRECT_FLAG, 0))],
        ),
        (
            "an indirect table nowhere",
            0,
            &[(0, (1 << 60, 16, INDIRECT_FLAG, 0))],
        ),
        (
            "an indirect table at the end",
            0,
            &[(0, (u64::MAX - 7, 16, INDIRECT_FLAG, 0))],
        ),
        (
            "an indirect table in itself",
            0,
            &[(0, (TABLE, 16, INDIRECT_FLAG, 0))],
        ),
        (
            "more than 4 GiB",
            0,
            &[
                (0, (data, u32::MAX, NEXT | WRITE, 1)),
                (1, (data, u32::MAX, WRITE, 0)),
            ],
        ),
        (
            "readable after writable",
            0,
            &[(0, (data, 8, NEXT | WRITE, 1)), (1, (data, 8, 0, 0))],
        ),
        ("a buffer nowhere", 0, &[(0, (1 << 60, 8, WRITE, 0))]),
        (
            "a buffer across the end",
            0,
            &[(0, (MEMORY_BYTES as u64 - 4, 8, WRITE, 0))],
        ),
    ];
    for (name, head, descriptors) in cases {
        let mut driver = Driver::running(entropy());
        for (index, parts) in *descriptors {
            driver.descriptor(TABLE, *index, *parts);
        }
        driver.make_available(*head);
        driver.notify();
        assert!(needs_reset(&driver), "{name}");
        assert_eq!(driver.take_used(), None, "{name}");
        assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 2, "{name}");
        // Nothing more is worked on.
        driver.submit(&[Writable(8)]);
        driver.notify();
        assert_eq!(driver.take_used(), None, "{name}");
    }
}

#[test]
fn a_chain_is_no_longer_than_its_queue_even_through_an_indirect_table() {
    let size = Entropy::new().queue_sizes()[0];
    for (count, fits) in [(size, true), (size + 1, false), (2000, false)] {
        let mut driver = Driver::running(entropy());
        for index in 0..count {
            let next = if index + 1 < count { NEXT } else { 0 };
            driver.descriptor(DATA, index, (8, 1, next | WRITE, index + 1));
        }
        let length = 16 * u32::from(count);
        driver.descriptor(TABLE, 0, (DATA, length, INDIRECT_FLAG, 0));
        driver.make_available(0);
        driver.notify();
        assert_eq!(needs_reset(&driver), !fits, "{count}");
        assert_eq!(driver.take_used(), fits.then_some((0, size.into())));
    }
}

#[test]
fn more_available_than_a_queue_holds_is_none() {
    let mut driver = Driver::running(entropy());
    driver
        .memory
        .write_obj(65_u16, GuestAddress(AVAILABLE + 2))
        .unwrap();
    driver.notify();
    assert!(needs_reset(&driver));
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let disk = disk();
    let block = || Box::new(Block::new(disk.clone()));
    let mut driver = Driver::running(block());
    let write = [1_u32.to_le_bytes(), [0; 4], 5_u32.to_le_bytes(), [0; 4]].concat();
    let read = [0_u32.to_le_bytes(), [0; 4], 5_u32.to_le_bytes(), [0; 4]].concat();
    // Past the end of the rings.
    for round in 0..300_u32 {
        let (_, status) =
            driver.request(&[Readable(&write), Readable(&[round as u8; 512]), Writable(1)]);
        assert_eq!(status, [0]);
    }
    // Made available, with the notification lost.
    let parts = [Readable(&read), Writable(512), Writable(1)];
    driver.submit(&parts);
    driver.transport.quiesce();
    driver.notify();
    assert_eq!(driver.take_used(), None, "a quiet device works");
    let saved = driver.transport.save();
    assert_eq!(saved.queues[0].next_available, 300);

    let mut driver = driver.restored(block(), &saved);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    assert_eq!(driver.take_used(), None);
    assert_eq!(driver.transport.save(), saved);
    driver.transport.resume();
    assert_eq!(driver.take_used(), Some((1, 513)));
    assert_eq!(driver.written(&parts)[..512], [299_u32 as u8; 512]);
    driver.interrupts();
    driver.request(&[Readable(&read), Writable(512), Writable(1)]);
}

#[test]
fn what_waited_for_a_quiet_device_is_done_when_it_runs() {
    let mut driver = Driver::running(entropy());
    driver.transport.quiesce();
    driver.submit(&[Writable(8)]);
    driver.transport.serve(0);
    assert_eq!((driver.take_used(), driver.interrupts()), (None, 0));
    driver.transport.resume();
    assert_eq!((driver.take_used(), driver.interrupts()), (Some((1, 8)), 1));
    driver.transport.serve(7);
}

#[test]
fn states_of_other_devices_are_refused() {
    let disk = disk();
    let driver = Driver::running(Box::new(Block::new(disk.clone())));
    let saved = driver.transport.save();
    let refusal = |change: &dyn Fn(&mut VirtioState)| {
        let mut state = saved.clone();
        change(&mut state);
        let block = Box::new(Block::new(disk.clone()));
        Transport::restore(block, driver.memory.clone(), Box::new(|| {}), &state).err()
    };
    assert_eq!(refusal(&|_| {}), None);
    type Change<'a> = &'a dyn Fn(&mut VirtioState);
    let cases: [(&str, Change<'_>); 7] = [
        ("kind", &|state| state.device = VirtioDeviceState::Entropy),
        ("the size of its disk", &|state| {
            state.device = VirtioDeviceState::Block {
                capacity_sectors: 2049,
                read_only: false,
            };
        }),
        ("its queues", &|state| state.queues.push(state.queues[0])),
        ("its queues", &|state| state.queues[0].max_size = 64),
        ("its features", &|state| state.driver_features |= 1 << 50),
        ("where its queues are", &|state| {
            state.queues[0].used_ring = MEMORY_BYTES as u64
        }),
        ("where its queues are", &|state| state.queues[0].size = 77),
    ];
    for (what, change) in cases {
        assert_eq!(refusal(change), Some(what));
    }
}
