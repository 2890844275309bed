//! Running virtual machines: where they are found, how they are started, and the
//! processes they run in.
//!
//! A machine is a process with a directory of its own under the runtime
//! directory: its socket, a lock that it holds as long as it lives, its log and,
//! once it ended badly, why. Nothing else knows about machines, so nothing can be
//! out of date.

//!
//! A program that uses this crate calls [`tidy`] and then [`run_if_hidden`] when it
//! begins: machines, their supervisor and whoever looks at a mount are processes of that
//! program. Nothing here prints, but for what a machine's process says in its log.

#![forbid(unsafe_code)]

mod background;
mod build;
pub mod capped_log;
pub mod commit;
mod common;
mod discarded;
pub mod doctor;
mod error;
mod guest;
mod hidden;
pub mod look;
mod mappings;
pub mod metrics;
pub mod monitor;
pub mod monitors;
pub mod mount_server;
pub mod mount_use;
pub mod mounts;
pub mod networks;
mod process;
mod readable;
pub mod restore;
pub mod runtime;
mod snapshot_files;
mod spec;
pub mod start;
pub mod starter;
mod supervisor;
pub mod views;
pub mod warm;

pub use background::{LOG_FORMAT, MACHINE_OF, detach, own_program, set_log_format, tidy};
pub use build::{DiskAccess, DiskSpec, MachineSource, Overlays, check_kind};
pub use error::{Busy, ChildFailure, ErrorClass, NotFound, Usage, class, message};
pub use hidden::{run_if_hidden, run_if_machine};
pub use spec::Spec;
