//! Which packs heads need. They never change, so each is read once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::protocol::record::HeadSummary;
use crate::protocol::{Bucket, Name, Result};

/// The heads that were read.
#[derive(Default)]
pub(crate) struct Heads(BTreeMap<Name, Vec<Name>>);

impl Heads {
    /// The packs that a head needs; `None` if it is not there.
    pub async fn packs<B: Bucket>(&mut self, bucket: &B, head: Name) -> Result<Option<&[Name]>> {
        let packs = match self.0.entry(head) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => {
                let key = head.head_key();
                let Some(bytes) = bucket.get(&key).await? else {
                    return Ok(None);
                };
                let decoded = HeadSummary::decode(&key, &bytes);
                vacant.insert(decoded.map_err(|error| error.of(&key))?.0.packs)
            }
        };
        Ok(Some(packs))
    }
}
