//! Choosing: every way, or a seeded one.

use std::collections::HashSet;

use super::world::Chooser;

/// Every way, one history after the other. A state that was seen before is not gone
/// into again.
#[derive(Default)]
pub struct Every {
    trail: Vec<(usize, usize)>,
    at: usize,
    seen: HashSet<u64>,
    depth: usize,
    steps: usize,
    pub histories: u64,
}

impl Every {
    pub fn to_depth(depth: usize) -> Self {
        Self {
            depth,
            ..Self::default()
        }
    }

    pub fn states(&self) -> usize {
        self.seen.len()
    }

    /// Whether there is another history.
    pub fn next(&mut self) -> bool {
        self.histories += 1;
        self.at = 0;
        self.steps = 0;
        while let Some((chosen, of)) = self.trail.pop() {
            if chosen + 1 < of {
                self.trail.push((chosen + 1, of));
                return true;
            }
        }
        false
    }

    fn pick(&mut self, of: usize) -> usize {
        if of <= 1 {
            return 0;
        }
        if let Some((chosen, _)) = self.trail.get(self.at) {
            self.at += 1;
            return *chosen;
        }
        if self.steps > self.depth {
            return 0;
        }
        self.at += 1;
        self.trail.push((0, of));
        0
    }
}

impl Chooser for Every {
    fn choose(&mut self, of: usize, _: u32) -> usize {
        self.pick(of)
    }

    fn turn(&mut self, of: usize, _: Option<usize>) -> usize {
        self.pick(of)
    }

    fn pages(&self) -> bool {
        false
    }

    fn goes_on(&mut self, state: u64) -> bool {
        self.steps += 1;
        // Only what is new is compared: the way there was gone before.
        self.at < self.trail.len() || self.steps > self.depth || self.seen.insert(state)
    }
}

/// Drawn from a seed.
pub struct Drawn {
    pub rng: fastrand::Rng,
    asleep: Option<(usize, u32)>,
    pages: bool,
}

impl Drawn {
    pub fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let pages = rng.bool();
        Self {
            rng,
            asleep: None,
            pages,
        }
    }
}

impl Chooser for Drawn {
    fn choose(&mut self, of: usize, weight: u32) -> usize {
        if of > 1 && self.rng.u32(..1000) < weight {
            return self.rng.usize(1..of);
        }
        0
    }

    fn turn(&mut self, of: usize, last: Option<usize>) -> usize {
        if let (Some(last), true) = (last, self.rng.u32(..10) < 7) {
            return last;
        }
        if self.rng.u32(..100) < 6 {
            self.asleep = Some((self.rng.usize(..of), self.rng.u32(5..80)));
        }
        let turn = self.rng.usize(..of);
        match &mut self.asleep {
            Some((sleeper, left)) if *sleeper == turn && *left > 0 => {
                *left -= 1;
                (turn + 1) % of
            }
            _ => turn,
        }
    }

    fn pages(&self) -> bool {
        self.pages
    }

    fn goes_on(&mut self, _: u64) -> bool {
        true
    }
}
