//! Where a remote is, and how it is reached.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dir::Directory;
use crate::error::{Error, Result};
use crate::objects::Objects;

/// Where the objects of a remote are. It holds no secrets, only the file with them.
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

    /// Nothing is asked of it yet.
    pub(crate) fn open(&self) -> Result<Box<dyn Objects>> {
        let bad = || Error::BadUrl {
            url: self.url.clone(),
        };
        let (scheme, rest) = self.url.split_once("://").ok_or_else(bad)?;
        match scheme {
            "file" if rest.starts_with('/') => {
                let only_url = Self::new(&self.url);
                match *self == only_url {
                    true => Ok(Box::new(Directory::new(Path::new(rest)))),
                    false => Err(self.unusable("a directory takes no options of a server")),
                }
            }
            "s3" | "gs" | "az" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if bucket.is_empty() {
                    return Err(bad());
                }
                self.open_cloud(scheme, bucket, prefix.trim_end_matches('/'))
            }
            _ => Err(bad()),
        }
    }

    #[cfg(feature = "cloud")]
    fn open_cloud(&self, scheme: &str, bucket: &str, prefix: &str) -> Result<Box<dyn Objects>> {
        Ok(Box::new(crate::cloud::Cloud::open(
            self, scheme, bucket, prefix,
        )?))
    }

    #[cfg(not(feature = "cloud"))]
    fn open_cloud(&self, _: &str, _: &str, _: &str) -> Result<Box<dyn Objects>> {
        Err(self.unusable("this program was built without the feature `cloud`"))
    }

    pub(crate) fn unusable(&self, why: impl Into<String>) -> Error {
        Error::Unusable {
            url: self.url.clone(),
            why: why.into(),
        }
    }
}
