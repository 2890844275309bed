//! Whether packs of a bucket are as they were written: what a push that mends relies on.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::error::Result;
use crate::pack::{PACK_CHECK_LEN, PACK_HEAD_LEN, pack_check};
use crate::protocol::Name;
use crate::remote::Remote;

/// Packs that are copies, and what each may be a copy of.
#[derive(Default)]
pub(crate) struct Origins(BTreeMap<Name, BTreeSet<Name>>);

impl Origins {
    /// Adds what a head says of packs that were copied.
    pub fn learn(&mut self, moved: impl IntoIterator<Item = (Name, Name)>) {
        for (origin, copy) in moved {
            self.0.entry(copy).or_default().insert(origin);
        }
    }

    /// What is wrong with a pack's bytes. A copy has the check of what it is a copy of.
    fn wrong(&self, name: Name, bytes: &[u8]) -> Option<&'static str> {
        let body = bytes.len().checked_sub(PACK_CHECK_LEN);
        let Some(body) = body.filter(|len| *len >= PACK_HEAD_LEN) else {
            return Some("it is too short");
        };
        let (body, check) = bytes.split_at(body);
        if pack_check(name, body) == check {
            return None;
        }
        // A copy may be one of a copy.
        let mut may_be = BTreeSet::new();
        let mut left = vec![name];
        while let Some(copy) = left.pop() {
            for origin in self.0.get(&copy).into_iter().flatten() {
                if may_be.insert(*origin) {
                    left.push(*origin);
                }
            }
        }
        let is_copy = may_be
            .iter()
            .any(|origin| pack_check(*origin, body) == check);
        (!is_copy).then_some("its bytes do not match their checksum")
    }
}

/// The packs that were read whole.
#[derive(Default)]
pub(crate) struct Intact {
    pub origins: Origins,
    known: HashMap<Name, bool>,
}

impl Intact {
    /// Whether a pack is there and as it was written.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub fn is_whole(&mut self, remote: &Remote, pack: Name) -> Result<bool> {
        if let Some(known) = self.known.get(&pack) {
            return Ok(*known);
        }
        let whole = remote.pack_problem(pack, &self.origins)?.1.is_none();
        self.known.insert(pack, whole);
        Ok(whole)
    }
}

impl Remote {
    /// Reads a pack whole: how many bytes were read, and what is wrong with it.
    pub(crate) fn pack_problem(
        &self,
        pack: Name,
        origins: &Origins,
    ) -> Result<(u64, Option<String>)> {
        Ok(match self.object(&pack.pack_key())? {
            Err(error) => (0, Some(error.to_string())),
            Ok(None) => (0, Some("it is missing".to_owned())),
            Ok(Some(bytes)) => {
                let problem = origins.wrong(pack, &bytes).map(str::to_owned);
                (bytes.len() as u64, problem)
            }
        })
    }
}
