//! Lists whose length comes from outside, read without trusting it.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// Reads a list and keeps at most `KEEP + 1` entries of it: enough to see that it
/// is too long, never the memory that its length asks for. All entries are read,
/// so that what follows the list is still found.
pub(super) fn list<'de, D, T, const KEEP: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: de::Deserialize<'de>,
{
    deserializer.deserialize_seq(Bounded::<T> {
        keep: KEEP,
        read_rest: true,
        entry: PhantomData,
    })
}

/// As [`list`], but stops reading after `KEEP + 1` entries. Only for a list with
/// nothing behind it, where the rest need not be found: entries that are costly
/// to build cost nothing beyond the limit.
pub(super) fn last_list<'de, D, T, const KEEP: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: de::Deserialize<'de>,
{
    deserializer.deserialize_seq(Bounded::<T> {
        keep: KEEP,
        read_rest: false,
        entry: PhantomData,
    })
}

struct Bounded<T> {
    keep: usize,
    read_rest: bool,
    entry: PhantomData<T>,
}

impl<'de, T: de::Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a list of at most {} entries", self.keep)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut kept = Vec::new();
        while let Some(entry) = list.next_element()? {
            if kept.len() <= self.keep {
                kept.push(entry);
            } else if !self.read_rest {
                break;
            }
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Deserialize, Debug)]
    struct Short {
        #[serde(deserialize_with = "list::<_, _, 3>")]
        first: Vec<u32>,
        after: u32,
        #[serde(deserialize_with = "last_list::<_, _, 2>")]
        last: Vec<u32>,
    }

    #[derive(Serialize)]
    struct Plain {
        first: Vec<u32>,
        after: u32,
        last: Vec<u32>,
    }

    fn read(first: u32, last: u32) -> Short {
        let plain = Plain {
            first: (0..first).collect(),
            after: 77,
            last: (0..last).collect(),
        };
        postcard::from_bytes(&postcard::to_stdvec(&plain).unwrap()).unwrap()
    }

    #[test]
    fn lists_within_their_limits_are_read_whole() {
        let short = read(3, 2);
        assert_eq!(
            (short.first.len(), short.after, short.last.len()),
            (3, 77, 2)
        );
    }

    #[test]
    fn longer_lists_are_kept_to_one_beyond_the_limit() {
        let short = read(1000, 1000);
        assert_eq!(
            (short.first.len(), short.after, short.last.len()),
            (4, 77, 3)
        );
    }

    #[test]
    fn a_length_without_entries_is_an_error() {
        let bytes = [0xff, 0xff, 0xff, 0xff, 0x0f, 1];
        assert!(postcard::from_bytes::<Short>(&bytes).is_err());
    }
}
