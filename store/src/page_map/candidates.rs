//! A set of pages, each with a mark: somebody else has it.

/// First pages are added, then the set is settled, then pages are noted and asked for.
#[derive(Default)]
pub(super) struct Candidates {
    /// The beginnings of their ids, sorted.
    keys: Vec<u64>,
    /// A bit for each of them.
    noted: Vec<u64>,
}

impl Candidates {
    pub fn add(&mut self, hash: &[u8; 32]) {
        self.keys.push(key(hash));
    }

    pub fn settle(&mut self) {
        self.keys.sort_unstable();
        self.keys.dedup();
        self.keys.shrink_to_fit();
        self.noted = vec![0; self.keys.len().div_ceil(64)];
    }

    /// Somebody has this page; whether it is in the set does not matter.
    pub fn note(&mut self, hash: &[u8; 32]) {
        if let Ok(at) = self.keys.binary_search(&key(hash)) {
            self.noted[at / 64] |= 1 << (at % 64);
        }
    }

    pub fn is_noted(&self, hash: &[u8; 32]) -> bool {
        let at = self.keys.binary_search(&key(hash));
        at.is_ok_and(|at| self.noted[at / 64] >> (at % 64) & 1 == 1)
    }
}

fn key(hash: &[u8; 32]) -> u64 {
    let (first, _) = hash
        .split_first_chunk()
        .expect("32 bytes have 8 first ones");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_what_was_added_and_seen() {
        let page = |number: u8| [number; 32];
        let mut set = Candidates::default();
        (0..200).for_each(|number| set.add(&page(number)));
        set.add(&page(3));
        set.settle();
        assert_eq!(set.keys.len(), 200);
        for number in [0, 63, 64, 199, 250] {
            set.note(&page(number));
        }
        let noted: Vec<u8> = (0..=255).filter(|it| set.is_noted(&page(*it))).collect();
        assert_eq!(noted, [0, 63, 64, 199]);
    }
}
