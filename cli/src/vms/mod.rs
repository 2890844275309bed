//! Running virtual machines: where they are found, how they are started, and the
//! processes they run in.
//!
//! A machine is a process with a directory of its own under the runtime
//! directory: its socket, a lock that it holds as long as it lives, its log and,
//! once it ended badly, why. Nothing else knows about machines, so nothing can be
//! out of date.

pub mod build;
pub mod host;
pub mod mounts;
pub mod networks;
pub mod runtime;
pub mod start;
mod supervisor;
pub mod terminal;
