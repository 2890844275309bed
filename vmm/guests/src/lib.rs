//! Small guests that check themselves, for tests, benchmarks and the demo.
//!
//! Each is a flat image of a few KiB, written in assembly (`src/asm/`), that
//! needs no firmware and no kernel. Loaded at [`LOAD_ADDRESS`], every vCPU
//! starts at its first byte, in 32-bit protected mode with flat segments, paging
//! and interrupts off, EAX = its index, EBX = the number of vCPUs, ECX = MiB of
//! RAM below 3 GiB. A guest talks over the serial port at 0x3f8 and ends its
//! machine through the i8042 (0xfe to port 0x64). At least [`MIN_MEMORY_MIB`] of
//! RAM are needed.
//!
//! Each prints first `<name> guest 1 vcpus N memory M MiB`.
//!
//! They use only what KVM's instruction emulator knows, because some test
//! machines run guests by nothing else: no `iret`, no x87 arithmetic. Interrupts,
//! paging and long mode are left to real Linux guests.

#![forbid(unsafe_code)]

mod table;
mod touch;

pub use table::{
    COUNTERS_ADDRESS, COUNTERS_STRIDE, TABLE_ADDRESS, TABLE_ENTRIES, TableModel, TableStep,
    table_line,
};
pub use touch::{TouchCommand, page_sum};

/// Where an image is loaded and entered: guest physical, in bytes.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// The least RAM that every guest here runs in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 4;

/// A table that changes for ever and checks itself, and CPU state with it. See
/// [`TableModel`] for what it prints. Commands: `p` (answer `pong`), `c` (the
/// other vCPUs' counters, `cpu 1 count 0000abcd`), `q` (reset).
pub const TABLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/table.bin"));

/// Touches the pages it is told to; see [`TouchCommand`]. Prints `ready` first.
pub const TOUCH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/touch.bin"));

/// Writes all over its memory for ever and checks itself: `churn 00000042 sum 1a2b3c4d ok`
/// a pass, or `BAD` in the place of `ok`. Commands: `c` (only 64 pages from here on, answer
/// `calm`), `a` (all pages again, answer `all`), `q` (reset).
pub const CHURN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/churn.bin"));

/// Hostile: reads and writes all 65536 ports in every width, then string I/O.
/// Prints `every port`, `every string` (among NULs that its writes to the serial
/// port cause), `done`; then resets.
pub const PORTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ports.bin"));

/// Hostile: reads and writes addresses without RAM, in every width, and the
/// interrupt controllers. Prints `scattered`, `registers`, `edges`,
/// `instructions`, `controllers`, `done`; then resets.
pub const MMIO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mmio.bin"));

/// Ends by a triple fault.
pub const TRIPLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/triple.bin"));

/// Prints `halting` and halts with interrupts off.
pub const HALT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/halt.bin"));

/// Prints `spinning` and then never leaves the guest by itself; nor do the other
/// vCPUs.
pub const SPIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/spin.bin"));

/// Prints `waiting`, and at the character `r` says that it is ready (port 0x620), prints
/// `after` and halts with interrupts off. Another character resets.
pub const READY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ready.bin"));

/// Prints `waiting`, and at each character `t` the time of kvmclock in nanoseconds, as
/// `t` and 16 hexadecimal digits. Another character resets.
pub const CLOCK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/clock.bin"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_small_and_begin_with_code() {
        for image in [
            TABLE, TOUCH, CHURN, PORTS, MMIO, TRIPLE, HALT, SPIN, READY, CLOCK,
        ] {
            assert_eq!(image[..2], [0xfa, 0xfc], "cli; cld");
            assert!(image.len() < 8192, "{} bytes", image.len());
        }
    }
}
