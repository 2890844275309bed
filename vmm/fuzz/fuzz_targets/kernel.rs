//! Kernels from arbitrary bytes: never a panic, never a byte outside of the file's
//! and the memory's bounds.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run -s none kernel -- -max_total_time=60 -max_len=16384
//! ```
//!
//! A distribution's kernel, cut to its first 16 KiB, is a seed for the corpus; so
//! that the fuzzer need not find them, the magic numbers are set half of the time.

#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use snapstore_vmm::memory::{GuestMemory, MemoryLayout};
use snapstore_vmm::{AcpiDevices, Kernel};

fuzz_target!(|bytes: &[u8]| {
    load(bytes);
    for (at, magic) in [(0x202, &b"HdrS"[..]), (0, b"\x7fELF\x02\x01")] {
        let mut marked = bytes.to_vec();
        if let Some(place) = marked.get_mut(at..at + magic.len()) {
            place.copy_from_slice(magic);
            load(&marked);
        }
    }
});

fn load(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("/dev/shm can be written");
    file.write_all(bytes).expect("/dev/shm has room");
    let layout = MemoryLayout::new(64 << 20).expect("a possible size");
    let memory = GuestMemory::anonymous(layout).expect("memory can be mapped");
    let kernel = Kernel::Linux {
        kernel: file.path().to_owned(),
        initrd: None,
        cmdline: String::new(),
    };
    let devices = AcpiDevices {
        cpus: 1,
        ..Default::default()
    };
    // Either is fine.
    let _ = kernel.load(&memory, &devices);
}
