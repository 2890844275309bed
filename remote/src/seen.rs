//! Which records of tags a store has seen in a bucket: who can write to the bucket can delete the
//! newest record of a tag, and then an older one would count again.
//!
//! ```text
//! STORE/remotes-seen/BUCKET, sealed as objects are (`SNAPSEEN`), BUCKET being the random part of
//! the bucket's configuration:
//!     4 count, then each, what was looked at last first:
//!         8 highest number of a record that counted   8 lowest number that is taken for right
//!         2 length and tag
//! ```
//! A memory that is lost or damaged begins anew. Numbers of tags never go down: the last record
//! of a tag that counts stays, also a removal.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::Result;
use crate::protocol::sealed::Fields;
use crate::protocol::{self, Listing, Malformed, RefKey, View, seal, unseal};
use crate::remote::{Remote, block_on, hex, who};

/// What was seen of remotes is kept in this directory of a store.
const DIR: &str = "remotes-seen";
/// Locked (flock(2)) by who changes one of its files.
const LOCK: &str = "locks/remotes";
const SEEN: [u8; 8] = *b"SNAPSEEN";
/// What was looked at longest ago is forgotten beyond these.
const MOST_TAGS: usize = 4096;
/// No host writes so many records of a tag: a higher number is somebody's joke, and what is above it
/// could not be written any more.
const MOST_RECORDS: u64 = 1 << 62;
const MOST_BYTES: u64 = 4 << 20;
/// A listing of a server may lag: so often it is asked again, after these pauses.
const PAUSES_MS: [u64; 6] = [100, 200, 400, 800, 1600, 3200];
/// A directory may, too, if it is of a network; for tests on local ones it has to be short.
const PAUSES_OF_DIRECTORY: usize = 2;

/// A tag that was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    tag: String,
    /// The highest number of a record of it that counted.
    highest: u64,
    /// A record below this one was rolled back to.
    lowest: u64,
}

/// A tag, and what to tell of it.
type Older = (String, String);

/// What a store has seen of a bucket.
pub(crate) struct Seen {
    store: Option<PathBuf>,
    bucket: String,
    /// The pauses that are left.
    pauses: Cell<&'static [u64]>,
    entries: Vec<Entry>,
}

impl Remote {
    /// Has the store at this path remember which records of tags were seen: older ones are
    /// refused from then on.
    #[must_use]
    pub fn remembered_in(mut self, store: &Path) -> Self {
        self.remembered_in = Some(store.to_owned());
        self
    }

    /// What was seen of the bucket of this configuration.
    pub(crate) fn seen(&self, bucket: &[u8; 16]) -> Seen {
        let store = self.remembered_in.clone();
        let bucket = hex(bucket);
        let read = |store: &PathBuf| read(store, &bucket).unwrap_or_default();
        Seen {
            entries: store.as_ref().map(read).unwrap_or_default(),
            store,
            bucket,
            pauses: Cell::new(match self.bucket.requests() {
                Some(_) => &PAUSES_MS,
                None => &PAUSES_MS[..PAUSES_OF_DIRECTORY],
            }),
        }
    }

    /// Begins a view, or begins it again, until what it shows is not older than what was seen.
    pub(crate) fn view_not_older(
        &self,
        seen: &Seen,
        tag: &str,
        mut begun: protocol::Result<View>,
    ) -> Result<View> {
        loop {
            let is_older = match &begun {
                Ok(view) if seen.rolled_back(tag, view.record.seq).is_some() => {
                    // One that stays is given up by a collection.
                    let _ = block_on(view.lease.end(self));
                    let listing = block_on(Listing::of_tag(self, tag))?;
                    if seen.rolled_back(tag, highest(&listing, tag)).is_some() {
                        seen.is_older(tag, highest(&listing, tag))?
                    } else if let Some(newest) = listing.records(tag).next()
                        && !seen.waits()
                    {
                        // It seems not to count, as when a sign of life of its writer comes after
                        // the end: until a collection gives that up.
                        let (tag, session) = (tag.to_owned(), newest.session);
                        return Err(protocol::Error::TagBusy { tag, session }.into());
                    } else {
                        true
                    }
                }
                // It may have been removed.
                Err(protocol::Error::NoTag { .. }) if seen.entry(tag).is_some() => {
                    let listing = block_on(Listing::of_tag(self, tag))?;
                    seen.is_older(tag, highest(&listing, tag))?
                }
                _ => false,
            };
            if !is_older {
                return Ok(begun?);
            }
            begun = block_on(protocol::view(self, tag, &who()));
        }
    }

