//! An encrypted remote: a bucket of which those who keep it learn sizes, times and who reads what
//! when, and nothing that is in it.
//!
//! A layer between those who work on objects and those who carry them: above it all is as in a
//! remote in clear, so the protocol, uploads and lazy reads know nothing of it. `body` says what becomes of
//! an object, `tags` what becomes of a tag's name, `key` where the key is.
//!
//! What it does not prevent: who can write to the bucket can delete, and can put back what was
//! there before under the same name.

mod body;
mod key;
mod tags;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use self::body::{BLOCK_LEN, Body, HEAD_LEN, STORED_LEN, objects_key};
pub use self::body::{IN_CLEAR, MAGIC, NEWER, OTHER_KEY};
pub use self::key::DomainKey;
use self::tags::Tags;
use crate::objects::{Hedge, Objects, Part, Requests, wrong};
use crate::protocol::{Listed, Unanswered};

const REFS: &str = "refs/";
/// Before what stands in a tag's place and is none of this key. No tag begins so.
const NO_TAG: char = '?';

/// Objects that are encrypted where they are.
pub struct Sealed {
    below: Box<dyn Objects>,
    objects: [u8; 32],
    tags: Tags,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "encrypted: {:?}", self.below)
    }
}

impl Sealed {
    /// Encrypts what is in these.
    pub fn new(below: Box<dyn Objects>, key: &DomainKey) -> Self {
        Self {
            below,
            objects: objects_key(key),
            tags: Tags::of(key),
        }
    }

    fn body(&self, key: &str) -> Body {
        Body::of(&self.objects, key)
    }

    /// A key, or the beginning of keys, as it is in the bucket.
    fn hidden(&self, key: &str) -> String {
        match key.strip_prefix(REFS).and_then(|rest| rest.split_once('/')) {
            None => key.to_owned(),
            Some((tag, rest)) => match tag.strip_prefix(NO_TAG) {
                Some(name) => format!("{REFS}{name}/{rest}"),
                None => format!("{REFS}{}/{rest}", self.tags.hide(tag)),
            },
        }
    }

    /// The reverse.
    fn shown(&self, key: String) -> String {
        match key.strip_prefix(REFS).and_then(|rest| rest.split_once('/')) {
            None => key,
            Some((name, rest)) => match self.tags.show(name) {
                Some(tag) => format!("{REFS}{tag}/{rest}"),
                None => format!("{REFS}{NO_TAG}{name}/{rest}"),
            },
        }
    }

    fn read(
        &self,
        key: &str,
        part: Option<Part>,
        ask: impl FnOnce(&str, Option<Part>) -> Result<Option<Vec<u8>>, Unanswered>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        let stored_part = part.map(stored_part);
        let stored = ask(&self.hidden(key), stored_part).map_err(|error| of(key, error))?;
        let Some(mut stored) = stored else {
            return Ok(None);
        };
        let body = self.body(key);
        let opened = match (part, stored_part) {
            (Some((from, len)), Some((_, stored_len))) => {
                let first = from / BLOCK_LEN as u64;
                let is_end = stored.len() < stored_len;
                // Behind the end there is nothing. Each object has a first block.
                let blocks = match stored.is_empty() && first > 0 {
                    true => Ok(Vec::new()),
                    false => body.open_blocks(first, &mut stored, is_end),
                };
                blocks.map(|mut blocks| {
                    let skipped = usize::try_from(from % BLOCK_LEN as u64).expect("below 16 KiB");
                    blocks.truncate(skipped.saturating_add(len));
                    blocks.drain(..skipped.min(blocks.len()));
                    blocks
                })
            }
            _ => body.open(stored),
        };
        opened.map(Some).map_err(|why| wrong("read", key, why))
    }
}

/// Where the blocks are that hold a part of an object.
fn stored_part((from, len): Part) -> Part {
    let block = BLOCK_LEN as u64;
    let first = from / block;
    let last = from.saturating_add(len.max(1) as u64 - 1) / block;
    let count = usize::try_from(last - first + 1).unwrap_or(usize::MAX);
    let stored_from = (HEAD_LEN as u64).saturating_add(first.saturating_mul(STORED_LEN as u64));
    (stored_from, count.saturating_mul(STORED_LEN))
}

/// How much is in an object of this length.
fn opened_len(stored: u64) -> u64 {
    let blocks = stored.saturating_sub(HEAD_LEN as u64);
    let around = (STORED_LEN - BLOCK_LEN) as u64;
    blocks.saturating_sub(blocks.div_ceil(STORED_LEN as u64) * around)
}

/// An object is named as those know it who asked for it.
fn of(key: &str, error: Unanswered) -> Unanswered {
    let key = key.to_owned();
    Unanswered { key, ..error }
}

impl Objects for Sealed {
    fn create(&self) -> Result<(), Unanswered> {
        self.below.create()
    }

    fn is_absent(&self) -> bool {
        self.below.is_absent()
    }

    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        let sealed = self.body(key).seal(bytes);
        let put = self.below.put(&self.hidden(key), &sealed);
        put.map_err(|error| of(key, error))
    }

    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        self.read(key, part, |hidden, part| self.below.get(hidden, part))
    }

    fn get_within(
        &self,
        key: &str,
        part: Option<Part>,
        within: Duration,
        hedge: Option<Hedge<'_>>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        self.read(key, part, |hidden, part| {
            self.below.get_within(hidden, part, within, hedge)
        })
    }

    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        let exists = self.below.exists(&self.hidden(key));
        exists.map_err(|error| of(key, error))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        let listed = self.below.list(&self.hidden(prefix))?.into_iter();
        let mut listed: Vec<Listed> = listed
            .map(|one| Listed {
                key: self.shown(one.key),
                len_bytes: opened_len(one.len_bytes),
                ..one
            })
            .collect();
        listed.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(listed)
    }

    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        let deleted = self.below.delete(&self.hidden(key));
        deleted.map_err(|error| of(key, error))
    }

    fn requests(&self) -> Option<Requests> {
        self.below.requests()
    }
}
