//! One module per command.

pub mod commit;
pub mod commit_vm;
pub mod control;
pub mod copy;
pub mod diff;
pub mod doctor;
pub mod exec;
pub mod export;
pub mod forget;
pub mod gc;
pub mod import;
pub mod init;
pub mod log;
pub mod mount;
pub mod ps;
pub mod repair;
pub mod restore;
pub mod run;
pub mod show;
pub mod start;
pub mod stats;
pub mod tag;
pub mod umount;
pub mod upgrade;
pub mod verify;
