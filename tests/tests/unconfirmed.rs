//! A change that everybody sees, though the disk failed to confirm it: it is tried
//! again, and never called a failure that left things as they were.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};
use snapstore_store::sim::{Observer, StepKind, observe};
use snapstore_store::{
    CommitRequest, Error, ErrorClass, ImageRole, Input, InputData, InputKind, PageSize, Silent,
    Store,
};

/// Fails the next so many flushes of the directory of tags.
struct FailsFlushes(AtomicUsize);

impl Observer for FailsFlushes {
    fn before(&self, kind: StepKind, path: &Path) -> io::Result<()> {
        let left = self.0.load(Ordering::Relaxed);
        if kind == StepKind::SyncDir && path.ends_with("tags") && left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            return Err(rustix::io::Errno::IO.into());
        }
        Ok(())
    }

    fn changed(&self, _path: &Path) {}
    fn synced_file(&self, _path: &Path) {}
    fn synced_dir(&self, _path: &Path) {}
    fn locked(&self, _path: &Path) {}
    fn released(&self, _path: &Path) {}

    fn wait_for(&self, _path: &Path) -> io::Result<()> {
        Err(rustix::io::Errno::BUSY.into())
    }

    fn is_dead(&self) -> bool {
        false
    }

    fn choose(&self, _below: usize) -> usize {
        0
    }

    fn now_unix_seconds(&self) -> u64 {
        1
    }

    fn note_index(&self, _number: u64) {}
}

/// Does something while so many flushes of the directory of tags fail.
fn failing<T>(flushes: usize, work: impl FnOnce() -> T) -> (T, usize) {
    let observer = Arc::new(FailsFlushes(AtomicUsize::new(flushes)));
    observe(Some(observer.clone()));
    let done = work();
    observe(None);
    (done, observer.0.load(Ordering::Relaxed))
}

fn request(tag: &str, seed: u8) -> CommitRequest {
    CommitRequest {
        tag: tag.to_owned(),
        inputs: vec![Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Bytes(vec![seed; 8192].into()),
            kind: InputKind::Full,
        }],
        ..CommitRequest::default()
    }
}

fn is_unconfirmed(error: &Error) -> bool {
    matches!(error, Error::Unconfirmed { .. })
        && error.class() == ErrorClass::Io
        && error.to_string().contains("may or may not")
}

#[test]
fn commits_and_removals_are_tried_again_and_told_for_what_they_are() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    // The index of a simulated store is in memory, and that of this thread.
    let store = Store::create(&dir.path().join("store"), PageSize::KIB_4)?;
    let (done, left) = failing(1, || store.commit(&request("one", 1), &Silent));
    done.context("the second flush confirms it")?;
    assert_eq!(left, 0, "a flush has failed");
    assert!(store.tag("one")?.is_some());

    let (done, left) = failing(2, || store.commit(&request("two", 2), &Silent));
    assert_eq!(left, 0);
    let error = done.err().context("nothing has confirmed it")?;
    ensure!(is_unconfirmed(&error), "{error}");
    let id = store.tag("two")?.context("it is in place all the same")?;
    let manifest = store.manifest(id)?;
    assert_eq!(store.read_file_image(&manifest.images[0], 8192)?, [2; 8192]);

    let (done, _) = failing(1, || store.remove_tags(&["one".to_owned()]));
    done.context("the second flush confirms it")?;
    assert!(store.tag("one")?.is_none());
    let (done, _) = failing(2, || store.remove_tags(&["two".to_owned()]));
    let error = done.err().context("nothing has confirmed it")?;
    ensure!(is_unconfirmed(&error), "{error}");
    assert!(store.tag("two")?.is_none(), "it is removed all the same");
    Ok(())
}
