//! Frames between a driver and the host's end, which is a socket; in `tap` it is a real one.

mod tap;
mod thread;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::virtio_mmio::*;

use super::super::testing::Driver;
use super::super::testing::Part::{Readable, Writable};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
const HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Something like a tap, and its other end.
pub(in super::super) fn cable() -> (Tap, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Tap::from_fd(tap), other)
}

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last]).unwrap()
}

fn device(tap: Option<Tap>, last: u8) -> Box<Net> {
    Box::new(Net::new(tap, Some(mac(last))).unwrap())
}

/// A driver on the queue, and the host's end.
fn driver(queue: usize) -> (Driver, OwnedFd) {
    let (tap, other) = cable();
    let driver = Driver::running_on(device(Some(tap), 1), queue as u32);
    (driver, other)
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 + 1).collect()
}

/// A frame as the host sends it: what is in its header does not matter.
fn send(other: &OwnedFd, frame: &[u8]) {
    let bytes = [&[0xff; HEADER_BYTES], frame].concat();
    assert_eq!(rustix::io::write(other, &bytes).unwrap(), bytes.len());
}

fn receive(other: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES + MAX_FRAME_BYTES + 1];
    match rustix::io::read(other, &mut bytes) {
        Ok(length) => {
            bytes.truncate(length);
            assert_eq!(bytes[..HEADER_BYTES], [0; HEADER_BYTES]);
            Some(bytes.split_off(HEADER_BYTES))
        }
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("{error}"),
    }
}

fn config(driver: &Driver) -> [u8; 10] {
    let mut bytes = [0xff; 10];
    driver.transport.read(VIRTIO_MMIO_CONFIG.into(), &mut bytes);
    bytes
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_driver_learns_address_and_link() {
    let (mut driver, _other) = driver(RECEIVE);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 1);
    assert_eq!(driver.features(), 1 << 32 | 1 << 28 | 1 << 16 | 1 << 5);
    assert_eq!(config(&driver), [2, 0, 0, 0, 0, 1, 1, 0, 0, 0]);
    // It cannot be changed, nor read beyond its end.
    driver.transport.write(VIRTIO_MMIO_CONFIG.into(), &[9; 8]);
    let mut bytes = [0xff; 4];
    driver
        .transport
        .read(u64::from(VIRTIO_MMIO_CONFIG) + 5, &mut bytes);
    assert_eq!(bytes, [1, 1, 0, 0]);
    driver.transport.read(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 4]);
    let down = Driver::running(device(None, 7));
    assert_eq!(config(&down), [2, 0, 0, 0, 0, 7, 0, 0, 0, 0]);
    let network = down.transport.device().interface().unwrap().network();
    assert!(!network.link_up && network.tap.is_none());
}

#[test]
fn random_addresses_differ() {
    let random = || Net::new(None, None).unwrap().mac;
    assert_ne!(random(), random());
    assert_eq!(random().bytes()[0] & 3, 2);
}

#[test]
fn what_the_guest_sends_reaches_the_host() {
    let (mut driver, other) = driver(SEND);
    for indirect in [false, true] {
        driver.indirect = indirect;
        for length in [MIN_FRAME_BYTES, 1514, 9000, MAX_FRAME_BYTES] {
            let frame = frame(length);
            let (head, tail) = frame.split_at(length / 3);
            // A header that asks for offloads which were not agreed on.
            let parts = [
                Readable(&[0xff; 5]),
                Readable(&[0xff; 7]),
                Readable(head),
                Readable(tail),
            ];
            assert_eq!(driver.request(&parts).0, 0);
            assert!(receive(&other).as_ref() == Some(&frame), "{length}");
            let whole = [&[1; HEADER_BYTES][..], &frame].concat();
            driver.request(&[Readable(&whole)]);
            assert!(receive(&other) == Some(frame), "{length} in one part");
        }
    }
}

#[test]
fn what_is_no_frame_is_consumed() {
    let (mut driver, other) = driver(SEND);
    for length in [0, 1, 11, 12, HEADER_BYTES + MIN_FRAME_BYTES - 1] {
        driver.request(&[Readable(&frame(length))]);
    }
    driver.request(&[Writable(100)]);
    let long = frame(HEADER_BYTES + MAX_FRAME_BYTES + 1);
    driver.request(&[Readable(&long[..10]), Readable(&long[10..])]);
    assert_eq!(receive(&other), None);
    let frame = frame(60);
    driver.request(&[Readable(&[0; HEADER_BYTES]), Readable(&frame), Writable(9)]);
    assert_eq!(receive(&other), Some(frame));
}

#[test]
fn a_host_that_takes_nothing_costs_frames_only() {
    let (mut driver, other) = driver(SEND);
    let parts = [Readable(&[0; HEADER_BYTES]), Readable(&[7; 60_000])];
    for _ in 0..100 {
        driver.request(&parts);
    }
    let mut arrived = 0;
    while receive(&other).is_some() {
        arrived += 1;
    }
    assert!((1..100).contains(&arrived), "{arrived}");
    driver.request(&parts);
    assert_eq!(receive(&other).map(|frame| frame.len()), Some(60_000));
}

