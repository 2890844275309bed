//! Machines of other monitors: committing them where they run, and restoring them.
//!
//! A monitor is a file or a directory here that implements the traits of `adapter`. All else
//! is common to them: the guest's memory is read out of the monitor's process (`memory`), it
//! goes on whatever happens (`pause`), and restored machines have names, records and a
//! supervisor as those of this program have (`machines`, `record`).

mod adapter;
mod cloud_hypervisor;
mod commit;
mod cpu;
mod described;
mod disks;
mod firecracker;
mod http;
mod known;
mod layout;
mod machines;
mod memory;
mod pause;
mod peer;
mod processes;
mod qcow2;
mod qemu;
mod qmp;
mod record;
mod step;
mod turn;
mod wire;

pub use adapter::{DESCRIPTION, Kind};
pub use commit::{MonitorCommit, MonitorCommitted, commit};
pub use layout::layout;
pub use machines::{MonitorRestore, Restored, RestoredMachine, restore};
pub(crate) use pause::{COMMAND as RESUMER, wait_and_resume};
pub(crate) use processes::{COMMAND as SUPERVISOR, run_from_stdin};
pub use record::Record;
