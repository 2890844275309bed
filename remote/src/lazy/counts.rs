//! What was asked of a bucket, by why.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Why something is asked for, the most urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Cause {
    /// Somebody waits for it.
    Demand,
    /// Those who restored the snapshot before touched it first.
    WorkingSet,
    /// It follows what somebody reads in order.
    Ahead,
    /// Some day somebody may need it.
    Fill,
}

impl Cause {
    pub const ALL: [Self; 4] = [Self::Demand, Self::WorkingSet, Self::Ahead, Self::Fill];

    /// As programs are told.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::WorkingSet => "working_set",
            Self::Ahead => "ahead",
            Self::Fill => "fill",
        }
    }
}

/// Requests for one cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Requested {
    /// How many there were.
    pub requests: u64,
    /// Of these, those that failed.
    pub failed: u64,
    /// Bytes that came.
    pub bytes: u64,
}

/// What was read so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct LazyCounts {
    /// What somebody waited for.
    pub demand: Requested,
    /// What those who restored the snapshot before touched first.
    pub working_set: Requested,
    /// What follows what somebody reads in order.
    pub ahead: Requested,
    /// All the rest, when there is nothing else to do.
    pub fill: Requested,
    /// Of what somebody waited for, what was late and was asked for a second time, beside these
    /// requests, and how often that was answered first.
    pub hedges: u64,
    /// See there.
    pub hedges_won: u64,
    /// Parts that were not what they should have been, and were read anew.
    pub thrown_away: u64,
}

impl LazyCounts {
    /// Bytes that came from the bucket.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.sum(|one| one.bytes)
    }

    /// Requests that failed.
    #[must_use]
    pub fn failed_requests(&self) -> u64 {
        self.sum(|one| one.failed)
    }

    fn sum(&self, of: impl Fn(&Requested) -> u64) -> u64 {
        let all = [&self.demand, &self.working_set, &self.ahead, &self.fill];
        all.into_iter().map(of).sum()
    }
}

/// The same while it is counted.
#[derive(Debug, Default)]
pub struct Counts {
    by: [Counting; 4],
    hedges: AtomicU64,
    hedges_won: AtomicU64,
    thrown_away: AtomicU64,
}

#[derive(Debug, Default)]
struct Counting {
    requests: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    /// A request leaves.
    pub fn asked(&self, cause: Cause) {
        add(&self.by[cause as usize].requests, 1);
    }

    /// It brought so many bytes, or failed.
    pub fn answered(&self, cause: Cause, bytes: Option<usize>) {
        let counting = &self.by[cause as usize];
        match bytes {
            Some(bytes) => add(&counting.bytes, bytes as u64),
            None => add(&counting.failed, 1),
        }
    }

    /// What is late is asked for a second time.
    pub fn hedged(&self) {
        add(&self.hedges, 1);
    }

    /// That was answered first.
    pub fn hedge_won(&self) {
        add(&self.hedges_won, 1);
    }

    /// A part did not fit its id.
    pub fn thrown_away(&self) {
        add(&self.thrown_away, 1);
    }

    pub fn of(&self, cause: Cause) -> Requested {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counting = &self.by[cause as usize];
        Requested {
            requests: of(&counting.requests),
            failed: of(&counting.failed),
            bytes: of(&counting.bytes),
        }
    }

    pub fn sum(&self) -> LazyCounts {
        LazyCounts {
            demand: self.of(Cause::Demand),
            working_set: self.of(Cause::WorkingSet),
            ahead: self.of(Cause::Ahead),
            fill: self.of(Cause::Fill),
            hedges: self.hedges.load(Ordering::Relaxed),
            hedges_won: self.hedges_won.load(Ordering::Relaxed),
            thrown_away: self.thrown_away.load(Ordering::Relaxed),
        }
    }
}

fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}
