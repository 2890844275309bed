//! How often something is logged that a guest or a client can cause as often as it
//! likes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many in a row,
const BURST: u32 = 5;
/// then one in so much time.
const EVERY: Duration = Duration::from_secs(60);

/// Lets through what is to be logged, and counts what is not.
#[derive(Default)]
pub(crate) struct Rate(Mutex<State>);

impl Rate {
    /// As [`Rate::default`], for a static.
    pub const fn new() -> Self {
        Self(Mutex::new(State {
            logged: 0,
            last: None,
            left_out: 0,
        }))
    }
}

#[derive(Default)]
struct State {
    logged: u32,
    last: Option<Instant>,
    left_out: u64,
}

impl Rate {
    /// Calls `log` if it may be, with how many times it might not since the last one.
    pub fn log(&self, log: impl FnOnce(u64)) {
        if let Some(left_out) = self.take(Instant::now()) {
            log(left_out);
        }
    }

    fn take(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = state
            .last
            .is_none_or(|last| now.saturating_duration_since(last) >= EVERY);
        if is_due || state.logged < BURST {
            state.logged = state.logged.saturating_add(1);
            state.last = Some(now);
            return Some(std::mem::take(&mut state.left_out));
        }
        state.left_out += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_count() {
        let rate = Rate::default();
        let begin = Instant::now();
        let through = (0..1000).filter(|_| rate.take(begin).is_some()).count();
        assert_eq!(through, BURST as usize);
        assert_eq!(rate.take(begin + EVERY), Some(995));
        assert_eq!(rate.take(begin + EVERY), None);
        assert_eq!(rate.take(begin + 2 * EVERY), Some(1));
    }
}
