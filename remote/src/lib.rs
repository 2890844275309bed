//! Snapshots of many hosts in one bucket of an object store.
//!
//! [`protocol`] is what hosts do so that none deletes what another one relies on. It
//! knows no runtime, no clock and no network: what it asks of a bucket is
//! [`protocol::Bucket`]. `check` runs the same code over a bucket in memory whose
//! writes come late, get lost and are seen by some and not by others.
//! [`Remote`] is the protocol over a bucket that is there.
//!
//! docs/REMOTE.md has the layout of a bucket and the protocol.

#![forbid(unsafe_code)]
// Whoever implements it says which thread it runs on.
#![allow(async_fn_in_trait)]

mod beats;
mod begin;
#[cfg(test)]
mod check;
#[cfg(feature = "cloud")]
mod cloud;
mod collect;
mod config;
mod dir;
mod error;
mod first;
mod head;
mod hooks;
mod intact;
mod kin;
mod lazy;
mod objects;
mod open;
mod opened;
mod outgoing;
mod pack;
mod place;
mod placed;
pub mod protocol;
mod pull;
mod push;
mod remote;
mod repack;
mod reuse;
mod sealing;
mod seen;
#[cfg(test)]
mod tests;
mod upload;
mod verify;

pub use error::{Error, Result};
pub use lazy::{CACHE, Lazy, LazyCounts, LazyOptions, Requested};
pub use objects::Requests;
pub use place::Place;
pub use pull::Pulled;
pub use remote::{LeaseReport, Remote, RemoteTag};
pub use repack::{Gc, RepackOptions, Repacked};
pub use sealing::DomainKey;
pub use upload::PushReport;
pub use verify::{Finding, VerifyReport};

/// 128 random bits.
pub(crate) fn random() -> std::io::Result<u128> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(u128::from_le_bytes(bytes))
}
