//! What can go wrong between a store and a bucket.

use std::path::PathBuf;

use crate::protocol;

/// The result of an operation on a remote.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was not done, or is not known to be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of the bucket and its protocol.
    #[error(transparent)]
    Protocol(#[from] protocol::Error),
    /// Of the local store.
    #[error(transparent)]
    Store(#[from] snapstore_store::Error),
    /// It is no URL of a bucket.
    #[error(
        "{url:?} is no URL of a bucket: use file:///DIRECTORY, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
    )]
    BadUrl {
        /// What was given.
        url: String,
    },
    /// A place that cannot be used as it is described.
    #[error("cannot use {url}: {why}")]
    Unusable {
        /// Where.
        url: String,
        /// Why not.
        why: String,
    },
    /// A server that may only be reached without TLS, without leave to do so.
    #[error("the endpoint {endpoint} of {url} is http://, which hides nothing on the way")]
    InClear {
        /// Where.
        url: String,
        /// The server.
        endpoint: String,
    },
    /// A file that is no key, or is not to be one.
    #[error("cannot use the key {}: {why}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A key for a remote that is encrypted with another one.
    #[error("the remote in {url} is encrypted with another key than {}", path.display())]
    OtherKey {
        /// Where.
        url: String,
        /// The file with the key.
        path: PathBuf,
    },
    /// No key for a remote that is encrypted.
    #[error("the remote in {url} is encrypted, and no key was given for it")]
    NoKey {
        /// Where.
        url: String,
    },
    /// A key for a remote that is not encrypted.
    #[error("the remote in {url} is not encrypted, and the key {} was given for it", path.display())]
    InClearThere {
        /// Where.
        url: String,
        /// The file with the key.
        path: PathBuf,
    },
    /// A bucket without a configuration.
    #[error("there is no remote in {url}")]
    NoRemote {
        /// Where.
        url: String,
    },
    /// No directory, or an empty one.
    #[error("nothing is there (is its filesystem mounted?): {url}")]
    NothingThere {
        /// Where.
        url: String,
        /// Whether there was a remote when this store last looked.
        was_there: bool,
    },
    /// There is one already.
    #[error("there is a remote in {url}")]
    RemoteExists {
        /// Where.
        url: String,
    },
    /// What is called as a remote's configuration is something else, and stays.
    #[error(
        "{url} has an object \"config\" that no remote wrote, and nothing of a remote beside it"
    )]
    ForeignConfig {
        /// Where.
        url: String,
    },
    /// A store with other pages.
    #[error("the pages of {url} have {remote_bytes} bytes, and those of the store {store_bytes}")]
    OtherPageSize {
        /// Where.
        url: String,
        /// Of the remote.
        remote_bytes: u64,
        /// Of the store.
        store_bytes: u64,
    },
    /// A probe found that the bucket does not keep what it has to.
    #[error("{url} is not fit for a remote: {what}")]
    Unfit {
        /// Where.
        url: String,
        /// What it did.
        what: &'static str,
    },
}

impl From<protocol::Unanswered> for Error {
    fn from(error: protocol::Unanswered) -> Self {
        Self::Protocol(error.into())
    }
}

/// What is damaged, or of a newer version, is not reused: it stops no push of something else.
pub(crate) fn usable<T>(found: protocol::Result<T>) -> protocol::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(
            protocol::Error::Damaged { .. }
            | protocol::Error::Missing { .. }
            | protocol::Error::Newer { .. },
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

/// As the protocol tells it.
pub(crate) fn of_bucket(error: Error) -> protocol::Error {
    match error {
        Error::Protocol(error) => error,
        other => protocol::Error::Work(Box::new(other)),
    }
}
