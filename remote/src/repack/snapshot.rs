//! The snapshots that a repack moves, and their heads.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::{Result, of_bucket};
use crate::head::{Head, LeafPlace};
use crate::opened::Opened;
use crate::protocol::{self, Listing, Name, RefKey};
use crate::remote::{Remote, block_on};
use crate::repack::usage::Use;

/// A snapshot of a record that counts. Its head may be large, and there may be many, so it is
/// read once more each time where those of others are kept already.
pub struct Snapshot {
    pub record: RefKey,
    pub id: [u8; 32],
    /// All packs that its head needs.
    pub packs: Vec<Name>,
    /// Packs that were copied, and their copies.
    pub moved: BTreeMap<Name, Name>,
    pub head_bytes: u64,
    kept: Option<Rc<Head>>,
}

impl Snapshot {
    pub fn of(record: RefKey, opened: Opened, keeps: bool) -> Self {
        Self {
            record,
            id: opened.snapshot,
            packs: opened.packs,
            moved: opened.moved,
            head_bytes: opened.len_bytes,
            kept: keeps.then(|| Rc::new(opened.head)),
        }
    }

    /// Its head, unless its tag was changed since and that was collected.
    pub fn head(&self, remote: &Remote) -> protocol::Result<Option<Rc<Head>>> {
        if let Some(kept) = &self.kept {
            return Ok(Some(kept.clone()));
        }
        match remote.open_head_of(self.record.head, &self.record.key()) {
            Ok(opened) => Ok(Some(Rc::new(opened.head))),
            Err(error) => {
                let error = of_bucket(error);
                match is_overtaken(remote, &self.record, &error).map_err(of_bucket)? {
                    true => Ok(None),
                    false => Err(error),
                }
            }
        }
    }

    /// Whether it needs something in any of these packs.
    pub fn touches(&self, packs: &BTreeMap<Name, Use>) -> bool {
        self.packs.iter().any(|pack| packs.contains_key(pack))
    }
}

/// The leaves of a head that have something in any of these packs.
pub fn leaves_in<'a>(
    head: &'a Head,
    packs: &'a BTreeMap<Name, Use>,
) -> impl Iterator<Item = (&'a [u8; 32], &'a LeafPlace)> {
    let is_in = |leaf: &LeafPlace| {
        packs.contains_key(&leaf.pack) || leaf.packs.iter().any(|it| packs.contains_key(it))
    };
    head.leaves.iter().filter(move |(_, leaf)| is_in(leaf))
}

/// The pack with its working set, if records in it have to be written anew: then all of it
/// is, so that it is still read from one end to the other.
pub fn moves_first(head: &Head, packs: &BTreeMap<Name, Use>) -> Option<Name> {
    let first = head.first.as_ref()?.pack;
    let mut leaves = leaves_in(head, packs);
    leaves.any(|(_, leaf)| leaf.pack == first).then_some(first)
}

/// Whether a record is the one that counts of its tag.
pub fn counts(remote: &Remote, record: &RefKey) -> Result<bool> {
    let listing = block_on(Listing::of_tag(remote, &record.tag))?;
    Ok(listing.judge(&record.tag).winner.as_ref() == Some(record))
}

/// Whether what a record needs is gone since its tag was changed meanwhile, which is no damage.
pub fn is_overtaken(remote: &Remote, record: &RefKey, error: &protocol::Error) -> Result<bool> {
    Ok(matches!(error, protocol::Error::Missing { .. }) && !counts(remote, record)?)
}
