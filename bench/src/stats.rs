//! Runs in turns, and what is said of their figures.

/// The figures of one subject, one per round.
#[derive(Clone, Debug)]
pub struct Samples(Vec<f64>);

/// Smallest, middle and largest of some figures.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Samples {
    /// These figures, of which there is at least one.
    #[must_use]
    pub fn new(figures: Vec<f64>) -> Self {
        assert!(!figures.is_empty(), "a figure was measured");
        Self(figures)
    }

    /// A figure that needs no repetition, such as a size.
    #[must_use]
    pub fn one(figure: f64) -> Self {
        Self(vec![figure])
    }

    /// The same figure in every one of `rounds` rounds.
    #[must_use]
    pub fn constant(figure: f64, rounds: usize) -> Self {
        Self::new(vec![figure; rounds])
    }

    /// What is left of each round's figure without the other's.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect())
    }

    /// What range the figures cover.
    #[must_use]
    pub fn spread(&self) -> Spread {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        Spread {
            min: sorted[0],
            median: percentile(&sorted, 50),
            max: sorted[sorted.len() - 1],
        }
    }

    /// The ratios to a baseline, round by round: what disturbs both of a round
    /// does not show.
    #[must_use]
    pub fn over(&self, baseline: &Self) -> Self {
        Self(self.0.iter().zip(&baseline.0).map(|(a, b)| a / b).collect())
    }
}

/// The figure that `percent` of the sorted figures do not exceed.
#[must_use]
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let last = sorted.len() - 1;
    if percent == 50 && sorted.len().is_multiple_of(2) {
        return f64::midpoint(sorted[last / 2], sorted[last / 2 + 1]);
    }
    sorted[(sorted.len() * percent / 100).min(last)]
}

/// Something to measure: given the number of the round, returns its figures,
/// always equally many.
pub type Run<'a> = Box<dyn FnMut(usize) -> anyhow::Result<Vec<f64>> + 'a>;

/// Lets each take its turn, `rounds` times over. Returns the samples by subject,
/// then by figure.
///
/// # Errors
/// The first run's that fails.
pub fn alternate(rounds: usize, mut subjects: Vec<Run<'_>>) -> anyhow::Result<Vec<Vec<Samples>>> {
    let mut figures: Vec<Vec<Vec<f64>>> = vec![Vec::new(); subjects.len()];
    for round in 0..rounds {
        for (subject, figures) in subjects.iter_mut().zip(&mut figures) {
            for (number, figure) in subject(round)?.into_iter().enumerate() {
                if figures.len() <= number {
                    figures.push(Vec::new());
                }
                figures[number].push(figure);
            }
        }
    }
    Ok(figures
        .into_iter()
        .map(|subject| subject.into_iter().map(Samples::new).collect())
        .collect())
}

/// As [`alternate`], but each round begins with the next subject: for subjects
/// that leave the machine busy for the one after them.
///
/// # Errors
/// The first run's that fails.
pub fn take_turns(rounds: usize, mut subjects: Vec<Run<'_>>) -> anyhow::Result<Vec<Vec<Samples>>> {
    let count = subjects.len();
    let mut figures: Vec<Vec<Vec<f64>>> = vec![Vec::new(); count];
    for round in 0..rounds {
        for turn in 0..count {
            let number = (turn + round) % count;
            figures[number].push(subjects[number](round)?);
        }
    }
    let column = |rounds: &[Vec<f64>], number: usize| {
        Samples::new(rounds.iter().map(|figures| figures[number]).collect())
    };
    Ok(figures
        .iter()
        .map(|rounds| (0..rounds[0].len()).map(|n| column(rounds, n)).collect())
        .collect())
}

/// Repeatable random numbers (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence that depends on the seed only.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995)
    }

    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let wide = u128::from(self.word()) * limit as u128;
        usize::try_from(wide >> 64).expect("it is below a usize")
    }

    /// `count` of the items, each at most once, in random order.
    pub fn choose<T: Copy>(&mut self, items: &[T], count: usize) -> Vec<T> {
        let mut pool = items.to_vec();
        let count = count.min(pool.len());
        for at in 0..count {
            let other = at + self.below(pool.len() - at);
            pool.swap(at, other);
        }
        pool.truncate(count);
        pool
    }
}
