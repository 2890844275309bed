//! Pages of a leaf that were compressed before they have places.

use crate::commit::chunk_writer::EncodedRun;

/// Pages that were compressed, with the slot of each, in order.
#[derive(Default)]
pub(super) struct EncodedPages {
    pub slots: Vec<usize>,
    pub run: EncodedRun,
}

impl EncodedPages {
    /// Adds what comes after these.
    pub fn add(&mut self, other: Self) {
        self.slots.extend(other.slots);
        self.run.chunks.extend(other.run.chunks);
        match self.run.bytes.is_empty() {
            true => self.run.bytes = other.run.bytes,
            false => self.run.bytes.extend_from_slice(&other.run.bytes),
        }
    }

    /// Those of some of its slots, which are in order.
    pub fn only(self, slots: &[usize]) -> EncodedRun {
        if self.slots == slots {
            return self.run;
        }
        let mut kept = EncodedRun::default();
        let mut start = 0;
        for (slot, chunk) in self.slots.into_iter().zip(self.run.chunks) {
            let end = start + chunk.len;
            if slots.binary_search(&slot).is_ok() {
                kept.bytes.extend_from_slice(&self.run.bytes[start..end]);
                kept.chunks.push(chunk);
            }
            start = end;
        }
        kept
    }
}
