//! A guest's driver for the tests, with its three queues.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::super::super::testing::{NEXT, WRITE, guarded_memory};
use super::super::super::{Transport, VirtioDevice};
use super::super::packet::{HEADER_BYTES, HOST_CID, Header, Operation, Ports, TYPE_STREAM};
use super::super::{EVENTS, RECEIVE, SEND};
use crate::confine::testing::as_vcpu;
use crate::state::VirtioState;

/// How long a packet may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How long to look for what must not come.
pub(super) const MOMENT: Duration = Duration::from_millis(100);

const SIZE: u16 = 32;
/// The second half of the descriptors are for payloads.
const SLOTS: u16 = SIZE / 2;
const RECEIVE_BYTES: u32 = 4096;
const SLOT_BYTES: u64 = 0x1_8000;

pub(super) struct Guest {
    pub transport: Arc<Mutex<Transport>>,
    pub memory: GuestMemoryMmap<()>,
    pub cid: u64,
    available: [u16; 3],
    used: [u16; 3],
    /// What it tells of its buffer, and how much it took out of it.
    pub buffer_bytes: u32,
    pub taken_bytes: u32,
}

fn ring(queue: usize) -> u64 {
    0x1_0000 + 0x1_0000 * queue as u64
}

fn slot(queue: usize, slot: u16) -> u64 {
    0x5_0000 + (queue as u64 * 8 + u64::from(slot % 8)) * SLOT_BYTES
}

impl Guest {
    /// A driver that runs, with buffers for packets and events.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let memory = guarded_memory();
        let transport = Transport::new(Box::new(device), memory.clone(), Box::new(|| ()));
        let mut guest = Self::over(memory, transport.shared());
        guest.lock().resume();
        guest.start();
        guest.post(RECEIVE, 8);
        guest.post(EVENTS, 4);
        guest
    }

    fn over(memory: GuestMemoryMmap<()>, transport: Arc<Mutex<Transport>>) -> Self {
        Self {
            transport,
            memory,
            cid: 3,
            available: [0; 3],
            used: [0; 3],
            buffer_bytes: 1 << 20,
            taken_bytes: 0,
        }
    }

    /// The same driver with its device restored into another transport.
    pub fn restored(self, device: impl VirtioDevice + 'static, state: &VirtioState) -> Self {
        let memory = self.memory.clone();
        let (device, interrupt) = (Box::new(device), Box::new(|| ()));
        let transport = Transport::restore(device, memory, interrupt, state).unwrap();
        Self {
            transport: transport.shared(),
            ..self
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap()
    }

    pub fn write(&self, register: u32, value: u32) {
        as_vcpu(|| self.lock().write(register.into(), &value.to_le_bytes()));
    }

    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.lock().read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn start(&mut self) {
        (self.available, self.used) = ([0; 3], [0; 3]);
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        self.write(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FEATURES_OK);
        for queue in 0..3 {
            for part in [0x4000, 0x8000] {
                self.put(ring(queue) + part, &[0; 4]);
            }
            self.write(VIRTIO_MMIO_QUEUE_SEL, queue as u32);
            self.write(VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
            self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, ring(queue) as u32);
            self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring(queue) as u32 + 0x4000);
            self.write(VIRTIO_MMIO_QUEUE_USED_LOW, ring(queue) as u32 + 0x8000);
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        let running = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        self.write(VIRTIO_MMIO_STATUS, running);
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn descriptor(&self, queue: usize, index: u16, parts: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = parts;
        let at = ring(queue) + 16 * u64::from(index);
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes the chain of a slot available, and notifies the device.
    fn offer(&mut self, queue: usize, head: u16) {
        let count = self.available[queue];
        let entry = ring(queue) + 0x4004 + 2 * u64::from(count % SIZE);
        self.put(entry, &head.to_le_bytes());
        self.available[queue] = count.wrapping_add(1);
        self.put(ring(queue) + 0x4002, &self.available[queue].to_le_bytes());
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// Offers buffers to be written.
    pub fn post(&mut self, queue: usize, count: u16) {
        for index in 0..count {
            self.descriptor(queue, index, (slot(queue, index), RECEIVE_BYTES, WRITE, 0));
            self.offer(queue, index);
        }
    }

    /// Sends bytes that should be a packet, header and payload apart.
    pub fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        let index = self.available[SEND] % 8;
        let at = slot(SEND, index);
        self.put(at, header);
        self.put(at + 64, payload);
        let more = if payload.is_empty() { 0 } else { NEXT };
        let second = SLOTS + index;
        self.descriptor(SEND, index, (at, header.len() as u32, more, second));
        self.descriptor(SEND, second, (at + 64, payload.len() as u32, 0, 0));
        self.offer(SEND, index);
    }

    pub fn header(&self, ports: Ports, operation: Operation) -> Header {
        Header {
            source_cid: self.cid,
            destination_cid: HOST_CID,
            source_port: ports.guest,
            destination_port: ports.host,
            length: 0,
            socket_type: TYPE_STREAM,
            operation,
            flags: 0,
            buffer_bytes: self.buffer_bytes,
            taken_bytes: self.taken_bytes,
        }
    }

    pub fn send(&mut self, ports: Ports, operation: Operation) {
        let header = self.header(ports, operation);
        self.send_raw(&header.encode(), &[]);
    }

    pub fn shut(&mut self, ports: Ports, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, Operation::Shutdown)
        };
        self.send_raw(&header.encode(), &[]);
    }

    pub fn send_data(&mut self, ports: Ports, payload: &[u8]) {
        let header = Header {
            length: payload.len() as u32,
            ..self.header(ports, Operation::ReadWrite)
        };
        self.send_raw(&header.encode(), payload);
    }

    /// The next buffer that the device used; the buffer is not offered again.
    pub fn take_used(&mut self, queue: usize, patience: Duration) -> Option<(u16, Vec<u8>)> {
        let deadline = Instant::now() + patience;
        let at = ring(queue) + 0x8000;
        while self.memory.read_obj::<u16>(GuestAddress(at + 2)).unwrap() == self.used[queue] {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // The device has released its lock when all of the pass is there.
        drop(self.lock());
        let entry = at + 4 + 8 * u64::from(self.used[queue] % SIZE);
        self.used[queue] = self.used[queue].wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        let from = GuestAddress(slot(queue, head as u16));
        self.memory.read_slice(&mut bytes, from).unwrap();
        Some((head as u16, bytes))
    }

    /// Gives a buffer back to the device.
    pub fn recycle(&mut self, queue: usize, head: u16) {
        self.offer(queue, head);
    }

    /// The next packet of the device within some time.
    pub fn packet_within(&mut self, patience: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, mut bytes) = self.take_used(RECEIVE, patience)?;
        self.recycle(RECEIVE, head);
        let payload = bytes.split_off(HEADER_BYTES);
        let header = Header::decode(bytes.as_slice().try_into().unwrap());
        assert_eq!(payload.len(), header.length as usize);
        assert_eq!(
            (header.source_cid, header.destination_cid),
            (HOST_CID, self.cid)
        );
        Some((header, payload))
    }

    pub fn packet(&mut self) -> (Header, Vec<u8>) {
        self.packet_within(PATIENCE).expect("a packet")
    }

    /// The next packet must be this one.
    pub fn expect(&mut self, ports: Ports, operation: Operation) -> (Header, Vec<u8>) {
        let (header, payload) = self.packet();
        assert_eq!(
            (
                header.operation,
                header.destination_port,
                header.source_port
            ),
            (operation, ports.guest, ports.host)
        );
        (header, payload)
    }
}
