//! A driver for the tests: it builds rings in guest memory and works the
//! registers of a transport.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
};
use virtio_bindings::virtio_mmio::*;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::{Interrupt, Transport, VirtioDevice};
use crate::confine::testing::as_vcpu;
use crate::state::{VirtioState, through_its_bytes};

pub(super) const MEMORY_BYTES: usize = 4 << 20;
const GUARD_BYTES: usize = 64 << 10;
/// Where the queue's parts are, and an indirect table.
pub(super) const TABLE: u64 = 0x1_0000;
pub(super) const AVAILABLE: u64 = 0x2_0000;
pub(super) const USED: u64 = 0x3_0000;
const INDIRECT: u64 = 0x4_0000;
/// Where the requests' buffers are.
pub(super) const DATA: u64 = 0x10_0000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT_FLAG: u16 = 4;

/// Guest memory between pages that end the process when they are touched.
pub(super) fn guarded_memory() -> GuestMemoryMmap<()> {
    // Before a device starts its threads.
    as_vcpu(|| ());
    let length = MEMORY_BYTES + 2 * GUARD_BYTES;
    // SAFETY: a new mapping, of no access.
    let start = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0)
    };
    assert_ne!(start, libc::MAP_FAILED);
    let memory = start.cast::<u8>().wrapping_add(GUARD_BYTES);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the middle of the mapping, which nothing else knows of.
    assert_eq!(
        unsafe { libc::mprotect(memory.cast(), MEMORY_BYTES, access) },
        0
    );
    // SAFETY: as above; it stays mapped as long as the process lives.
    let builder = unsafe { MmapRegionBuilder::new(MEMORY_BYTES).with_raw_mmap_pointer(memory) };
    let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

/// A part of a request.
pub(super) enum Part<'a> {
    /// The device reads these bytes.
    Readable(&'a [u8]),
    /// The device may write so many bytes.
    Writable(usize),
}

