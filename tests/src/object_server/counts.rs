//! What a server was asked for.

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An object or a part of one.
    Read,
    /// How long an object is, or whether it is there.
    Look,
    /// Names.
    Listing,
    /// Of an object, or a part of one.
    Write,
    /// Begin or end of an object that comes in parts.
    Parts,
    /// Of an object.
    Deletion,
    /// About the bucket.
    Other,
}

/// Requests of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Requests([u64; 7]);

impl Requests {
    /// One more.
    pub fn add(&mut self, kind: Kind) {
        self.0[kind as usize] += 1;
    }

    /// Those of one kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    /// Those of all kinds.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Those that came after an earlier count.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self(std::array::from_fn(|kind| self.0[kind] - before.0[kind]))
    }
}
