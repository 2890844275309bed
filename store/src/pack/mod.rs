//! Packs: append-only, then sealed and immutable files of encoded chunks.
//!
//! `crate::format` draws the file, `codec` turns chunks into stored bytes and back
//! (`patch` those that differ little), `writer` makes one pack, `reader` reads one, `scan` goes through its footer, `set` keeps
//! the open ones and hands out numbers. Nothing here knows what a chunk means.

pub(crate) mod codec;
mod open;
pub(crate) mod patch;
pub(crate) mod reader;
mod scan;
pub(crate) mod set;
pub(crate) mod writer;

use std::fmt;

/// The number in the name of a pack's file. It is not used twice in a store, as far
/// as the store knows: a copy from elsewhere may bring one back. It says where to
/// look, and nothing of what is there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct PackNumber(pub u32);

impl PackNumber {
    /// The number that is written so. Not `1` nor `+0000001`, which would be
    /// 00000001 once more.
    pub fn parse(digits: &str) -> Option<Self> {
        let number = Self(u32::from_str_radix(digits, 16).ok()?);
        (number.to_string() == digits).then_some(number)
    }
}

impl fmt::Display for PackNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// What tells a pack from every other one, whatever its file is called: random in
/// packs of version 2, made from the seal in those of version 1 and those that have
/// taken their places.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct PackIdentity(pub [u8; 16]);

/// The version of a pack's format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PackVersion {
    One,
    Two,
}

/// The position of a chunk in its pack's footer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct EntryNumber(pub u32);

/// Where a chunk is stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Location {
    pub pack: PackNumber,
    pub entry: EntryNumber,
}

impl Location {
    pub const LEN: usize = 8;

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.pack.0.to_le_bytes());
        bytes[4..].copy_from_slice(&self.entry.0.to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            pack: PackNumber(u32::from_le_bytes([a, b, c, d])),
            entry: EntryNumber(u32::from_le_bytes([e, f, g, h])),
        }
    }
}