/// It works on one queue at a time.
pub(super) struct Driver {
    pub transport: Transport,
    pub memory: GuestMemoryMmap<()>,
    /// Which queue that is.
    pub queue: u32,
    interrupts: Arc<AtomicUsize>,
    available: u16,
    used: u16,
    /// Requests go through an indirect table.
    pub indirect: bool,
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::over(guarded_memory(), device, |device, memory, interrupt| {
            Transport::new(device, memory, interrupt)
        })
    }

    fn over(
        memory: GuestMemoryMmap<()>,
        device: Box<dyn VirtioDevice>,
        make: impl FnOnce(Box<dyn VirtioDevice>, GuestMemoryMmap<()>, Interrupt) -> Transport,
    ) -> Self {
        let interrupts = Arc::new(AtomicUsize::new(0));
        let counter = interrupts.clone();
        let interrupt = Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        Self {
            transport: make(device, memory.clone(), interrupt),
            memory,
            queue: 0,
            interrupts,
            available: 0,
            used: 0,
            indirect: false,
        }
    }

    /// The same driver with its device restored into another transport, from the bytes of
    /// its state.
    pub fn restored(self, device: Box<dyn VirtioDevice>, state: &VirtioState) -> Self {
        let state = &through_its_bytes(state);
        let restored = Self::over(self.memory, device, |device, memory, interrupt| {
            Transport::restore(device, memory, interrupt, state).unwrap()
        });
        Self {
            queue: self.queue,
            available: self.available,
            used: self.used,
            indirect: self.indirect,
            ..restored
        }
    }

    /// A driver of a device that runs and whose driver took all features.
    pub fn running(device: Box<dyn VirtioDevice>) -> Self {
        Self::running_on(device, 0)
    }

    /// The same, working on this queue.
    pub fn running_on(device: Box<dyn VirtioDevice>, queue: u32) -> Self {
        let mut driver = Self::new(device);
        driver.queue = queue;
        driver.transport.resume();
        driver.start(u64::MAX);
        driver
    }

    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: u32, value: u32) {
        let transport = &mut self.transport;
        as_vcpu(|| transport.write(register.into(), &value.to_le_bytes()));
    }

    /// How many interrupts there were since it was asked last.
    pub fn interrupts(&self) -> usize {
        self.interrupts.swap(0, Ordering::Relaxed)
    }

    pub fn features(&mut self) -> u64 {
        let mut half = |select| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub fn take_features(&mut self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
    }

    /// Virtio 1.2, section 3.1.1, with one queue only.
    pub fn start(&mut self, features: u64) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        let offered = self.features();
        self.take_features(features & offered);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.read(VIRTIO_MMIO_STATUS) & FEATURES_OK, 0);
        self.set_up_queue(self.queue);
        let running = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.write(VIRTIO_MMIO_STATUS, running);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), running);
    }

    pub fn set_up_queue(&mut self, queue: u32) {
        (self.available, self.used) = (0, 0);
        for ring in [AVAILABLE, USED] {
            self.memory.write_obj(0_u32, GuestAddress(ring)).unwrap();
        }
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        let size = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
        self.write(VIRTIO_MMIO_QUEUE_NUM, size);
        for (low, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, TABLE),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
            (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.read(VIRTIO_MMIO_QUEUE_READY), 1);
    }

    pub fn descriptor(&self, table: u64, index: u16, parts: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = parts;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn size(&self) -> u16 {
        self.transport.device().queue_sizes()[self.queue as usize]
    }

    /// Makes the chain that begins at descriptor `head` available.
    pub fn make_available(&mut self, head: u16) {
        let size = self.size();
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % size);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory
            .write_obj(self.available, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    /// Lays a request out and makes it available; the device is not notified.
    pub fn submit(&mut self, parts: &[Part<'_>]) {
        let (table, first) = if self.indirect {
            (INDIRECT, 0)
        } else {
            (TABLE, 1)
        };
        let mut address = DATA;
        for (index, part) in (first..).zip(parts) {
            let last = usize::from(index - first) + 1 == parts.len();
            let next = if last { 0 } else { NEXT };
            let (length, flags) = match part {
                Part::Readable(bytes) => {
                    self.memory
                        .write_slice(bytes, GuestAddress(address))
                        .unwrap();
                    (bytes.len(), next)
                }
                Part::Writable(length) => {
                    let poison = vec![0xee; *length];
                    self.memory
                        .write_slice(&poison, GuestAddress(address))
                        .unwrap();
                    (*length, next | WRITE)
                }
            };
            self.descriptor(table, index, (address, length as u32, flags, index + 1));
            address += length as u64 + 3;
        }
        if self.indirect {
            let length = 16 * parts.len() as u32;
            self.descriptor(TABLE, 1, (INDIRECT, length, INDIRECT_FLAG, 0));
        }
        self.make_available(1);
    }

    pub fn notify(&mut self) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, self.queue);
    }

    /// The next used buffer: its head and how much was written.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let size = self.size();
        let entry = USED + 4 + 8 * u64::from(self.used % size);
        self.used = self.used.wrapping_add(1);
        Some((
            self.memory.read_obj(GuestAddress(entry)).unwrap(),
            self.memory.read_obj(GuestAddress(entry + 4)).unwrap(),
        ))
    }

    /// What the writable parts of the last request hold.
    pub fn written(&self, parts: &[Part<'_>]) -> Vec<u8> {
        let mut all = Vec::new();
        let mut address = DATA;
        for part in parts {
            let length = match part {
                Part::Readable(bytes) => bytes.len(),
                Part::Writable(length) => {
                    let mut bytes = vec![0; *length];
                    self.memory
                        .read_slice(&mut bytes, GuestAddress(address))
                        .unwrap();
                    all.extend(bytes);
                    *length
                }
            };
            address += length as u64 + 3;
        }
        all
    }

    /// Has a request done; returns what the device says it wrote, and the
    /// writable parts.
    pub fn request(&mut self, parts: &[Part<'_>]) -> (u32, Vec<u8>) {
        self.submit(parts);
        self.notify();
        let (head, length) = self.take_used().expect("the request was answered");
        assert_eq!(head, 1);
        assert_eq!(self.interrupts(), 1);
        (length, self.written(parts))
    }
}
