//! Reading a snapshot's working sets through the mount that shows it, so that they are
//! in the kernel's page cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use snapstore_store::{ErrorClass, Store};

use crate::error::NotFound;
use crate::mounts;
use crate::runtime::Runtime;

/// Requests that are under way at once.
const READERS: usize = 2;

/// What was read.
#[derive(Debug)]
pub struct Warmed {
    /// Where the snapshot is mounted.
    pub dir: PathBuf,
    /// How many pages.
    pub pages: usize,
    /// How many bytes these are.
    pub bytes: u64,
}

/// Reads the recorded pages of all images of a mounted snapshot, in their order.
///
/// # Errors
/// [`NotFound`] if it is not mounted, or nothing was recorded of it.
pub fn warm(runtime: &Runtime, store: &Store, name: &str) -> anyhow::Result<Warmed> {
    let id = store.resolve(name)?;
    let dir = mounts::find_any(runtime, store, id)?.ok_or_else(|| {
        NotFound(format!(
            "{name} is not mounted; what is recorded of it is read when it is mounted or restored"
        ))
    })?;
    let mut warmed = Warmed {
        dir,
        pages: 0,
        bytes: 0,
    };
    let mut is_recorded = false;
    for image in &store.manifest(id)?.images {
        let set = match store.working_set(id, &image.name) {
            // The next recording takes its place.
            Err(error) if error.class() == ErrorClass::Damaged => {
                tracing::warn!(%error, "what was recorded is not used");
                continue;
            }
            other => other?,
        };
        let Some(set) = set else {
            continue;
        };
        is_recorded = true;
        let pages: Vec<u64> = set.pages().map(u64::from).collect();
        let path = warmed.dir.join(image.file_name());
        // This is no use of the image, and not to be recorded as one.
        let mut options = OpenOptions::new();
        let flags = rustix::fs::OFlags::NOATIME.bits().cast_signed();
        options.read(true).custom_flags(flags);
        let file = options.open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        read(&file, &pages, store.page_size().bytes())
            .with_context(|| format!("cannot read {}", path.display()))?;
        warmed.pages += pages.len();
        warmed.bytes += pages.len() as u64 * store.page_size().bytes();
    }
    if !is_recorded {
        let message = format!(
            "nothing is recorded of {name} yet: its first restore, or whoever reads its mount, \
             makes a recording"
        );
        return Err(NotFound(message).into());
    }
    Ok(warmed)
}

fn read(file: &File, pages: &[u64], page_bytes: u64) -> anyhow::Result<()> {
    // Each page for itself: what is around it was not recorded.
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random)?;
    let next = AtomicUsize::new(0);
    let read_some = || -> anyhow::Result<()> {
        let mut buffer = vec![0; usize::try_from(page_bytes)?];
        while let Some(page) = pages.get(next.fetch_add(1, Ordering::Relaxed)) {
            file.read_at(&mut buffer, page * page_bytes)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read_some)).collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().expect("it does not panic"))
    })
}
