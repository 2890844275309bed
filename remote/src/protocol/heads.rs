//! Which packs heads need. They never change, so each is read once.

use std::collections::BTreeMap;

use crate::protocol::record::HeadSummary;
use crate::protocol::{Bucket, Name, Result};

/// The heads that were read.
#[derive(Default)]
pub(crate) struct Heads(BTreeMap<Name, Vec<Name>>);

impl Heads {
    /// The packs that a head needs; `None` if it is not there.
    pub async fn packs<B: Bucket>(&mut self, bucket: &B, head: Name) -> Result<Option<&[Name]>> {
        if !self.0.contains_key(&head) {
            let key = head.head_key();
            let Some(bytes) = bucket.get(&key).await? else {
                return Ok(None);
            };
            let decoded = HeadSummary::decode(&key, &bytes);
            let packs = decoded.map_err(|error| error.of(&key))?.0.packs;
            self.0.insert(head, packs);
        }
        Ok(self.0.get(&head).map(Vec::as_slice))
    }
}
