//! From a place to what answers there.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use crate::dir::Directory;
use crate::error::{Error, Result};
use crate::objects::Objects;
use crate::place::Place;
use crate::sealing::{DomainKey, Sealed};

/// How long a request may be silent that somebody waits for: who asks has it tried again.
const DEMAND_SILENT: Duration = Duration::from_secs(5);

const NO_DIRECTORY: &str = "a file stands there, or in the way to it, and it has to be a directory: \
    give the path of a directory";

/// Nothing is asked of it yet.
pub(crate) fn open(place: &Place) -> Result<Box<dyn Objects>> {
    open_silent(place, None)
}

/// The same for requests that somebody waits for, so long at most: each is one attempt, which
/// does not take long to find out that nobody answers.
pub(crate) fn open_for_demand(place: &Place, patience: Duration) -> Result<Box<dyn Objects>> {
    open_silent(place, Some(DEMAND_SILENT.min(patience)))
}

/// With a key, what is there is decrypted.
fn open_silent(place: &Place, silent: Option<Duration>) -> Result<Box<dyn Objects>> {
    let objects = open_stored(place, silent)?;
    match &place.key {
        None => Ok(objects),
        Some(path) => Ok(Box::new(Sealed::new(objects, &DomainKey::read(path)?))),
    }
}

/// What is there, as it is stored.
fn open_stored(place: &Place, silent: Option<Duration>) -> Result<Box<dyn Objects>> {
    let bad = || Error::BadUrl {
        url: place.url.clone(),
    };
    let (scheme, rest) = place.url.split_once("://").ok_or_else(bad)?;
    match scheme {
        "file" if rest.starts_with('/') => {
            let only_url = Place {
                key: place.key.clone(),
                ..Place::new(&place.url)
            };
            if *place != only_url {
                return Err(place.unusable("a directory takes no options of a server"));
            }
            let root = Path::new(rest);
            let is_something_else = match fs::metadata(root) {
                Ok(found) => !found.is_dir(),
                Err(error) => error.kind() == ErrorKind::NotADirectory,
            };
            match is_something_else {
                true => Err(place.unusable(NO_DIRECTORY)),
                false => Ok(Box::new(Directory::new(root))),
            }
        }
        "s3" | "gs" | "az" => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(bad());
            }
            let prefix = prefix.trim_end_matches('/');
            open_cloud(place, (scheme, bucket, prefix), silent)
        }
        _ => Err(bad()),
    }
}

#[cfg(feature = "cloud")]
fn open_cloud(
    place: &Place,
    (scheme, bucket, prefix): (&str, &str, &str),
    silent: Option<Duration>,
) -> Result<Box<dyn Objects>> {
    Ok(Box::new(crate::cloud::Cloud::open(
        place,
        (scheme, bucket, prefix),
        silent,
    )?))
}

#[cfg(not(feature = "cloud"))]
fn open_cloud(
    place: &Place,
    _: (&str, &str, &str),
    _: Option<Duration>,
) -> Result<Box<dyn Objects>> {
    Err(place.unusable("this program was built without the feature `cloud`"))
}
