//! What the tests of snapstore share.

pub mod crashing;
pub mod harness;
pub mod powercut;
