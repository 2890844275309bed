//! A device whose thread gives the guest what comes, while the driver works.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::time::Duration;

use virtio_bindings::virtio_mmio::*;

use super::super::*;
use super::{cable, device, eventually, frame, send};
use crate::devices::virtio::testing::Driver;
use crate::devices::virtio::testing::Part::{self, Writable};

/// The driver's parts as long as its device has a thread.
struct Shared {
    transport: Arc<Mutex<Transport>>,
    driver: Driver,
}

/// A driver on the queue of receiving with so many buffers, whose device has a
/// thread.
fn shared(buffers: usize) -> (Shared, OwnedFd) {
    let (tap, other) = cable();
    let mut driver = Driver::running(device(Some(tap), 1));
    for _ in 0..buffers {
        driver.submit(&[Writable(2000)]);
    }
    let placeholder = Transport::new(device(None, 9), driver.memory.clone(), Box::new(|| ()));
    let transport = std::mem::replace(&mut driver.transport, placeholder).shared();
    let shared = Shared { transport, driver };
    shared.notify();
    (shared, other)
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Transport> {
        self.transport.lock().unwrap()
    }

    fn notify(&self) {
        self.lock().write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]);
    }

    fn interrupt_status(&self) -> u8 {
        let mut data = [0; 4];
        self.lock()
            .read(VIRTIO_MMIO_INTERRUPT_STATUS.into(), &mut data);
        data[0]
    }
}

#[test]
fn the_thread_gives_the_guest_what_comes() {
    let (mut shared, other) = shared(200);
    for round in 0..200_usize {
        send(&other, &frame(60 + round));
        eventually("the frame is there", || match shared.driver.take_used() {
            None => false,
            used => {
                assert_eq!(used, Some((1, 72 + round as u32)));
                true
            }
        });
        // It comes after the buffer, which was looked at without it.
        eventually("one interrupt", || shared.driver.interrupts() == 1);
    }
    let parts: [Part<'_>; 1] = [Writable(2000)];
    assert!(shared.driver.written(&parts)[12..][..259] == frame(259));
}

#[test]
fn nobody_works_for_a_guest_without_buffers() {
    let (shared, other) = shared(1);
    send(&other, &frame(60));
    send(&other, &frame(61));
    send(&other, &frame(62));
    let before = net_threads();
    std::thread::sleep(Duration::from_millis(500));
    // Those of other tests come and go.
    for (thread, worked) in net_threads() {
        let Some(before) = before.get(&thread) else {
            continue;
        };
        let busy = worked.saturating_sub(*before);
        assert!(busy < Duration::from_millis(100), "{busy:?}");
    }
    drop(shared);
}

/// The threads of network devices in this process, and how long each has worked.
fn net_threads() -> HashMap<OsString, Duration> {
    let mut threads = HashMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap();
        // A thread may have ended.
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm") == "net\n"
            && let Some(nanos) = read("schedstat").split(' ').next()
            && let Ok(nanos) = nanos.parse()
        {
            threads.insert(task.file_name(), Duration::from_nanos(nanos));
        }
    }
    threads
}

#[test]
fn a_quiet_device_leaves_frames_with_the_host() {
    let (mut shared, other) = shared(2);
    shared.lock().quiesce();
    send(&other, &frame(60));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(shared.driver.take_used(), None);
    assert_eq!(shared.driver.interrupts(), 0);
    shared.lock().resume();
    eventually("the frame is there", || {
        shared.driver.take_used() == Some((1, 72))
    });
    // The thread waits for more.
    send(&other, &frame(61));
    eventually("the next is there", || {
        shared.driver.take_used() == Some((1, 73))
    });
}

#[test]
fn a_lost_tap_is_a_link_that_is_down() {
    let (shared, other) = shared(2);
    drop(other);
    eventually("the driver is told", || shared.interrupt_status() & 2 != 0);
    let mut bytes = [0xff; 8];
    shared.lock().read(VIRTIO_MMIO_CONFIG.into(), &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 0, 0]);
    let interface = shared.lock().device().interface().unwrap();
    assert!(!interface.network().link_up);
    shared.notify();
}

#[test]
fn whether_the_link_is_up_is_known_while_the_device_works() {
    let (shared, other) = shared(2);
    let interface = shared.lock().device().interface().unwrap();
    let device = shared.lock();
    assert!(interface.network().link_up);
    drop(device);
    drop(other);
    eventually("the link is down", || !interface.network().link_up);
}

#[test]
fn news_for_a_stopped_machine_comes_when_it_runs() {
    let (shared, other) = shared(1);
    shared.lock().quiesce();
    drop(other);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(
        (shared.interrupt_status(), shared.driver.interrupts()),
        (0, 0)
    );
    shared.lock().resume();
    eventually("the driver is told", || shared.interrupt_status() & 2 != 0);
}
