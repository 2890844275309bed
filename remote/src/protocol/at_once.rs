//! Requests that do not depend on each other: they may be under way at the same time, and be
//! done in any order.

use crate::protocol::{Bucket, Listed, Unanswered};

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    /// [`Bucket::put`].
    Put(&'a str, &'a [u8]),
    /// [`Bucket::get`].
    Get(&'a str),
    /// [`Bucket::list`].
    List(&'a str),
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It was written.
    Done,
    /// The object, if it is there.
    Bytes(Option<Vec<u8>>),
    /// What was listed.
    Objects(Vec<Listed>),
}

/// A bucket that does several things at the same time.
pub trait AtOnce: Bucket {
    /// Does all of these, and returns when all are done: an answer for each, in their order.
    async fn at_once(&self, asks: &[Ask<'_>]) -> Vec<Result<Answer, Unanswered>>;
}

impl Ask<'_> {
    /// Does it alone.
    ///
    /// # Errors
    /// As the bucket's.
    pub async fn of<B: Bucket>(self, bucket: &B) -> Result<Answer, Unanswered> {
        match self {
            Self::Put(key, bytes) => bucket.put(key, bytes).await.map(|()| Answer::Done),
            Self::Get(key) => bucket.get(key).await.map(Answer::Bytes),
            Self::List(prefix) => bucket.list(prefix).await.map(Answer::Objects),
        }
    }
}

impl Answer {
    /// What a read found.
    pub(crate) fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => bytes,
            other => unreachable!("a read is answered by {other:?}"),
        }
    }

    /// What a listing found.
    pub(crate) fn objects(self) -> Vec<Listed> {
        match self {
            Self::Objects(objects) => objects,
            other => unreachable!("a listing is answered by {other:?}"),
        }
    }
}
