//! Controlling a machine from outside its process: one UNIX socket a machine.
//!
//! A client sends one JSON object a line and gets one a line back, in order.
//! Two requests change what the connection is for: after `console` it carries
//! the serial line's raw bytes; after `freeze` the frozen copy lives until the
//! connection ends or says `committed`. File descriptors travel beside the line
//! they belong to (`SCM_RIGHTS`). docs/SEMANTICS.md lists the requests.

mod client;
mod protocol;
mod server;
mod wire;

pub use client::{Client, FrozenDisk, FrozenMachine};
pub use protocol::{
    CommitReport, DiskInfo, ErrorKind, Origin, Reply, Request, RunState, Seconds, Status,
};
pub use server::{Identity, Vm};
