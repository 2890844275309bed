//! QEMU, at its QMP socket.
//!
//! The state of the devices is what `xen-save-devices-state` writes: all of a migration's
//! stream but the memory, whoever has mapped that and however. The guest's memory is read
//! out of the process. What else the guest can read, such as the BIOS and a display's
//! memory, is read there, too, and is attached as `regions.bin`.

mod arguments;
mod commit;
mod description;
mod disks;
mod options;
mod regions;
mod restore;

pub use commit::Qemu;
pub use restore::QemuRestorer;
