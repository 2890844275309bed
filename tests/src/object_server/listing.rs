//! Names of objects, a page at a time.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::ISO_DATE;
use super::request::Request;

/// Names a page, as S3 gives them.
const PAGE_NAMES: usize = 1000;

pub(super) fn listing(dir: &Path, request: &Request) -> io::Result<String> {
    let mut all = objects(dir, dir)?;
    all.sort();
    let prefix = request.parameter("prefix").unwrap_or_default();
    let delimiter = request.parameter("delimiter").unwrap_or_default();
    let after = ["continuation-token", "start-after", "marker"];
    let after = after.into_iter().find_map(|name| request.parameter(name));
    let most = request.parameter("max-keys").map(str::parse);
    let most = most.and_then(Result::ok).unwrap_or(PAGE_NAMES);
    let page = page(&all, prefix, delimiter, after.unwrap_or_default(), most);
    let mut out = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><Name>snaps</Name>\
         <IsTruncated>{}</IsTruncated>",
        page.next.is_some()
    );
    if let Some(next) = page.next {
        let names = ["NextContinuationToken", "NextMarker"];
        for name in names {
            let _ = write!(out, "<{name}>{next}</{name}>");
        }
    }
    for (key, size) in page.objects {
        let _ = write!(
            out,
            "<Contents><Key>{key}</Key><LastModified>{ISO_DATE}</LastModified>\
             <ETag>\"a\"</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass>\
             </Contents>"
        );
    }
    for prefix in page.prefixes {
        let _ = write!(
            out,
            "<CommonPrefixes><Prefix>{prefix}</Prefix></CommonPrefixes>"
        );
    }
    out += "</ListBucketResult>";
    Ok(out)
}

#[derive(PartialEq, Debug, Default)]
struct Page<'a> {
    objects: Vec<(&'a str, u64)>,
    prefixes: Vec<&'a str>,
    /// After what the next page begins.
    next: Option<&'a str>,
}

/// Of all objects, sorted, so many at most that come after a name.
fn page<'a>(
    all: &'a [(String, u64)],
    prefix: &str,
    delimiter: &str,
    after: &str,
    most: usize,
) -> Page<'a> {
    let mut page = Page::default();
    let mut last = None;
    for (key, size) in all {
        if !key.starts_with(prefix) {
            continue;
        }
        let cut = match delimiter {
            "" => None,
            delimiter => key[prefix.len()..].find(delimiter),
        };
        let name = cut.map_or(&key[..], |at| &key[..prefix.len() + at + delimiter.len()]);
        if name <= after || page.prefixes.last() == Some(&name) {
            continue;
        }
        if page.objects.len() + page.prefixes.len() == most {
            page.next = last;
            break;
        }
        match cut {
            Some(_) => page.prefixes.push(name),
            None => page.objects.push((name, *size)),
        }
        last = Some(name);
    }
    page
}

fn objects(dir: &Path, root: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir)? {
        paths.push(entry?.path());
    }
    for path in paths {
        // One that is deleted meanwhile is not there.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            found.extend(objects(&path, root)?);
            continue;
        }
        let key = path.strip_prefix(root).map_err(io::Error::other)?;
        found.push((key.to_string_lossy().into_owned(), metadata.len()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::page;

    #[test]
    fn names_come_in_pages_and_by_their_prefixes() {
        let names = ["a/1", "a/2", "b", "c/d/3", "c/d/4", "c/e"];
        let all = names.map(|name| (name.to_owned(), 7));
        let first = page(&all, "", "", "", 4);
        let keys: Vec<_> = first.objects.iter().map(|(key, _)| *key).collect();
        assert_eq!((&keys[..], first.next), (&names[..4], Some("c/d/3")));
        let rest = page(&all, "", "", "c/d/3", 4);
        assert_eq!(rest.objects, [("c/d/4", 7), ("c/e", 7)]);
        assert_eq!(rest.next, None);
        let top = page(&all, "", "/", "", 2);
        assert_eq!((top.objects, top.prefixes), (vec![("b", 7)], vec!["a/"]));
        let top = page(&all, "", "/", top.next.unwrap(), 2);
        assert_eq!((top.prefixes, top.next), (vec!["c/"], None));
        let below = page(&all, "c/", "/", "", 9);
        assert_eq!(below.objects, [("c/e", 7)]);
        assert_eq!(below.prefixes, ["c/d/"]);
    }
}
