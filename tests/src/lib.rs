//! What the tests of snapstore share.

pub mod bench;
pub mod crashing;
pub mod harness;
pub mod inherited;
pub mod powercut;
pub mod stopping;
pub mod vm;