    /// All records, and of which tags older ones than were seen.
    pub(crate) fn listing_with(&self, seen: &Seen) -> protocol::Result<(Listing, Vec<Older>)> {
        loop {
            let listing = block_on(Listing::of_all(self))?;
            let older = |tag: &str| {
                let error = seen.rolled_back(tag, listing.shown(tag))?;
                Some((tag.to_owned(), error.to_string()))
            };
            let older: Vec<Older> = seen.tags().filter_map(older).collect();
            if older.is_empty() || !seen.waits() {
                return Ok((listing, older));
            }
        }
    }

    /// Takes what the bucket shows of a tag for right, though it is older than what was seen.
    /// The numbers that it shows and that were seen, 0 for none; `None` if it is not older.
    ///
    /// # Errors
    /// [`protocol::Error::NoTag`] if the tag was not seen at all, and is not there; if the bucket
    /// did not answer.
    pub fn accept_older(&self, tag: &str) -> Result<Option<(u64, u64)>> {
        let mut seen = self.seen(&self.config()?.id);
        let listing = block_on(Listing::of_tag(self, tag))?;
        let shown = listing.shown(tag);
        let Some(entry) = seen.entry(tag) else {
            return match shown {
                0 => Err(protocol::Error::NoTag {
                    tag: tag.to_owned(),
                }
                .into()),
                _ => Ok(None),
            };
        };
        if shown >= entry.lowest {
            return Ok(None);
        }
        let was = entry.lowest;
        seen.change(|entries| {
            if let Some(entry) = entries.iter_mut().find(|entry| entry.tag == tag) {
                entry.lowest = shown;
            }
        })
        .map_err(|error| protocol::Error::Work(error.into()))?;
        Ok(Some((shown, was)))
    }
}

impl Seen {
    fn entry(&self, tag: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.tag == tag)
    }

    /// Pauses, if there is one left.
    fn waits(&self) -> bool {
        let Some((pause, left)) = self.pauses.get().split_first() else {
            return false;
        };
        self.pauses.set(left);
        thread::sleep(Duration::from_millis(*pause));
        true
    }

    /// The tags that were seen.
    pub fn tags(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.tag.as_str())
    }

    /// The highest number that was seen of a tag, of which what is written next is above.
    pub fn highest(&self, tag: &str) -> u64 {
        self.entry(tag).map_or(0, |entry| entry.highest)
    }

    /// The error, if a tag has been seen with a later record than the bucket shows.
    fn rolled_back(&self, tag: &str, shown: u64) -> Option<protocol::Error> {
        let seen = self.entry(tag)?.lowest;
        (shown < seen).then(|| protocol::Error::RolledBack {
            tag: tag.to_owned(),
            shown,
            seen,
        })
    }

    /// Whether to look again, after a pause, since a listing may lag.
    ///
    /// # Errors
    /// [`protocol::Error::RolledBack`], once that was done for long enough.
    pub fn is_older(&self, tag: &str, shown: u64) -> protocol::Result<bool> {
        match self.rolled_back(tag, shown) {
            None => Ok(false),
            Some(_) if self.waits() => Ok(true),
            Some(error) => Err(error),
        }
    }

    /// Remembers a record that counted, and that was read or written here.
    pub fn remember(&mut self, record: &RefKey) {
        self.remember_all(vec![(record.tag.clone(), record.seq)], true);
    }

    /// Remembers records; those that were `used` before others, which only have what room there
    /// is.
    pub fn remember_all(&mut self, records: Vec<(String, u64)>, used: bool) {
        // What is near the end of the list moves up, or it would be forgotten though it is used.
        let is_known = |(tag, seq): &(String, u64)| {
            let at = self.entries.iter().position(|entry| entry.tag == *tag);
            at.is_some_and(|at| {
                let entry = &self.entries[at];
                let stays = !used || at < MOST_TAGS / 2;
                stays && entry.highest >= *seq && entry.lowest >= *seq
            })
        };
        if self.store.is_none() || records.iter().all(is_known) {
            return;
        }
        let changed = self.change(|entries| {
            for (tag, seq) in records {
                note(entries, tag, seq, used);
            }
        });
        if let Err(error) = changed
            && error.kind() != ErrorKind::ReadOnlyFilesystem
        {
            tracing::warn!(%error, "what was seen of this remote is not remembered");
        }
    }

    /// Changes what is remembered, as others have left it.
    fn change(&mut self, change: impl FnOnce(&mut Vec<Entry>)) -> io::Result<()> {
        let Some(store) = &self.store else {
            return Ok(());
        };
        let lock = File::create(store.join(LOCK))?;
        while let Err(error) = flock(&lock, FlockOperation::LockExclusive) {
            if error != Errno::INTR {
                return Err(error.into());
            }
        }
        let Some(mut entries) = read(store, &self.bucket) else {
            // A newer version's, or one that can be read another time.
            return Ok(());
        };
        change(&mut entries);
        write(store, &self.bucket, &entries)?;
        self.entries = entries;
        Ok(())
    }
}

