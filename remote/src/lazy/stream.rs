//! How far a reader who goes through a pack in order is read ahead of. Pure arithmetic, in
//! blocks.

use std::ops::Range;

/// The first window, and the longest: 256 KiB and 4 MiB.
const FIRST: u64 = 4;
const LONGEST: u64 = 64;
/// Readers of one pack that are told apart.
const READERS: usize = 4;

/// One who goes through a pack.
#[derive(Clone, Copy, Debug, Default)]
struct Reader {
    /// The last block that was asked for.
    last: u64,
    window: u64,
    /// Where reading ahead has got to.
    ahead: u64,
    /// When it was last seen.
    at: u64,
}

/// Those who read a pack.
#[derive(Debug, Default)]
pub struct Stream {
    readers: Vec<Reader>,
    clock: u64,
}

impl Stream {
    /// Blocks `first` to `last` were asked for, and had to be waited for, or not. Returns
    /// what to read ahead.
    pub fn touched(&mut self, first: u64, last: u64, missed: bool) -> Option<Range<u64>> {
        self.clock += 1;
        let at = self.clock;
        let follows = |reader: &&mut Reader| {
            first >= reader.last.saturating_sub(1) && first <= reader.last + 1
        };
        let Some(reader) = self.readers.iter_mut().find(follows) else {
            self.begin(last, at);
            return None;
        };
        reader.at = at;
        if last <= reader.last {
            return None;
        }
        reader.last = last;
        if reader.window == 0 && !missed {
            return None;
        }
        let start = reader.ahead.max(last + 1);
        if start - (last + 1) > reader.window / 2 {
            return None;
        }
        reader.window = (reader.window * 2).clamp(FIRST, LONGEST);
        reader.ahead = (last + 1 + reader.window).max(start);
        (start < reader.ahead).then_some(start..reader.ahead)
    }

    fn begin(&mut self, last: u64, at: u64) {
        let reader = Reader {
            last,
            window: 0,
            ahead: 0,
            at,
        };
        if self.readers.len() < READERS {
            self.readers.push(reader);
        } else if let Some(oldest) = self.readers.iter_mut().min_by_key(|reader| reader.at) {
            *oldest = reader;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_through_in_order_is_read_ahead_of_in_growing_windows() {
        let mut stream = Stream::default();
        let mut ahead = 0;
        let mut windows = Vec::new();
        for block in 0..400 {
            let missed = block >= ahead;
            if let Some(range) = stream.touched(block, block, missed) {
                assert!(range.start >= ahead && range.start > block, "{range:?}");
                windows.push(range.end - block - 1);
                ahead = range.end;
            }
        }
        assert_eq!(windows[..5], [4, 8, 16, 32, 64]);
        assert!(windows[5..].iter().all(|window| *window == LONGEST));
        assert!(ahead >= 400, "it was waited for more than at first");
    }

    #[test]
    fn who_jumps_about_is_not() {
        let mut stream = Stream::default();
        for block in [5, 900, 40, 700, 3, 200, 60, 500] {
            assert_eq!(stream.touched(block, block, true), None);
        }
    }

    #[test]
    fn two_who_go_through_beside_each_other_are_told_apart() {
        let mut stream = Stream::default();
        let mut found = 0;
        for step in 0..20 {
            for start in [0, 1000] {
                let block = start + step;
                if let Some(range) = stream.touched(block, block, true) {
                    assert!(range.start > block && range.end <= block + 1 + LONGEST);
                    found += 1;
                }
            }
        }
        assert!(found >= 4);
    }

    #[test]
    fn who_has_all_at_hand_is_left_alone() {
        let mut stream = Stream::default();
        for block in 0..100 {
            assert_eq!(stream.touched(block, block, false), None);
        }
    }
}
