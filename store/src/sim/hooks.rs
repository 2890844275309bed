//! The seam with an observer, which is each thread's own.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{Fault, StepKind};

/// Is told what the operations of its thread do.
pub trait Observer {
    /// Before a step; returns when it may be done. It may instead refuse it, or
    /// end the operation by unwinding, after which [`Observer::is_dead`] is true
    /// and every further step is refused.
    ///
    /// # Errors
    /// What the step is to fail with.
    fn before(&self, kind: StepKind, path: &Path) -> io::Result<()>;

    /// The name `path` was made, replaced or removed.
    fn changed(&self, path: &Path);

    /// The file at `path` was flushed.
    fn synced_file(&self, path: &Path);

    /// The directory at `path` was flushed.
    fn synced_dir(&self, path: &Path);

    /// A lock was taken.
    fn locked(&self, path: &Path);

    /// A lock was released.
    fn released(&self, path: &Path);

    /// Lets others go on until a lock may be free again.
    ///
    /// # Errors
    /// If this thread is not to wait any longer.
    fn wait_for(&self, path: &Path) -> io::Result<()>;

    /// Whether the process that this thread stands for has been killed.
    fn is_dead(&self) -> bool;

    /// The number of the process that this thread stands for.
    fn process_id(&self) -> u32 {
        std::process::id()
    }

    /// A number below `below`.
    fn choose(&self, below: usize) -> usize;

    /// The time.
    fn now_unix_seconds(&self) -> u64;

    /// An index of this number was made.
    fn note_index(&self, number: u64);

    /// After how many chunks a pack is full.
    fn pack_chunks(&self) -> usize {
        usize::MAX
    }
}

/// What of a disk cannot be read, whoever reads it: true for a path, an offset and a
/// length that a bad sector is in.
pub type BadSectors = Arc<dyn Fn(&Path, u64, usize) -> bool>;

thread_local! {
    static BAD_SECTORS: RefCell<Option<BadSectors>> = const { RefCell::new(None) };
    static OBSERVER: RefCell<Option<Arc<dyn Observer>>> = const { RefCell::new(None) };
    static FAULT: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Sets or removes this thread's observer.
pub fn observe(observer: Option<Arc<dyn Observer>>) {
    OBSERVER.with_borrow_mut(|current| *current = observer);
}

/// Sets or removes what this thread cannot read, observed or not.
pub fn bad_sectors(bad: Option<BadSectors>) {
    BAD_SECTORS.with_borrow_mut(|current| *current = bad);
}

/// Does something without this thread's observer.
pub fn unobserved<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Arc<dyn Observer>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            observe(self.0.take());
        }
    }
    let _restore = Restore(OBSERVER.take());
    work()
}

/// Puts a fault back for this thread, or none, and what would hide it.
pub fn put_back(fault: Option<Fault>) {
    FAULT.set(fault);
}

/// Frees the indexes with these numbers.
pub fn forget_indexes(numbers: impl IntoIterator<Item = u64>) {
    crate::index::forget_indexes(numbers);
}

fn observer() -> Option<Arc<dyn Observer>> {
    OBSERVER.with_borrow(Clone::clone)
}

pub(crate) fn on(fault: Fault) -> bool {
    FAULT
        .get()
        .is_some_and(|on| on == fault || on.hidden_by() == Some(fault))
}

pub(crate) fn before(kind: StepKind, path: &Path) -> io::Result<()> {
    observer().map_or(Ok(()), |it| it.before(kind, path))
}

/// A part of a pack is read.
pub(crate) fn reads(path: &Path, offset: u64, len: usize) -> io::Result<()> {
    let bad = BAD_SECTORS.with_borrow(Clone::clone);
    if bad.is_some_and(|is_bad| is_bad(path, offset, len)) {
        return Err(rustix::io::Errno::IO.into());
    }
    Ok(())
}

pub(crate) fn changed(path: &Path) {
    if let Some(observer) = observer() {
        observer.changed(path);
    }
}

pub(crate) fn synced_file(path: &Path) {
    if let Some(observer) = observer() {
        observer.synced_file(path);
    }
}

pub(crate) fn synced_dir(path: &Path) {
    if let Some(observer) = observer() {
        observer.synced_dir(path);
    }
}

pub(crate) fn locked(path: &Path) {
    if let Some(observer) = observer() {
        observer.locked(path);
    }
}

pub(crate) fn released(path: &Path) {
    if let Some(observer) = observer() {
        observer.released(path);
    }
}

/// Waits until a lock may be free again. False: this thread has no observer,
/// and has to wait by itself.
pub(crate) fn wait_for(path: &Path) -> io::Result<bool> {
    observer().map_or(Ok(false), |it| it.wait_for(path).map(|()| true))
}

pub(crate) fn is_simulated() -> bool {
    OBSERVER.with_borrow(Option::is_some)
}

pub(crate) fn choose(below: usize) -> usize {
    observer().map_or(0, |it| it.choose(below))
}

pub(crate) fn process_id() -> Option<u32> {
    observer().map(|it| it.process_id())
}

pub(crate) fn now_unix_seconds() -> Option<u64> {
    observer().map(|it| it.now_unix_seconds())
}

pub(crate) fn pack_chunks() -> Option<usize> {
    observer().map(|it| it.pack_chunks())
}

pub(crate) fn note_index(number: u64) {
    if let Some(observer) = observer() {
        observer.note_index(number);
    }
}
