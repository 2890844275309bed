//! The tags that were set last, so that finding them takes no look at every tag.
//!
//! ```text
//!  8  seconds     8  nanoseconds of the last change of the directory of tags
//!     names of tags, the last set first, each ended by a zero byte
//! ```
//! in a sealed file that is written under the publish lock, whenever a tag is set or
//! removed. It is a guess that costs nothing if it is lost: it is not made durable,
//! and where it is missing, torn, or not as old as the directory (another program
//! changed that, or it is a copy) the directory is listed with the age of each tag.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;

use crate::error::{IoContext as _, Result};
use crate::format::sealed_file::Format;
use crate::layout::Layout;
use crate::name::check_tag;
use crate::regular;

/// How many tags are kept.
pub(crate) const MOST: usize = 32;

const FORMAT: Format = Format {
    magic: *b"SNAPRECE",
    version: 1,
};

/// The tags that were set last, at most [`MOST`], the latest first.
pub(crate) fn tags(layout: &Layout) -> Result<Vec<String>> {
    match read(layout) {
        Some(names) => Ok(names),
        None => by_age(layout),
    }
}

/// Notes that a tag is set or removed, which `change` does. The caller holds the
/// publish lock.
pub(crate) fn note(
    layout: &Layout,
    tag: &str,
    is_set: bool,
    change: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = read(layout);
    change()?;
    // Nothing below matters enough to fail what is done.
    let known = match before {
        Some(names) => Ok(names),
        None => by_age(layout),
    };
    if let Ok(mut names) = known {
        names.retain(|name| name != tag);
        if is_set {
            names.insert(0, tag.to_owned());
            names.truncate(MOST);
        }
        write(layout, &names);
    }
    Ok(())
}

fn read(layout: &Layout) -> Option<Vec<String>> {
    let payload = FORMAT.read(&layout.recent_tags()).ok()??;
    let (changed, names) = payload.split_first_chunk::<16>()?;
    if *changed != last_change(layout)? {
        return None;
    }
    let names = std::str::from_utf8(names).ok()?;
    let names: Vec<String> = names.split_terminator('\0').map(str::to_owned).collect();
    let good = names.len() <= MOST && names.iter().all(|name| check_tag(name).is_ok());
    // After many were removed, others may have been set last.
    (good && !names.is_empty()).then_some(names)
}

fn write(layout: &Layout, names: &[String]) {
    let Some(changed) = last_change(layout) else {
        return;
    };
    let mut payload = changed.to_vec();
    for name in names {
        payload.extend_from_slice(name.as_bytes());
        payload.push(0);
    }
    let path = layout.recent_tags();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let _ = regular::never_waiting(&options)
        .open(&path)
        .and_then(|mut file| file.write_all(&FORMAT.encode(&path, &payload)));
}

/// When the directory of tags was last changed.
fn last_change(layout: &Layout) -> Option<[u8; 16]> {
    let metadata = fs::metadata(layout.tags()).ok()?;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&metadata.mtime().to_le_bytes());
    bytes[8..].copy_from_slice(&metadata.mtime_nsec().to_le_bytes());
    Some(bytes)
}

fn by_age(layout: &Layout) -> Result<Vec<String>> {
    let dir = layout.tags();
    let mut dated = Vec::new();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context("list", &dir)?,
    };
    for entry in entries {
        let entry = entry.context("list", &dir)?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| check_tag(name).is_ok()) else {
            continue;
        };
        #[cfg(test)]
        crate::tags::tests::count_a_look();
        // One that was removed since the directory was read is left out.
        if let Ok(set) = entry.metadata().and_then(|metadata| metadata.modified()) {
            dated.push((set, name.to_owned()));
        }
    }
    dated.sort_unstable();
    let latest_first = dated.into_iter().rev().map(|(_, name)| name);
    Ok(latest_first.take(MOST).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SnapshotId;
    use crate::tags as all_tags;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        fs::create_dir(layout.tags()).unwrap();
        (dir, layout)
    }

    fn set(layout: &Layout, tag: &str) {
        all_tags::set(layout, tag, SnapshotId::from_bytes([1; 32])).unwrap();
    }

    #[test]
    fn the_last_set_come_first() {
        let (_dir, layout) = layout();
        assert!(tags(&layout).unwrap().is_empty());
        for number in 0..MOST + 5 {
            set(&layout, &format!("t{number}"));
        }
        set(&layout, "t10");
        let names = tags(&layout).unwrap();
        assert_eq!(names.len(), MOST);
        assert_eq!(names[..3], ["t10", "t36", "t35"]);
        all_tags::remove(&layout, "t36").unwrap();
        assert_eq!(tags(&layout).unwrap()[..2], ["t10", "t35"]);
        assert!(read(&layout).is_some(), "it is known without a listing");
    }

    #[test]
    fn what_is_lost_torn_or_old_is_found_by_age() {
        let (_dir, layout) = layout();
        for tag in ["one", "two"] {
            set(&layout, tag);
            let file = fs::File::open(layout.tags().join(tag)).unwrap();
            let seconds = tag.len() as u64 + u64::from(tag == "two");
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds))
                .unwrap();
        }
        let expected = ["two", "one"];
        assert_eq!(tags(&layout).unwrap(), expected);
        let bytes = fs::read(layout.recent_tags()).unwrap();
        fs::write(layout.recent_tags(), &bytes[..bytes.len() - 1]).unwrap();
        assert!(read(&layout).is_none());
        assert_eq!(tags(&layout).unwrap(), expected);
        fs::remove_file(layout.recent_tags()).unwrap();
        assert_eq!(tags(&layout).unwrap(), expected);
        // Somebody who knows nothing of it sets a tag.
        fs::write(layout.recent_tags(), &bytes).unwrap();
        assert!(read(&layout).is_some());
        fs::copy(layout.tags().join("one"), layout.tags().join("three")).unwrap();
        assert!(read(&layout).is_none());
        assert_eq!(tags(&layout).unwrap()[0], "three");
    }
}
