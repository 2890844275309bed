//! Putting a kernel into guest memory, and the vCPUs at its entry.
//!
//! - [`flat`]: programs without a format.
//! - [`linux`]: what is common to all forms of Linux; [`bzimage`] and [`elf`] read
//!   theirs, [`memory_map`], [`zero_page`] and [`pvh`] tell the kernel what it
//!   boots on.
//! - [`entry`]: the registers with which a kernel begins; [`bios`]: where Linux goes to
//!   reset the machine.
//!
//! A kernel file is not trusted to be one: every address and length in it is
//! checked against the file and the memory before it is used.

mod bios;
mod bzimage;
mod elf;
mod entry;
mod flat;
mod image;
mod linux;
mod memory_map;
mod pvh;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod zero_page;

use std::path::PathBuf;

use crate::acpi::AcpiDevices;
use crate::error::Result;
use crate::memory::GuestMemory;
pub use entry::Entry;
pub use flat::FLAT_ADDRESS;

/// What is booted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// A flat program: loaded as it is at [`FLAT_ADDRESS`], where every vCPU
    /// begins in 32-bit protected mode with flat segments, paging and
    /// interrupts off; EAX is the vCPU's number, EBX how many there are, ECX the
    /// MiB of memory below 3 GiB.
    Flat(PathBuf),
    /// Linux for x86-64: a bzImage, or an ELF file (`vmlinux`), told apart by what
    /// is in the file.
    Linux {
        /// The kernel.
        kernel: PathBuf,
        /// Its first root filesystem.
        initrd: Option<PathBuf>,
        /// Its command line, without a NUL.
        cmdline: String,
    },
}

impl Kernel {
    /// Loads the kernel into memory, and for Linux all that it is to find there,
    /// ACPI tables with these devices among them.
    ///
    /// # Errors
    /// A file that cannot be read, that is no kernel or not the whole of one, that
    /// does not fit into the memory, or a command line that is too long.
    pub fn load(&self, memory: &GuestMemory, devices: &AcpiDevices) -> Result<Entry> {
        match self {
            Self::Flat(path) => flat::load(path, memory),
            Self::Linux {
                kernel,
                initrd,
                cmdline,
            } => linux::load(kernel, initrd.as_deref(), cmdline, memory, devices),
        }
    }
}
