//! Controlling a machine from outside its process: one UNIX socket a machine.
//!
//! A client sends one JSON object a line and gets one a line back, in order.
//! Some requests change what the connection is for: after `console` it carries
//! the serial line's raw bytes; from `precopy` or `freeze` on it is the machine's
//! committer, and the frozen copy lives, until it ends or says `committed`. File descriptors travel beside the line
//! they belong to (`SCM_RIGHTS`). docs/SEMANTICS.md lists the requests.

mod client;
mod error_kind;
mod frozen_wire;
mod protocol;
mod server;
mod session;
mod vm;
mod wire;

pub use client::{Client, Committer, FrozenMachine};
pub use error_kind::ErrorKind;
pub use frozen_wire::{FrozenDisk, LiveMemory};
pub use protocol::{
    CommitReport, DiskInfo, Origin, Reply, Request, RunState, Seconds, Status, Totals,
};
pub use server::Heeded;
pub use vm::{Identity, Vm};
pub use wire::{Connection, read_requests};
