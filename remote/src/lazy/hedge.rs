//! When a read that somebody waits for is asked a second time: once it is later than nearly all
//! before it, and within a budget, so that a server that is slow as a whole is not asked for
//! more.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Answers that are remembered, and how many say what is late.
const REMEMBERED: usize = 128;
const FEWEST: usize = 20;
/// One in so many requests may be asked again: 5 %.
const ONE_IN: u32 = 20;
/// Second requests that are saved up for when they are needed.
const MOST_SAVED: u32 = 8;
/// What comes sooner is worth no second request.
const SHORTEST: Duration = Duration::from_millis(5);

/// What is known of the answers so far.
#[derive(Debug, Default)]
pub struct Hedging(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// How long the last ones took.
    took: VecDeque<Duration>,
    /// Requests for each of which a part of a second one may be made.
    saved: u32,
}

impl Hedging {
    /// An answer came after so long.
    pub fn answered(&self, took: Duration) {
        let mut state = self.state();
        state.took.push_back(took);
        if state.took.len() > REMEMBERED {
            state.took.pop_front();
        }
        state.saved = (state.saved + 1).min(MOST_SAVED * ONE_IN);
    }

    /// After how long an answer is late: three times as long as the middle one of the last
    /// took, and longer than 99 % of them. `None` as long as that is not known.
    pub fn late_after(&self) -> Option<Duration> {
        let mut took: Vec<Duration> = self.state().took.iter().copied().collect();
        if took.len() < FEWEST {
            return None;
        }
        took.sort_unstable();
        let at = |percent: usize| took[(took.len() * percent).div_ceil(100) - 1];
        Some((at(50) * 3).max(at(99)).max(SHORTEST))
    }

    /// Whether there may be a second request now. Then it is taken for made.
    pub fn may(&self) -> bool {
        let mut state = self.state();
        match state.saved.checked_sub(ONE_IN) {
            Some(left) => {
                state.saved = left;
                true
            }
            None => false,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    #[test]
    fn what_is_late_is_known_after_some_answers() {
        let hedging = Hedging::default();
        for _ in 0..FEWEST - 1 {
            hedging.answered(ms(10));
        }
        assert_eq!(hedging.late_after(), None);
        hedging.answered(ms(10));
        assert_eq!(hedging.late_after(), Some(ms(30)));
        // One in a hundred may be late, and two tell that it is the line.
        for _ in 0..REMEMBERED {
            hedging.answered(ms(10));
        }
        hedging.answered(ms(500));
        assert_eq!(hedging.late_after(), Some(ms(30)));
        hedging.answered(ms(400));
        assert_eq!(hedging.late_after(), Some(ms(400)));
        // What was long ago is forgotten.
        for _ in 0..REMEMBERED {
            hedging.answered(Duration::ZERO);
        }
        assert_eq!(hedging.late_after(), Some(SHORTEST));
    }

    #[test]
    fn one_in_twenty_is_asked_again_and_few_at_once() {
        let hedging = Hedging::default();
        let mut made = 0;
        for _ in 0..1000 {
            made += u32::from(hedging.may());
            hedging.answered(ms(10));
        }
        assert!((49..=50).contains(&made), "{made}");
        for _ in 0..100_000 {
            hedging.answered(ms(10));
        }
        let at_once = (0..1000).filter(|_| hedging.may()).count();
        assert_eq!(at_once, MOST_SAVED as usize);
    }
}
