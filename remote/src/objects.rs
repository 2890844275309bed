//! What a remote asks of the place where its objects are. Each call returns when it is
//! done; [`crate::protocol`] says what has to hold of it.

use std::fmt::Debug;
use std::time::Duration;

use serde::Serialize;

use crate::hooks::LONGEST_RUN_BYTES;
use crate::protocol::{Listed, Unanswered};

/// Objects of one listing: with their keys they take half a GiB.
pub const MOST_LISTED: usize = 1 << 22;

/// A part of an object: where it begins, and its length.
pub type Part = (u64, usize);

/// A second request for what is late.
#[derive(Clone, Copy)]
pub struct Hedge<'a> {
    /// When it is.
    pub after: Duration,
    /// Whether to make it: asked when it is late. Then it is made.
    pub may: &'a (dyn Fn() -> bool + Sync),
    /// Told that the second one was answered first.
    pub won: &'a (dyn Fn() + Sync),
}

/// A directory, or a bucket over the network.
pub trait Objects: Debug + Send + Sync {
    /// Makes the place, where that is for hosts to do.
    fn create(&self) -> Result<(), Unanswered>;
    /// Whether there is no such place, or nothing at all in it: so is a directory where
    /// nothing is mounted.
    fn is_absent(&self) -> bool;
    /// Writes an object: whole and durable, or not at all.
    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered>;
    /// Reads an object, or as much of a part as there is.
    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered>;
    /// The same, if that takes no longer than this. Where it is late it may be asked for once
    /// more, and the first answer counts. A directory cannot tell.
    fn get_within(
        &self,
        key: &str,
        part: Option<Part>,
        _within: Duration,
        _hedge: Option<Hedge<'_>>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        self.get(key, part)
    }
    /// Whether there is an object.
    fn exists(&self, key: &str) -> Result<bool, Unanswered>;
    /// The objects whose keys begin so; `prefix` ends with a slash.
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered>;
    /// Deletes an object. One that is not there is deleted already.
    fn delete(&self, key: &str) -> Result<(), Unanswered>;
    /// What went over the network, if anything does.
    fn requests(&self) -> Option<Requests>;
}

/// Requests over the network, with those that were tried again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Requests {
    /// Reads, of whole objects or of parts.
    pub get: u64,
    /// Looks whether an object is there.
    pub head: u64,
    /// Pages of listings.
    pub list: u64,
    /// Writes, of objects or of their parts.
    pub put: u64,
    /// What begins and ends a write in parts.
    pub post: u64,
    /// Deletions.
    pub delete: u64,
    /// Of all these, how many failed or were refused: not found is no failure.
    pub failed: u64,
}

/// The longest object of its kind that any host writes: whoever can write to the bucket
/// can put anything there, such as a file of 1 TiB that takes no room.
pub fn longest_bytes(key: &str) -> u64 {
    match kind_of(key) {
        "packs" => 256 << 20,
        "hooks" => LONGEST_RUN_BYTES,
        // An image of 16 TiB has 8 million leaves.
        "heads" => 1 << 30,
        // These name what collections condemn.
        "lease" | "condemn" => 64 << 20,
        _ => 64 << 10,
    }
}

/// What a key begins with.
pub fn kind_of(key: &str) -> &str {
    key.split_once('/').map_or(key, |(kind, _)| kind)
}

/// What is told of an object that is longer.
pub const TOO_LONG: &str = "it is longer than any object of its kind";

/// A request that failed.
pub fn no(what: &'static str, key: &str, reason: String) -> Unanswered {
    Unanswered {
        what,
        key: key.to_owned(),
        reason,
        wrong: None,
        refused: false,
    }
}

/// The same, if it is known that it has changed nothing.
pub fn refused(what: &'static str, key: &str, reason: String) -> Unanswered {
    Unanswered {
        refused: true,
        ..no(what, key, reason)
    }
}

/// What stands there is no object.
pub fn wrong(what: &'static str, key: &str, why: &'static str) -> Unanswered {
    Unanswered {
        what,
        key: key.to_owned(),
        reason: why.to_owned(),
        wrong: Some(why),
        refused: false,
    }
}
