//! Transports under drivers that do anything: [`survive`] with what [`hostile`] gives.
//! A device's test of this is beside the device.

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::net::cable;
use super::testing::Part::Writable;
use super::testing::{AVAILABLE, DATA, Driver, MEMORY_BYTES, TABLE, USED};
use super::{Block, Disk, Net, VirtioDevice};

fn disk() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    Disk::overlay("root", file, &std::env::temp_dir()).unwrap()
}

#[derive(Clone, Debug)]
pub(super) enum Hostile {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Register(u32, u32),
    Poke(u64, Vec<u8>),
    Descriptor(u64, u16, (u64, u32, u16, u16)),
    Available(u16),
    Start,
    Notify,
    Pause,
    Resume,
    Restore,
}

/// What such a driver does.
pub(super) fn hostile() -> impl Strategy<Value = Vec<Hostile>> {
    let addresses = || {
        prop_oneof![
            Just(DATA),
            Just(TABLE),
            Just(AVAILABLE),
            Just(USED),
            Just(MEMORY_BYTES as u64 - 8),
            0..MEMORY_BYTES as u64,
            any::<u64>(),
        ]
    };
    let lengths = prop_oneof![0..600_u32, Just(16), Just(32), Just(16 * 40), any::<u32>()];
    let table = prop_oneof![Just(TABLE), Just(DATA)];
    let next = prop_oneof![0..8_u16, any::<u16>()];
    let descriptor = (table, 0..8_u16, (addresses(), lengths, 0..8_u16, next))
        .prop_map(|(table, index, parts)| Hostile::Descriptor(table, index, parts));
    let register = (0..64_u32, prop_oneof![0..16_u32, any::<u32>()])
        .prop_map(|(register, value)| Hostile::Register(4 * register, value));
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    let action = prop_oneof![
        6 => descriptor,
        5 => prop_oneof![0..8_u16, any::<u16>()].prop_map(Hostile::Available),
        4 => Just(Hostile::Notify),
        3 => Just(Hostile::Start),
        2 => register,
        2 => (0..MEMORY_BYTES as u64 - 64, bytes()).prop_map(|(at, b)| Hostile::Poke(at, b)),
        1 => (prop_oneof![0..0x200_u64, any::<u64>()], bytes())
            .prop_map(|(at, b)| Hostile::Write(at, b)),
        1 => (prop_oneof![0..0x200_u64, any::<u64>()], 0..9_usize)
            .prop_map(|(at, n)| Hostile::Read(at, n)),
        1 => Just(Hostile::Pause),
        1 => Just(Hostile::Resume),
        1 => Just(Hostile::Restore),
    ];
    proptest::collection::vec(action, 1..80)
}

/// Whatever a driver does: no panic, no end without end, and no access outside
/// guest memory, which the pages around it would end.
pub(super) fn survive(device: &dyn Fn() -> Box<dyn VirtioDevice>, actions: Vec<Hostile>) {
    survive_on(0, device, actions);
}

/// The same with the driver on this queue.
fn survive_on(queue: u32, device: &dyn Fn() -> Box<dyn VirtioDevice>, actions: Vec<Hostile>) {
    let mut driver = Driver::running_on(device(), queue);
    for action in actions {
        match action {
            Hostile::Write(offset, bytes) => driver.transport.write(offset, &bytes),
            Hostile::Read(offset, length) => {
                driver.transport.read(offset, &mut vec![0; length]);
            }
            Hostile::Register(register, value) => driver.write(register, value),
            Hostile::Poke(address, bytes) => {
                driver
                    .memory
                    .write_slice(&bytes, GuestAddress(address))
                    .unwrap();
            }
            Hostile::Descriptor(table, index, parts) => driver.descriptor(table, index, parts),
            Hostile::Available(head) => driver.make_available(head),
            Hostile::Start => driver.start(u64::MAX),
            Hostile::Notify => driver.notify(),
            Hostile::Pause => driver.transport.quiesce(),
            Hostile::Resume => driver.transport.resume(),
            Hostile::Restore => {
                driver.transport.quiesce();
                let saved = driver.transport.save();
                driver = driver.restored(device(), &saved);
                assert_eq!(driver.transport.save().queues, saved.queues);
                driver.transport.resume();
            }
        }
    }
    // Whatever state it is in, it starts again.
    driver.transport.resume();
    driver.start(u64::MAX);
    driver.submit(&[Writable(8)]);
    driver.notify();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_hostile_driver_of_a_disk_gets_nowhere(actions in hostile()) {
        let disk = disk();
        survive(&|| Box::new(Block::new(disk.clone())), actions);
    }

    #[test]
    fn a_hostile_driver_of_a_network_gets_nowhere(queue in 0..2_u32, actions in hostile()) {
        let mut others = Vec::new();
        let network = || {
            // One end is the host's, with something to receive.
            let (tap, other) = cable();
            for length in [1, 12, 26, 100, 1526, 9000] {
                rustix::io::write(&other, &vec![0x5a; length]).unwrap();
            }
            (Box::new(Net::new(Some(tap), None).unwrap()), other)
        };
        let others = std::cell::RefCell::new(&mut others);
        let device = || -> Box<dyn VirtioDevice> {
            let (device, other) = network();
            others.borrow_mut().push(other);
            device
        };
        survive_on(queue, &device, actions);
    }

    #[test]
    fn a_hostile_driver_without_a_cable_gets_nowhere(queue in 0..2_u32, actions in hostile()) {
        survive_on(queue, &|| Box::new(Net::new(None, None).unwrap()), actions);
    }
}
