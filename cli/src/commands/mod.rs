//! One module per command.

pub mod commit;
pub mod demo;
pub mod diff;
pub mod gc;
pub mod init;
pub mod log;
pub mod mount;
pub mod repair;
pub mod show;
pub mod stats;
pub mod tag;
pub mod umount;
pub mod verify;
