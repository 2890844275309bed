//! The checker: the protocol's own code over a bucket in memory, whose requests are
//! interleaved, come late, get lost and are half visible, by hosts that crash and sleep.
//! First all interleavings of small scenes, then seeded histories of larger ones.
//!
//! `cargo test -p snapstore-remote check::` runs it, and takes each rule of the protocol
//! away once: what is lost then has to be found. `CHECK_SEED` and `CHECK_HISTORIES` say
//! which histories.

mod actors;
mod bucket;
mod explore;
mod oracle;
mod repacking;
mod world;

mod tests;
