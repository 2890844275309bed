//! A KVM virtual machine monitor (x86-64) made to be snapshotted.
//!
//! - [`memory`]: guest memory, mapped lazily from an image; what was written to
//!   it; frozen copies of it.
//! - [`Machine`]: a VM of this process: boot or restore (paused), run, pause,
//!   save, freeze.
//! - [`state`]: everything of a machine besides memory, as bytes.
//! - [`virtio`]: the disks and other devices that a machine is given.
//! - [`control`]: a machine's socket, both ends.
//! - [`agent`]: what the host asks of a program in the guest.
//! - [`confine`]: what a machine's process gives up before its guest runs.
//!
//! The monitor knows nothing of stores and filesystems: its images are files.
//! It never forms a Rust reference into guest memory, and takes every address,
//! length and register that a guest names as an attempt to break out.

mod acpi;
mod addresses;
pub mod agent;
pub mod confine;
pub mod control;
mod devices;
mod ending;
mod error;
mod generation;
mod inherited;
mod loader;
mod machine;
pub mod memory;
mod proc;
mod rate;
mod signals;
mod spawn;
pub mod state;

pub use acpi::{AcpiDevices, VirtioWindow};
pub use devices::{Console, virtio};
pub use error::{Error, Result};
pub use inherited::{
    forget_environment, heed_children, keep_descriptors_from_children, reset_signals,
};
pub use loader::{Entry, FLAT_ADDRESS, Kernel};
pub use machine::{
    Assembled, BuildTimings, Ending, Freeze, FreezeOptions, FreezeTimings, FrozenMemory,
    LiveMemory, Machine,
};
pub use signals::{
    MEMORY_LOST_EXIT_CODE, PANICKED_EXIT_CODE, end_on_lost_memory, end_on_panic, forbid_merging,
    outlive_long_files,
};
pub use spawn::{execute_in, fork_each, fork_one};
