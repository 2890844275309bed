//! From a place to what answers there.

use std::path::Path;

use crate::dir::Directory;
use crate::error::{Error, Result};
use crate::objects::Objects;
use crate::place::Place;

/// Nothing is asked of it yet.
pub(crate) fn open(place: &Place) -> Result<Box<dyn Objects>> {
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
            open_cloud(place, scheme, bucket, prefix.trim_end_matches('/'))
        }
        _ => Err(bad()),
    }
}

#[cfg(feature = "cloud")]
fn open_cloud(place: &Place, scheme: &str, bucket: &str, prefix: &str) -> Result<Box<dyn Objects>> {
    Ok(Box::new(crate::cloud::Cloud::open(
        place, scheme, bucket, prefix,
    )?))
}

#[cfg(not(feature = "cloud"))]
fn open_cloud(place: &Place, _: &str, _: &str, _: &str) -> Result<Box<dyn Objects>> {
    Err(place.unusable("this program was built without the feature `cloud`"))
}