#[test]
fn what_the_host_sends_waits_for_a_buffer() {
    let (mut driver, other) = driver(RECEIVE);
    let frames = [frame(60), frame(1514), frame(3)];
    driver.notify();
    for frame in &frames {
        send(&other, frame);
    }
    driver.notify();
    assert_eq!((driver.take_used(), driver.interrupts()), (None, 0));
    for frame in &frames[..2] {
        let length = HEADER_BYTES + frame.len();
        let (written, bytes) = driver.request(&[Writable(5), Writable(2000)]);
        assert_eq!(written as usize, length);
        assert!(bytes[..length] == [&HEADER[..], frame].concat());
        assert!(bytes[length..].iter().all(|byte| *byte == 0xee));
    }
    // It is none; the buffer is given back.
    assert_eq!(driver.request(&[Writable(2000)]).0, 0);
    // Nothing is left: the buffer stays with the device.
    driver.submit(&[Writable(2000)]);
    driver.notify();
    assert_eq!((driver.take_used(), driver.interrupts()), (None, 0));
}

#[test]
fn frames_without_a_form_are_dropped_and_the_link_stays() {
    // Each of its reads is EINVAL.
    let flags = rustix::event::epoll::CreateFlags::CLOEXEC;
    let tap = Tap::from_fd(rustix::event::epoll::create(flags).unwrap());
    let mut driver = Driver::running(device(Some(tap), 1));
    driver.submit(&[Writable(2000)]);
    for _ in 0..3 {
        // Comes to an end, and keeps the buffer.
        driver.notify();
        assert_eq!((driver.take_used(), driver.interrupts()), (None, 0));
    }
    assert_eq!(config(&driver)[6..8], [1, 0]);
}

#[test]
fn a_frame_that_is_too_long_is_lost_and_not_cut() {
    let (mut driver, other) = driver(RECEIVE);
    let room = HEADER_BYTES + MAX_FRAME_BYTES + 100;
    for length in [MAX_FRAME_BYTES + 1, MAX_FRAME_BYTES + 50] {
        send(&other, &frame(length));
        let (written, bytes) = driver.request(&[Writable(room)]);
        assert_eq!(written, 0, "{length}");
        assert!(bytes.iter().all(|byte| *byte == 0xee));
    }
    send(&other, &frame(MAX_FRAME_BYTES));
    let (written, _) = driver.request(&[Writable(room)]);
    assert_eq!(written as usize, HEADER_BYTES + MAX_FRAME_BYTES);
}

#[test]
fn a_frame_that_does_not_fit_is_lost_and_nothing_written() {
    let (mut driver, other) = driver(RECEIVE);
    for parts in [
        &[Writable(71)][..],
        &[Readable(&[0; 100]), Writable(1)],
        &[Readable(b"x")],
    ] {
        send(&other, &frame(60));
        let (written, bytes) = driver.request(parts);
        assert_eq!(written, 0);
        assert!(bytes.iter().all(|byte| *byte == 0xee));
    }
    send(&other, &frame(60));
    assert_eq!(driver.request(&[Writable(72)]).0, 72);
}

#[test]
fn a_restored_device_has_an_address_of_its_own() {
    let (mut driver, other) = driver(RECEIVE);
    driver.submit(&[Writable(2000)]);
    driver.submit(&[Writable(2000)]);
    driver.notify();
    driver.transport.quiesce();
    let saved = driver.transport.save();
    assert_eq!(
        saved.device,
        VirtioDeviceState::Net {
            mac: mac(1).bytes()
        }
    );
    drop(other);

    let (tap, other) = cable();
    let mut driver = driver.restored(device(Some(tap), 2), &saved);
    send(&other, &frame(60));
    assert_eq!(driver.take_used(), None);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.transport.resume();
    // The driver is to look at both.
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(config(&driver), [2, 0, 0, 0, 0, 2, 1, 0, 0, 0]);
    assert_eq!(driver.take_used(), Some((1, 72)));
    let network = driver.transport.device().interface().unwrap().network();
    assert_eq!((network.mac, network.saved_mac), (mac(2), Some(mac(1))));

    // Without a tap, its link is down.
    driver.transport.quiesce();
    let saved = driver.transport.save();
    let mut driver = driver.restored(device(None, 3), &saved);
    driver.transport.resume();
    assert_eq!(config(&driver), [2, 0, 0, 0, 0, 3, 0, 0, 0, 0]);
    driver.notify();
    assert_eq!(driver.take_used(), None);
}

#[test]
fn without_a_tap_what_is_sent_is_dropped() {
    let mut driver = Driver::running_on(device(None, 1), SEND as u32);
    driver.request(&[Readable(&[0; HEADER_BYTES]), Readable(&frame(60))]);
}

#[test]
fn states_of_other_devices_are_refused() {
    let mut net = device(None, 1);
    assert_eq!(net.restore(&VirtioDeviceState::Entropy), Err("kind"));
    for mac in [[0; 6], [0xff; 6], [1, 0, 0, 0, 0, 1]] {
        let state = VirtioDeviceState::Net { mac };
        assert_eq!(net.restore(&state), Err("address"));
    }
    assert_eq!(net.restore(&VirtioDeviceState::Net { mac: [2; 6] }), Ok(()));
}
