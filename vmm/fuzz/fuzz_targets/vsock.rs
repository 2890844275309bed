//! Packets of a guest's sockets, from a driver that runs and says anything: never a panic,
//! never without end.
//!
//! Each packet is an operation, ports out of a few, and the other fields of its header; a
//! program of the host listens at one port and another one connects.

#![no_main]

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::virtio::{Transport, Vsock};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const SIZE: u16 = 16;
/// Where the parts of a queue are.
const QUEUE_BYTES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x8_0000;
const BUFFER_BYTES: u64 = 0x1000;
const HEADER_BYTES: u32 = 44;
const WRITE: u16 = 2;

struct Driver {
    transport: Transport,
    memory: GuestMemoryMmap,
    given: [u16; 3],
}

impl Driver {
    fn write(&mut self, register: u64, value: u64) {
        self.transport.write(register, &(value as u32).to_le_bytes());
    }

    /// Virtio 1.2, section 3.1.1, by the offsets of section 4.2.2.
    fn start(&mut self) {
        for (register, value) in [(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 0xb)] {
            self.write(register, value);
        }
        for queue in 0..3 {
            let at = QUEUE_BYTES * (queue + 1);
            for (register, value) in [
                (0x30, queue),
                (0x38, SIZE.into()),
                (0x80, at),
                (0x90, at + 0x2000),
                (0xa0, at + 0x3000),
                (0x44, 1),
            ] {
                self.write(register, value);
            }
        }
        self.write(0x70, 0xf);
    }

    /// Gives the device a buffer of a queue.
    fn give(&mut self, queue: u64, length: u32, flags: u16) -> Option<()> {
        let given = &mut self.given[queue as usize];
        let slot = u64::from(*given % SIZE);
        let at = QUEUE_BYTES * (queue + 1);
        let buffer = BUFFERS + (queue * u64::from(SIZE) + slot) * BUFFER_BYTES;
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&buffer.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        let memory = &self.memory;
        memory.write_slice(&descriptor, GuestAddress(at + 16 * slot)).ok()?;
        let entry = GuestAddress(at + 0x2000 + 4 + 2 * slot);
        memory.write_obj(slot as u16, entry).ok()?;
        *given = given.wrapping_add(1);
        memory.write_obj(*given, GuestAddress(at + 0x2002)).ok()?;
        self.write(0x50, queue);
        Some(())
    }

    /// Sends a packet: nine bytes of the input, and a payload.
    fn send(&mut self, packet: &[u8; 9], payload: &[u8]) -> Option<()> {
        let [operation, source, target, length, flags, room, taken, odd, more] = *packet;
        let slot = u64::from(self.given[1] % SIZE);
        let buffer = BUFFERS + (u64::from(SIZE) + slot) * BUFFER_BYTES;
        let mut header = [0; HEADER_BYTES as usize];
        header[0] = if odd & 1 == 0 { 3 } else { odd };
        header[8] = if odd & 2 == 0 { 2 } else { odd };
        header[16..20].copy_from_slice(&(u32::from(source % 4) + 1024).to_le_bytes());
        header[20..24].copy_from_slice(&(u32::from(target % 4) + 1024).to_le_bytes());
        let told = if odd & 4 == 0 { payload.len() as u32 } else { u32::from(length) << 8 };
        header[24..28].copy_from_slice(&told.to_le_bytes());
        header[28] = if odd & 8 == 0 { 1 } else { odd };
        header[30] = operation % 9;
        header[32] = flags % 4;
        header[36..40].copy_from_slice(&(u32::from(room) << (more % 24)).to_le_bytes());
        header[40..44].copy_from_slice(&(u32::from(taken) << (more % 24)).to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(buffer)).ok()?;
        let after = GuestAddress(buffer + u64::from(HEADER_BYTES));
        self.memory.write_slice(payload, after).ok()?;
        self.give(1, HEADER_BYTES + payload.len() as u32, 0)
    }
}

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("/dev/shm can be written");
    let path = dir.path().join("v");
    let listener = UnixListener::bind(dir.path().join("v_1025")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory");
    let device = Vsock::new(&path, None).expect("a device");
    let mut driver = Driver {
        transport: Transport::new(Box::new(device), memory.clone(), Box::new(|| {})),
        memory,
        given: [0; 3],
    };
    driver.transport.resume();
    driver.start();
    let mut peers = Vec::<UnixStream>::new();
    let mut left = bytes;
    while let Some((packet, rest)) = left.split_first_chunk::<9>() {
        let length = usize::from(packet[3]).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        left = rest;
        if driver.give(0, 2048, WRITE).and_then(|()| driver.send(packet, payload)).is_none() {
            return;
        }
        // The host's programs take and say something.
        if let Ok((peer, _)) = listener.accept() {
            peers.push(peer);
        }
        if packet[8] & 0x80 != 0 && peers.len() < 8 {
            if let Ok(mut peer) = UnixStream::connect(&path) {
                let _ = peer.write_all(b"CONNECT 1026\n");
                peers.push(peer);
            }
        }
        for peer in &mut peers {
            let _ = peer.set_nonblocking(true);
            let _ = peer.read(&mut [0; 512]);
            let _ = peer.write(&packet[..]);
        }
        if packet[8] & 0x40 != 0 {
            driver.transport.quiesce();
            let saved = driver.transport.save();
            assert_eq!(saved.queues.len(), 3);
            driver.transport.resume();
        }
    }
});
