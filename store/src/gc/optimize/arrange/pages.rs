//! The pages of a leaf: each as a delta of what it is much like, or standalone.

use std::borrow::Cow;

use super::{Arranged, Arrangement};
use crate::chunks::Place;
use crate::error::{Error, Result};
use crate::format::node::{Child, Node};
use crate::gc::optimize::encode::{Candidate, Job, encode_all};
use crate::gc::optimize::similar::{Features, Known};
use crate::id::{ChunkId, ChunkKey};
use crate::pack::Location;

/// Payload that is encoded at the same time.
const BATCH_BYTES: usize = 2 << 20;
/// Pages of which a delta is tried, besides the base that a page had.
const SIMILAR_TRIED: usize = 2;

/// A page on its way.
struct Page {
    id: ChunkId,
    key: ChunkKey,
    place: Place,
    to: Location,
    features: Option<Features>,
    payload: Vec<u8>,
}

impl Arrangement<'_> {
    /// Writes the pages of a leaf, and puts into it where they are.
    pub(super) fn add_pages(&mut self, leaf: &mut Node) -> Result<()> {
        let present: Vec<(usize, Child)> = leaf.present().collect();
        for batch in present.chunks(self.batch_pages()) {
            let pages = batch.iter();
            self.add_batch(pages.map(|(_, child)| (leaf.child_id(*child), child.hint)))?;
        }
        for (slot, child) in present {
            let at = self.places.find(leaf.child_id(child), child.hint)?.place;
            let arranged = self.arranged.get(&at.slot.entry.key);
            let hint = Some(arranged.map_or(at.location(), |it| it.to));
            leaf.set_child(slot, Some(Child { hint, ..child }));
        }
        Ok(())
    }

    /// Pages that are encoded at the same time.
    pub(super) fn batch_pages(&self) -> usize {
        (BATCH_BYTES / self.chunks().page_size().len()).max(1)
    }

    /// Writes those of these pages that are to move.
    pub(super) fn add_batch(
        &mut self,
        batch: impl Iterator<Item = (ChunkId, Option<Location>)>,
    ) -> Result<()> {
        let mut pages = Vec::new();
        for (id, hint) in batch {
            self.take_page(id, hint, &mut pages)?;
        }
        self.write_pages(&pages)
    }

    /// Reads a page that is to move.
    fn take_page(
        &mut self,
        id: ChunkId,
        hint: Option<Location>,
        pages: &mut Vec<Page>,
    ) -> Result<()> {
        let place = self.places.find(id, hint)?.place;
        let key = place.slot.entry.key;
        let is_taken = self.arranged.contains_key(&key) || pages.iter().any(|it| it.key == key);
        if !self.sources.contains(&place.location().pack) || is_taken {
            return Ok(());
        }
        let mut payload = vec![0; self.chunks().page_size().len()];
        match self.chunks().read_at(&place, id, &mut payload) {
            Err(Error::Damaged(damage)) => {
                // One of a working set is met once more, in its leaf.
                if !self.damaged.contains(&damage) {
                    self.damaged.push(damage);
                }
                return Ok(());
            }
            other => other?,
        };
        let to = self.next_location(pages.len())?;
        pages.push(Page {
            id,
            key,
            place,
            to,
            features: Features::of(&payload),
            payload,
        });
        Ok(())
    }

    fn write_pages(&mut self, pages: &[Page]) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let mut jobs = Vec::with_capacity(pages.len());
        let mut leaders = Vec::new();
        for page in pages {
            let bases = self.bases_of(page, pages)?;
            // Without any base it will be one, to the next page on.
            if let (true, Some(features)) = (bases.is_empty(), &page.features) {
                self.similar.add(features, page.known());
                leaders.push(page.to);
            }
            jobs.push(Job {
                id: page.id,
                key: page.key,
                payload: &page.payload,
                bases,
            });
        }
        let encoded = self.store.in_pool(|| Ok(encode_all(&jobs)))?;
        drop(jobs);
        let (mut chunks, mut bytes) = (Vec::new(), Vec::new());
        for (page, (chunk, stored)) in pages.iter().zip(encoded) {
            let standalone = chunk.encoding.is_standalone();
            if let (true, Some(features)) = (standalone, &page.features)
                && !leaders.contains(&page.to)
            {
                self.similar.add(features, page.known());
            }
            let arranged = Arranged {
                from: page.place.location(),
                to: page.to,
                standalone,
            };
            self.arranged.insert(page.key, arranged);
            bytes.extend_from_slice(&stored);
            chunks.push(chunk);
        }
        self.writer()?.append(&chunks, bytes)?;
        self.progress.advance(self.arranged.len() as u64);
        self.roll_over()
    }

    /// What a delta of the page may be made against.
    fn bases_of<'p>(&self, page: &Page, pages: &'p [Page]) -> Result<Vec<Candidate<'p>>> {
        let mut bases = Vec::new();
        let like = page
            .features
            .as_ref()
            .map(|it| self.similar.like(it, SIMILAR_TRIED));
        for known in like.unwrap_or_default() {
            if let Some(other) = pages.iter().find(|other| other.to == known.to) {
                bases.push(Candidate {
                    base: other.known().base(),
                    payload: Cow::Borrowed(&other.payload),
                });
            } else if let Some(payload) = self.payload_of(known)? {
                bases.push(Candidate {
                    base: known.base(),
                    payload: Cow::Owned(payload),
                });
            }
        }
        if let Some(known) = self.old_base(&page.place)?
            && !bases.iter().any(|it| it.base.id == known.id)
            && let Some(payload) = self.payload_of(known)?
        {
            bases.push(Candidate {
                base: known.base(),
                payload: Cow::Owned(payload),
            });
        }
        Ok(bases)
    }

    /// The base that a chunk has, if another delta may be made against it.
    fn old_base(&self, place: &Place) -> Result<Option<Known>> {
        let Some(base) = place.pack.base(&place.slot)? else {
            return Ok(None);
        };
        let found = match self.places.find(base.id, Some(base.hint)) {
            Err(Error::Damaged(_)) => return Ok(None),
            other => other?.place,
        };
        let (key, from) = (found.slot.entry.key, found.location());
        let to = match self.arranged.get(&key) {
            Some(arranged) if arranged.standalone => arranged.to,
            Some(_) => return Ok(None),
            None if self.sources.contains(&from.pack) => return Ok(None),
            None if found.is_standalone() && self.places.leads_to(key, from)? => from,
            None => return Ok(None),
        };
        let id = base.id;
        Ok(Some(Known { id, from, to }))
    }
}

impl Page {
    fn known(&self) -> Known {
        Known {
            id: self.id,
            from: self.place.location(),
            to: self.to,
        }
    }
}
