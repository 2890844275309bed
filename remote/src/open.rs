//! From a place to what answers there.

use std::path::Path;

use crate::dir::Directory;
use crate::error::{Error, Result};
use crate::objects::Objects;
use crate::place::Place;

/// How long a request may be silent, in seconds, that somebody waits for: who asks has it
/// tried again.
const DEMAND_SILENT_SECONDS: u64 = 5;

/// Nothing is asked of it yet.
pub(crate) fn open(place: &Place) -> Result<Box<dyn Objects>> {
    open_silent(place, None)
}

/// The same for requests that somebody waits for: each is one attempt, which does not take
/// long to find out that nobody answers.
pub(crate) fn open_for_demand(place: &Place) -> Result<Box<dyn Objects>> {
    open_silent(place, Some(DEMAND_SILENT_SECONDS))
}

fn open_silent(place: &Place, silent_seconds: Option<u64>) -> Result<Box<dyn Objects>> {
    let bad = || Error::BadUrl {
        url: place.url.clone(),
    };
    let (scheme, rest) = place.url.split_once("://").ok_or_else(bad)?;
    match scheme {
        "file" if rest.starts_with('/') => {
            let only_url = Place::new(&place.url);
            match *place == only_url {
                true => Ok(Box::new(Directory::new(Path::new(rest)))),
                false => Err(place.unusable("a directory takes no options of a server")),
            }
        }
        "s3" | "gs" | "az" => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(bad());
            }
            let prefix = prefix.trim_end_matches('/');
            open_cloud(place, (scheme, bucket, prefix), silent_seconds)
        }
        _ => Err(bad()),
    }
}

#[cfg(feature = "cloud")]
fn open_cloud(
    place: &Place,
    (scheme, bucket, prefix): (&str, &str, &str),
    silent_seconds: Option<u64>,
) -> Result<Box<dyn Objects>> {
    Ok(Box::new(crate::cloud::Cloud::open(
        place,
        (scheme, bucket, prefix),
        silent_seconds,
    )?))
}

#[cfg(not(feature = "cloud"))]
fn open_cloud(place: &Place, _: (&str, &str, &str), _: Option<u64>) -> Result<Box<dyn Objects>> {
    Err(place.unusable("this program was built without the feature `cloud`"))
}
