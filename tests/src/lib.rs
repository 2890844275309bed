//! What the tests of snapstore share.

pub mod harness;
pub mod powercut;
