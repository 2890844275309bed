//! A bit for each page of an image, set by any thread.

use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) struct Bits(Vec<AtomicU64>);

impl Bits {
    pub fn new(len: u64) -> Self {
        Self((0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets a bit. False if it was set before, or there is none.
    pub fn set(&self, at: u64) -> bool {
        let bit = 1 << (at % 64);
        let before = self
            .word(at)
            .map(|word| word.fetch_or(bit, Ordering::Relaxed));
        before.is_some_and(|before| before & bit == 0)
    }

    pub fn has(&self, at: u64) -> bool {
        let word = self.word(at).map(|word| word.load(Ordering::Relaxed));
        word.is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// The bits that are set, in their order.
    pub fn all(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.0.iter().map(|word| word.load(Ordering::Relaxed));
        words
            .zip((0..).step_by(64))
            .filter(|(word, _)| *word != 0)
            .flat_map(|(word, first)| {
                let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
                bits.map(move |bit| first + bit)
            })
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(at / 64).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_once() {
        let bits = Bits::new(130);
        for at in [0, 63, 64, 129] {
            assert!(!bits.has(at));
            assert!(bits.set(at));
            assert!(!bits.set(at));
            assert!(bits.has(at));
        }
        assert!(!bits.set(1 << 40));
        assert_eq!(bits.all().collect::<Vec<_>>(), [0, 63, 64, 129]);
    }
}
