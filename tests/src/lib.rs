//! What the tests of snapstore share.

pub mod crashing;
pub mod harness;
pub mod inherited;
pub mod object_server;
pub mod powercut;
pub mod proxy;
pub mod qmp;
pub mod requests;
pub mod scale;
pub mod servers;
pub mod shared_map;
#[cfg(feature = "sim")]
pub mod sim;
pub mod stopping;
pub mod vm;
