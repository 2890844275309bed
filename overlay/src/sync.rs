//! Having on the disk what was written up to a moment, while all goes on.
//!
//! Order: what was written and the journal's entries of it, then a mark in the journal that
//! says so, then the mark. A mark that came to the disk before what it vouches for would
//! make a power cut look like damage.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{sync_dir, sync_file};
use crate::journal::Journal;

/// Whether something that was to be synced is lost. The kernel tells that once, to whoever
/// asks first; who asks later is told that all is well.
pub(crate) type Lost = Arc<Mutex<bool>>;

/// What has to be on the disk for all that was written up to a moment to be there.
pub struct SyncPoint {
    file: Arc<File>,
    lost: Lost,
    /// Of the journal's entries.
    pub(crate) entries: u64,
    /// Those with something that may not be on the disk.
    journals: Vec<Arc<File>>,
    /// Where a segment has begun whose name may not be on the disk.
    dir: Option<PathBuf>,
    /// The journal says nothing that is not on the disk.
    is_clean: bool,
    /// How many entries there are with the mark, if it vouches for all before it.
    marked: Option<u64>,
}

impl SyncPoint {
    pub(crate) fn new(file: Arc<File>, journal: Option<&Journal>, lost: Lost) -> Self {
        let dirty = journal.filter(|journal| !journal.is_clean());
        Self {
            file,
            lost,
            entries: journal.map_or(0, Journal::entries),
            journals: dirty.map(Journal::unsynced).unwrap_or_default(),
            dir: dirty.and_then(Journal::new_segment_in),
            is_clean: dirty.is_none(),
            marked: None,
        }
    }

    /// Has the data written, and what the journal says of it. Anything may go on meanwhile.
    ///
    /// # Errors
    /// The operating system's; something was lost when it was synced before.
    pub fn sync_data(&self) -> io::Result<()> {
        self.sync(|| {
            sync_file(&self.file)?;
            self.journals.iter().try_for_each(|file| sync_file(file))?;
            self.dir.as_deref().map_or(Ok(()), sync_dir)
        })
    }

    /// Has the journal's mark written, after [`crate::Overlay::mark`].
    ///
    /// # Errors
    /// As [`SyncPoint::sync_data`].
    pub fn sync_journal(&self) -> io::Result<()> {
        self.sync(|| self.journals.iter().try_for_each(|file| sync_file(file)))
    }

    /// One at a time, so that nobody asks between the failure and its being known.
    fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut lost = check_lost(&self.lost)?;
        let synced = sync();
        *lost = synced.is_err();
        synced
    }

    pub(crate) fn mark(&mut self, journal: &mut Journal) -> io::Result<()> {
        if self.is_clean {
            return Ok(());
        }
        journal.append_mark(self.entries)?;
        self.journals = journal.unsynced();
        let with_mark = self.entries + 1;
        self.marked = (journal.entries() == with_mark).then_some(with_mark);
        Ok(())
    }

    pub(crate) fn synced(&self, journal: &mut Journal) {
        if !self.is_clean {
            journal.synced(&self.journals, self.marked);
        }
    }
}

/// Fails if something was lost: what the files hold need not be what was written.
pub(crate) fn check_lost(lost: &Lost) -> io::Result<MutexGuard<'_, bool>> {
    let lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
    match *lost {
        false => Ok(lost),
        true => Err(io::Error::other(
            "something that was written before could not be brought to the disk, and is lost; \
             unmount the view, and go on with what is there",
        )),
    }
}
