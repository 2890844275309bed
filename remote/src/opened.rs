//! A tag's record and the head that it names, read and checked.

use std::collections::BTreeMap;

use snapstore_store::snapshot_of_manifest;

use crate::error::Result;
use crate::head::Head;
use crate::protocol::{self, HeadSummary, Malformed, Name, RefKey, RefRecord, View};
use crate::remote::Remote;

const OTHER_SNAPSHOT: &str = "it is of another snapshot than its tag";

/// A head that was read.
pub(crate) struct Opened {
    /// The head's key.
    pub key: String,
    /// The snapshot's id.
    pub snapshot: [u8; 32],
    pub head: Head,
    /// All packs that it needs.
    pub packs: Vec<Name>,
    /// Packs that were copied, and their copies.
    pub moved: BTreeMap<Name, Name>,
    pub len_bytes: u64,
}

impl Remote {
    /// The head of a view, which may have been read already.
    pub(crate) fn open_view(&self, view: &View) -> Result<Opened> {
        let read = view.read.as_ref();
        let read = read.and_then(|read| Some((read.record.as_ref()?, read.head.as_ref()?)));
        let Some((body, head)) = read else {
            return self.open_head(&view.record);
        };
        opened(&view.record, body, || open(view.record.head, head))
    }

    /// Reads the head of a record that is viewed. The record may be gone: the tag was changed
    /// since the view began, and that was collected. The head stays, and which one it is stands
    /// in the record's name.
    pub(crate) fn open_head(&self, record: &RefKey) -> Result<Opened> {
        let ref_key = record.key();
        match self.bucket.get(&ref_key, None)? {
            Some(body) => opened(record, &body, || self.open_head_of(record.head, &ref_key)),
            None => self.open_head_of(record.head, &ref_key),
        }
    }

    /// Reads a head that somebody views.
    pub(crate) fn open_head_of(&self, name: Name, needed_by: &str) -> Result<Opened> {
        open(name, &self.needed(&name.head_key(), needed_by)?)
    }

    fn needed(&self, key: &str, needed_by: &str) -> Result<Vec<u8>> {
        let bytes = self.bucket.get(key, None)?;
        Ok(bytes.ok_or_else(|| protocol::Error::Missing {
            key: key.to_owned(),
            needed_by: needed_by.to_owned(),
        })?)
    }
}

/// A head, if it is of the snapshot that its record is of.
fn opened(record: &RefKey, body: &[u8], open: impl FnOnce() -> Result<Opened>) -> Result<Opened> {
    let ref_key = record.key();
    let body = RefRecord::decode(&ref_key, body).map_err(|error| error.of(&ref_key))?;
    let opened = open()?;
    match opened.snapshot == body.snapshot {
        true => Ok(opened),
        false => Err(Malformed::Wrong(OTHER_SNAPSHOT).of(&opened.key).into()),
    }
}

/// A head's bytes.
fn open(name: Name, bytes: &[u8]) -> Result<Opened> {
    let key = name.head_key();
    let wrong = |error: Malformed| error.of(&key);
    let (summary, rest) = HeadSummary::decode(&key, bytes).map_err(wrong)?;
    let head = Head::decode(summary.version, rest, &summary.packs).map_err(wrong)?;
    if snapshot_of_manifest(&head.manifest) != summary.snapshot {
        return Err(wrong(Malformed::Wrong(OTHER_SNAPSHOT)).into());
    }
    Ok(Opened {
        key,
        snapshot: summary.snapshot,
        head,
        packs: summary.packs,
        moved: summary.moved.into_iter().collect(),
        len_bytes: bytes.len() as u64,
    })
}
