//! What the tests of snapstore share.

pub mod powercut;
