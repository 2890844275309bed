//! A run of hooks: its bytes, and which pages are hooks.
//!
//! ```text
//! run: SNAPHOOK
//!   4 count of packs, then each:  20 name   4 where its list of pages begins   4 how long it is
//!   4 count of hooks, sorted, each once:  8 first bytes of a page's id   4 number of its pack
//! ```
//! Numbers are little-endian.

use crate::pack::{LONGEST_LIST_BYTES, Pack};
use crate::protocol::sealed::Fields;
use crate::protocol::{Malformed, Name, seal, unseal};

const HOOKS: [u8; 8] = *b"SNAPHOOK";
/// Hooks in one run.
const MOST_HOOKS: usize = 1 << 20;
/// Packs in one run.
const MOST_PACKS: usize = 1 << 16;
/// The longest run that there is.
pub const LONGEST_RUN_BYTES: u64 = 16 << 20;
const PACK_LEN: usize = Name::LEN + 8;
const HOOK_LEN: usize = 12;
/// One page in so many is a hook.
pub(super) const ONE_IN: u64 = 128;

/// The first bytes of a page's id.
pub(super) type Prefix = [u8; 8];

/// The first bytes of a page's id, if it is a hook. Which ids are is the same for all hosts.
pub(super) fn hook(id: &[u8; 32]) -> Option<Prefix> {
    let is_one = u64::from(id[31]).is_multiple_of(ONE_IN);
    is_one.then(|| *id.first_chunk().expect("it is longer"))
}

/// A pack, and where its list of pages is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Listed {
    pub name: Name,
    /// Where its list of pages begins.
    pub at: u32,
    /// How long that is.
    pub len: u32,
}

/// Hooks, and their packs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Run {
    pub(super) packs: Vec<Listed>,
    /// Sorted, once it was encoded or decoded.
    pub(super) hooks: Vec<(Prefix, u32)>,
}

impl Run {
    /// Adds a pack that was uploaded.
    pub fn add(&mut self, pack: &Pack) {
        let hooks = pack.ids.iter().filter_map(hook);
        let listed = Listed {
            name: pack.name,
            at: pack.list_at,
            len: pack.list_len,
        };
        self.add_hooks(listed, hooks);
    }

    pub(super) fn add_hooks(&mut self, pack: Listed, hooks: impl Iterator<Item = Prefix>) {
        let number = u32::try_from(self.packs.len()).expect("a run is written once it is full");
        let before = self.hooks.len();
        self.hooks.extend(hooks.map(|hook| (hook, number)));
        if self.hooks.len() > before {
            self.packs.push(pack);
        }
    }

    /// Whether it is to be written.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.hooks.len() >= MOST_HOOKS || self.packs.len() >= MOST_PACKS
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(mut self, key: &str) -> Vec<u8> {
        self.hooks.sort_unstable();
        self.hooks.dedup();
        let len = 8 + self.packs.len() * PACK_LEN + self.hooks.len() * HOOK_LEN;
        let mut payload = Vec::with_capacity(len);
        let count = |len: usize| u32::try_from(len).expect("a run is bounded").to_le_bytes();
        payload.extend_from_slice(&count(self.packs.len()));
        for pack in &self.packs {
            payload.extend_from_slice(&pack.name.to_bytes());
            payload.extend_from_slice(&pack.at.to_le_bytes());
            payload.extend_from_slice(&pack.len.to_le_bytes());
        }
        payload.extend_from_slice(&count(self.hooks.len()));
        for (prefix, number) in &self.hooks {
            payload.extend_from_slice(prefix);
            payload.extend_from_slice(&number.to_le_bytes());
        }
        seal(HOOKS, key, &payload)
    }

    /// # Errors
    /// If it is damaged or newer.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(unseal(HOOKS, key, bytes)?);
        let mut run = Self::default();
        for _ in 0..fields.count(PACK_LEN)? {
            run.packs.push(Listed {
                name: Name::from_bytes(&fields.array()?),
                at: fields.u32()?,
                len: fields.u32()?,
            });
        }
        let count = fields.count(HOOK_LEN)?;
        run.hooks.reserve_exact(count);
        for _ in 0..count {
            let hook = (fields.array()?, fields.u32()?);
            if hook.1 as usize >= run.packs.len() {
                return Err(Malformed::Wrong(
                    "a hook names a pack that it does not list",
                ));
            }
            if run.hooks.last().is_some_and(|last| *last >= hook) {
                return Err(Malformed::Wrong("its hooks are not in order"));
            }
            run.hooks.push(hook);
        }
        fields.end()?;
        if run.packs.iter().any(|pack| pack.len > LONGEST_LIST_BYTES) {
            return Err(Malformed::Wrong("it names a list that is longer than any"));
        }
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Session;

    fn listed(number: u32) -> Listed {
        let session = Session(u128::from(number) << 70);
        Listed {
            name: Name { session, number },
            at: number * 3,
            len: number,
        }
    }

    #[test]
    fn a_run_survives_the_round_trip_and_what_nobody_wrote_is_refused() {
        let mut run = Run::default();
        run.add_hooks(listed(1), [[9; 8], [3; 8]].into_iter());
        // One without hooks is of no use.
        run.add_hooks(listed(2), std::iter::empty());
        run.add_hooks(listed(3), [[3; 8], [1; 8]].into_iter());
        let bytes = run.encode("hooks/a");
        let run = Run::decode("hooks/a", &bytes).expect("it is one");
        assert_eq!(run.packs, [listed(1), listed(3)]);
        let hooks = [([1; 8], 1), ([3; 8], 0), ([3; 8], 1), ([9; 8], 0)];
        assert_eq!(run.hooks, hooks);
        assert!(Run::decode("hooks/b", &bytes).is_err());
        for len in 0..bytes.len() {
            assert!(Run::decode("hooks/a", &bytes[..len]).is_err());
        }
        let of = |packs: &[u32], hooks: &[(u8, u32)]| {
            let mut payload = u32::try_from(packs.len())
                .unwrap_or(9)
                .to_le_bytes()
                .to_vec();
            for len in packs {
                payload.extend_from_slice(&[0; Name::LEN + 4]);
                payload.extend_from_slice(&len.to_le_bytes());
            }
            payload.extend_from_slice(&u32::try_from(hooks.len()).unwrap_or(9).to_le_bytes());
            for (prefix, number) in hooks {
                payload.extend_from_slice(&[*prefix; 8]);
                payload.extend_from_slice(&number.to_le_bytes());
            }
            Run::decode("hooks/a", &seal(HOOKS, "hooks/a", &payload))
        };
        assert!(of(&[7], &[(1, 0), (2, 0)]).is_ok());
        assert!(of(&[7], &[(2, 0), (1, 0)]).is_err(), "not in order");
        assert!(of(&[7], &[(1, 0), (1, 0)]).is_err(), "twice");
        assert!(of(&[7], &[(1, 1)]).is_err(), "a pack that is not listed");
        assert!(
            of(&[LONGEST_LIST_BYTES + 1], &[(1, 0)]).is_err(),
            "a long list"
        );
    }
}
