//! Virtio devices under a driver that does anything: never a panic, never without
//! end, and whatever it did, the state can be saved and restored.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run -s none virtio -- -max_total_time=60 -timeout=5
//! ```
//!
//! The first byte chooses the device. Each action is a byte and its operands; the
//! driver is one that started its device rightly, so that the first notification
//! already reaches a queue.

#![no_main]

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::virtio::{Block, Disk, Entropy, Net, Tap, Transport, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const DISK_BYTES: u64 = 300 << 10;
/// Near each other, so that one descriptor easily names another's place.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// The bytes that are left of the input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take::<1>()?[0])
    }

    fn short(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take()?))
    }
}

/// On something like a tap, whose other end has sent a little and is gone.
fn net(connected: bool) -> Net {
    let tap = connected.then(|| {
        let (tap, host) = UnixDatagram::pair().expect("two sockets");
        tap.set_nonblocking(true).expect("a socket");
        for length in [10, 26, 1526, 9000] {
            host.send(&vec![0x5a; length]).expect("room");
        }
        Tap::from_fd(tap.into())
    });
    Net::new(tap, None).expect("a device")
}

fn device(which: u8) -> Box<dyn VirtioDevice> {
    static BASE: OnceLock<File> = OnceLock::new();
    if which & 4 != 0 {
        return Box::new(net(which & 2 != 0));
    }
    if which & 1 == 0 {
        return Box::new(Entropy::new());
    }
    let base = BASE.get_or_init(|| {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(DISK_BYTES).expect("its size");
        file
    });
    let base = base.try_clone().expect("a descriptor");
    let disk = match which & 2 {
        0 => Disk::read_only("fuzzed", base),
        _ => Disk::overlay("fuzzed", base, &std::env::temp_dir()),
    };
    Box::new(Block::new(disk.expect("a disk")))
}

/// The queue that the driver works on: of a network device, either.
fn queue(which: u8) -> u32 {
    u32::from(which & 12 == 12)
}

fn write(transport: &mut Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// Virtio 1.2, section 3.1.1, by the offsets of section 4.2.2.
fn start(transport: &mut Transport, which: u8) {
    for (register, value) in [
        (0x70, 0),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 0xb),
        (0x30, queue(which).into()),
        (0x38, 64),
        (0x80, TABLE),
        (0x90, AVAILABLE),
        (0xa0, USED),
        (0x44, 1),
        (0x70, 0xf),
    ] {
        write(transport, register, value as u32);
    }
}

/// One action; `None` at the end of the input.
fn act(
    input: &mut Input<'_>,
    mut transport: Transport,
    memory: &GuestMemoryMmap,
    which: u8,
) -> Option<Transport> {
    match input.byte()? % 10 {
        0 => {
            let register = u64::from(input.short()? % 0x400);
            let value = input.take::<4>()?;
            transport.write(register, &value);
        }
        1 => transport.read(input.short()?.into(), &mut [0; 8]),
        2 | 3 => {
            let index = u64::from(input.byte()? % 64);
            // An address in memory, or anywhere.
            let mut descriptor = input.take::<16>()?;
            if input.byte()? & 3 != 0 {
                descriptor[3..8].fill(0);
                descriptor[10..12].fill(0);
                descriptor[13] = 0;
                descriptor[15] = 0;
            }
            let at = GuestAddress(TABLE + 16 * index);
            memory.write_slice(&descriptor, at).ok()?;
        }
        4 => {
            let at = u64::from(input.short()?) << 2;
            let bytes = input.take::<16>()?;
            memory.write_slice(&bytes, GuestAddress(at)).ok()?;
        }
        5 | 6 => {
            let index: u16 = memory.read_obj(GuestAddress(AVAILABLE + 2)).ok()?;
            let entry = AVAILABLE + 4 + 2 * u64::from(index % 64);
            let head = u16::from(input.byte()?);
            memory.write_obj(head, GuestAddress(entry)).ok()?;
            let next = index.wrapping_add(1);
            memory.write_obj(next, GuestAddress(AVAILABLE + 2)).ok()?;
            write(&mut transport, 0x50, queue(which));
        }
        7 => {
            memory.write_obj(0_u32, GuestAddress(AVAILABLE)).ok()?;
            start(&mut transport, which);
        }
        8 if input.byte()? & 1 == 0 => transport.quiesce(),
        8 => transport.resume(),
        _ => {
            transport.quiesce();
            let saved = transport.save();
            let interrupt = Box::new(|| {});
            let again = Transport::restore(device(which), memory.clone(), interrupt, &saved);
            let mut again = again.expect("what was saved can be restored");
            assert_eq!(again.save().queues, saved.queues);
            again.resume();
            return Some(again);
        }
    }
    Some(transport)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let Some(which) = input.byte() else { return };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory");
    let mut transport = Transport::new(device(which), memory.clone(), Box::new(|| {}));
    transport.resume();
    start(&mut transport, which);
    while let Some(next) = act(&mut input, transport, &memory, which) {
        transport = next;
    }
});
