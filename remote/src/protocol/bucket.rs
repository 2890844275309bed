//! What the protocol asks of a bucket.

use crate::protocol::{RefKey, RefKind, Rule, Session};

/// A request that was not answered, or answered with an error: it may have happened, or
/// may still happen.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot {what} {key}: {reason}")]
pub struct Unanswered {
    /// What was asked for, such as "write".
    pub what: &'static str,
    /// The object, or the beginning of a listing.
    pub key: String,
    /// What the other end, or the network, said.
    pub reason: String,
    /// Why what stands there is nothing that a host has written, if that is so: it will
    /// answer the same another time.
    pub wrong: Option<&'static str>,
    /// Whether it is known that this request has changed nothing and never will: it was not
    /// sent, or the filesystem refused it. The protocol never relies on it; it is for who reads
    /// the message.
    pub refused: bool,
}

impl Unanswered {
    /// Whether what a command was about has not happened either. A change that counts is
    /// followed by requests that may be refused, too: the deletion of a lease, and what takes a
    /// record back.
    #[must_use]
    pub fn changed_nothing(&self) -> bool {
        let follows = match self.what {
            "delete" => self.key.starts_with("lease/"),
            _ => RefKey::parse(&self.key).is_some_and(|it| it.kind == RefKind::Retracted),
        };
        self.refused && !follows
    }

    /// After other attempts at the same, of which none may have done it.
    fn after(mut self, before: Option<Self>) -> Self {
        self.refused &= before.is_none_or(|before| before.refused);
        self
    }
}

/// An object in a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Its length.
    pub len_bytes: u64,
    /// When it was written, by the bucket's clock, in seconds. Only to give up on who
    /// is silent.
    pub modified: u64,
}

/// A bucket, and what a host brings along: names of its own, and its patience.
///
/// A finished [`Bucket::put`] or [`Bucket::delete`] is seen by every read that begins
/// later. One that is under way, or was not answered, may be seen by one read and not
/// by the next.
pub trait Bucket {
    /// Writes an object.
    async fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered>;
    /// Reads an object.
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Unanswered>;
    /// Whether there is an object.
    async fn exists(&self, key: &str) -> Result<bool, Unanswered>;
    /// The objects whose keys begin so, in any order. A long listing may be put
    /// together from parts that were read one after the other.
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered>;
    /// Deletes an object. One that is not there is deleted already.
    async fn delete(&self, key: &str) -> Result<(), Unanswered>;

    /// A name for a session that nobody has had and nobody will: 128 random bits.
    fn fresh_session(&self) -> Session;
    /// Waits for a session whose last sign of life this is. `true` if it has been
    /// silent for so long that it may be given up.
    async fn is_given_up(&self, session: Session, last: &Listed, views: bool) -> bool;
    /// Told when a change counts, before its lease goes: from then on somebody may see
    /// it, whether its writer comes to know or not.
    fn counts(&self, _record: &RefKey) {}
    /// How often a write is tried until nothing is known of it.
    fn attempts(&self) -> u32 {
        3
    }
    /// Whether a collection gives up waiting rather than look again.
    fn is_impatient(&self) -> bool {
        false
    }
    /// Whether the checker has taken a rule away.
    fn is_without(&self, _rule: Rule) -> bool {
        false
    }
}

/// Writes an object until that is acknowledged. The bytes are the same each time, so a
/// late one of these writes changes nothing.
///
/// # Errors
/// If no attempt was acknowledged. The object may be there, or come to be.
pub async fn put_surely<B: Bucket>(bucket: &B, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
    let mut last = None;
    for _ in 0..bucket.attempts().max(1) {
        match bucket.put(key, bytes).await {
            Ok(()) => return Ok(()),
            Err(error) => last = Some(error.after(last)),
        }
        if bucket.is_without(Rule::OwnWriteIsAcknowledged) && bucket.exists(key).await? {
            return Ok(());
        }
    }
    Err(last.expect("there was an attempt"))
}

/// Deletes an object until that is acknowledged.
///
/// # Errors
/// If no attempt was acknowledged. The object may be gone, or come to be.
pub async fn delete_surely<B: Bucket>(bucket: &B, key: &str) -> Result<(), Unanswered> {
    let mut last = None;
    for _ in 0..bucket.attempts().max(1) {
        match bucket.delete(key).await {
            Ok(()) => return Ok(()),
            Err(error) => last = Some(error.after(last)),
        }
    }
    Err(last.expect("there was an attempt"))
}
