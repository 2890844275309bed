//! The state of a stopped virtual machine besides its memory.
//!
//! - [`MachineState`]: all of it, to and from bytes.
//! - [`VcpuState`], [`VmState`]: what KVM holds, out of it and into it.
//! - [`HostFacts`]: what this host's KVM offers, asked once per machine.
//! - [`check_host`], [`guest_cpuid`], [`Baseline`]: what a guest may see of a CPU.
//! - [`CpuNeeds`]: what a state asks of a CPU.
//!
//! Bytes of a state are checked whole (checksum, form, every length) before
//! anything is built in KVM. Values inside KVM's own structures are KVM's to
//! check: a state with impossible values is an error of restore, not of decode.
//!
//! Absent on purpose: nested guests ([`guest_cpuid`] offers no VMX and no SVM, so
//! that there is no such state), performance counters, and any state of a
//! machine whose vCPUs run.

mod baseline;
mod bounded;
mod compat;
mod cpu;
mod cpuid;
mod error;
mod feature_msrs;
mod features;
mod format;
mod host;
mod machine;
mod msrs;
mod needs;
mod virtio;
mod vm;
mod xsave;

pub use baseline::Baseline;
pub use compat::check_host;
pub use cpu::{VcpuState, announce_stop};
pub use cpuid::guest_cpuid;
pub use error::StateError;
pub use format::MAX_STATE_BYTES;
#[cfg(test)]
pub(crate) use format::through_its_bytes;
pub use host::HostFacts;
pub use machine::{
    DeviceState, MAX_CPUID_ENTRIES, MAX_CPUS, MAX_MSRS, MAX_PENDING_INPUT_BYTES,
    MAX_SERIAL_FIFO_BYTES, MAX_XSAVE_BYTES, MachineState, SerialState,
};
pub use needs::CpuNeeds;
pub use virtio::{
    MAX_VIRTIO_DEVICES, MAX_VIRTIO_QUEUES, VirtioDeviceState, VirtioQueueState, VirtioState,
};
pub use vm::VmState;
