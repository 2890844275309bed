//! Where a remote is, and how it is reached.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Where the objects of a remote are. It holds no secrets, only the files with them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    /// `file:///DIRECTORY`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or
    /// `az://CONTAINER/PREFIX`.
    pub url: String,
    /// The server, if it is not the provider's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The region of an S3 bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Whether the endpoint may be reached without TLS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_http: bool,
    /// A file of lines `NAME=VALUE` that count before the environment's variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<PathBuf>,
    /// Whether the provider's own service on its machines is asked for credentials where
    /// there are no others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub machine_role: bool,
    /// The file with the key that all there is encrypted with, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// How long a request is tried again, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_seconds: Option<u64>,
}

impl Place {
    /// A place that is reached as its provider says.
    #[must_use]
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            ..Self::default()
        }
    }

    pub(crate) fn unusable(&self, why: impl Into<String>) -> Error {
        Error::Unusable {
            url: self.url.clone(),
            why: why.into(),
        }
    }
}
