//! Reading many pages at once.
//!
//! Each is decoded from the place where a reader looks first, all are hashed side by side, and
//! what lies next to each other is read together. A page for which that does not give the right
//! bytes is read by the rule, as one page is.

use std::sync::Arc;

use super::Chunks;
use super::rule::Place;
use crate::error::Result;
use crate::format::node::Child;
use crate::id::{ChunkId, ChunkKind};
use crate::page_hashes::{SIDE_BY_SIDE, page_hashes};
use crate::scratch::Scratch;

impl Chunks {
    /// Reads pages, each into its own `out`, which has the page's length.
    ///
    /// # Errors
    /// As [`Chunks::read`], of the first page that cannot be read.
    pub fn pages(&self, wanted: &mut [(Child, &mut [u8])]) -> Result<()> {
        if let [(child, out)] = wanted {
            return self.page(*child, out);
        }
        for some in wanted.chunks_mut(SIDE_BY_SIDE) {
            let decoded = self.decode_first(some);
            let pages: Vec<&[u8]> = some.iter().map(|(_, out)| &**out).collect();
            let hashes = page_hashes(&pages);
            for (((child, out), decoded), hash) in some.iter_mut().zip(decoded).zip(hashes) {
                match decoded {
                    Some(place) if hash == child.hash => {
                        self.remember(page_id(*child), child.hint, place.location());
                    }
                    _ => self.page(*child, out)?,
                }
            }
        }
        Ok(())
    }

    /// Decodes pages from the places where a reader looks first, unchecked. Returns these
    /// places where that was done.
    fn decode_first(&self, wanted: &mut [(Child, &mut [u8])]) -> Vec<Option<Place>> {
        let first = |child: &Child| self.places(page_id(*child), child.hint).next()?.ok();
        let mut places: Vec<Option<Place>> = wanted.iter().map(|(child, _)| first(child)).collect();
        let mut stored = Scratch::take();
        let mut done = 0;
        while done < places.len() {
            let run = done..done + run_len(&places[done..]);
            if !read_run(&places[run.clone()], &mut stored) {
                stored.clear();
            }
            let mut rest = &stored[..];
            for at in run.clone() {
                places[at] = places[at].take().filter(|place| {
                    let len = usize::try_from(place.slot.stored_len()).unwrap_or(usize::MAX);
                    let Some((bytes, after)) = rest.split_at_checked(len) else {
                        return false;
                    };
                    rest = after;
                    self.decode_unchecked(place, bytes, wanted[at].1).is_ok()
                });
            }
            done = run.end;
        }
        places
    }
}

fn page_id(child: Child) -> ChunkId {
    ChunkId::from_hash(ChunkKind::Page, child.hash)
}

/// Reads what is stored at places that lie next to each other. False if that cannot be done.
fn read_run(places: &[Option<Place>], stored: &mut Vec<u8>) -> bool {
    let (Some(Some(first)), Some(Some(last))) = (places.first(), places.last()) else {
        return false;
    };
    let read = first.pack.read_run(&first.slot, &last.slot, stored);
    read.is_ok()
}

/// How many of the first places lie next to each other: at least one.
fn run_len(places: &[Option<Place>]) -> usize {
    let follows = |pair: &[Option<Place>]| {
        matches!(pair, [Some(before), Some(after)]
            if Arc::ptr_eq(&before.pack, &after.pack)
                && before.slot.end == u64::from(after.slot.entry.offset))
    };
    1 + places.windows(2).take_while(|pair| follows(pair)).count()
}