/// The highest number of a tag that counts, or may.
fn highest(listing: &Listing, tag: &str) -> u64 {
    listing.shown(tag).max(listing.removed(tag))
}

/// A later record counts, whatever older one was taken for right.
fn note(entries: &mut Vec<Entry>, tag: String, seq: u64, used: bool) {
    if seq > MOST_RECORDS {
        return;
    }
    let at = entries.iter().position(|entry| entry.tag == tag);
    let entry = match at {
        None if !used && entries.len() >= MOST_TAGS => return,
        None => Entry {
            tag,
            highest: seq,
            lowest: seq,
        },
        Some(at) => {
            let mut entry = entries.remove(at);
            entry.highest = entry.highest.max(seq);
            entry.lowest = entry.lowest.max(seq);
            entry
        }
    };
    match (used, at) {
        (true, _) => entries.insert(0, entry),
        (false, Some(at)) => entries.insert(at, entry),
        (false, None) => entries.push(entry),
    }
    entries.truncate(MOST_TAGS);
}

/// What is remembered; nothing if that is lost or damaged, `None` if it is there and cannot be read,
/// or a newer version wrote it.
fn read(store: &Path, bucket: &str) -> Option<Vec<Entry>> {
    let path = store.join(DIR).join(bucket);
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes));
    match read.map(|_| decode(bucket, &bytes)) {
        Ok(Ok(entries)) => return Some(entries),
        Ok(Err(Malformed::Newer(_))) => return None,
        Ok(Err(Malformed::Wrong(why))) => {
            tracing::warn!(path = %path.display(), why, "what was seen of a remote is damaged, and begins anew");
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "what was seen of a remote cannot be read");
            return None;
        }
    }
    Some(Vec::new())
}

fn write(store: &Path, bucket: &str, entries: &[Entry]) -> io::Result<()> {
    let dir = store.join(DIR);
    fs::create_dir_all(&dir)?;
    // Only who has the lock writes it.
    let part = dir.join(format!(".{bucket}.new"));
    let written = File::create(&part)
        .and_then(|mut file| {
            file.write_all(&encode(bucket, entries))?;
            // Else it may be empty after the power failed.
            file.sync_all()
        })
        .and_then(|()| fs::rename(&part, dir.join(bucket)));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn encode(bucket: &str, entries: &[Entry]) -> Vec<u8> {
    let count = u32::try_from(entries.len()).expect("there are few");
    let mut payload = count.to_le_bytes().to_vec();
    for entry in entries {
        let len = u16::try_from(entry.tag.len()).expect("names of tags are short");
        payload.extend_from_slice(&entry.highest.to_le_bytes());
        payload.extend_from_slice(&entry.lowest.to_le_bytes());
        payload.extend_from_slice(&len.to_le_bytes());
        payload.extend_from_slice(entry.tag.as_bytes());
    }
    seal(SEEN, bucket, &payload)
}

fn decode(bucket: &str, bytes: &[u8]) -> std::result::Result<Vec<Entry>, Malformed> {
    let mut fields = Fields(unseal(SEEN, bucket, bytes)?);
    let count = fields.count(18)?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let highest = u64::from_le_bytes(fields.array()?);
        let lowest = u64::from_le_bytes(fields.array()?);
        let len = u16::from_le_bytes(fields.array()?).into();
        let tag = str::from_utf8(fields.take(len)?).ok();
        let tag = tag.filter(|tag| snapstore_store::check_tag(tag).is_ok());
        entries.push(Entry {
            tag: tag.ok_or(Malformed::Wrong("it names no tag"))?.to_owned(),
            highest,
            lowest,
        });
    }
    fields.end()?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_what_is_listed_has_the_room_that_is_left() {
        let mut entries = Vec::new();
        for number in 0..MOST_TAGS + 5 {
            note(&mut entries, format!("listed-{number}"), 1, false);
        }
        assert_eq!(entries.len(), MOST_TAGS);
        note(&mut entries, "used".to_owned(), 3, true);
        note(&mut entries, "listed-0".to_owned(), 2, false);
        note(&mut entries, "used".to_owned(), 2, false);
        assert_eq!(entries.len(), MOST_TAGS);
        let first = &entries[0];
        assert_eq!((first.tag.as_str(), first.lowest), ("used", 3));
        assert_eq!(entries[1].lowest, 2);
        // What is used moves up once it is far down; the last number that there is is not believed.
        note(&mut entries, "listed-9".to_owned(), 1, true);
        assert_eq!(entries[0].tag, "listed-9");
        note(&mut entries, "listed-9".to_owned(), u64::MAX, true);
        assert_eq!((entries[0].highest, entries[0].lowest), (1, 1));
        entries.remove(0);
        let encoded = encode("bucket", &entries);
        assert_eq!(decode("bucket", &encoded), Ok(entries));
        assert!(decode("other", &encoded).is_err());
    }
}
