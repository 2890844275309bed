//! What a page of a map can be.

/// Who has a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PageKind {
    /// All its bytes are zero: it is not stored.
    Zero,
    /// The parent has it at the same place. What the parent has of it elsewhere, or a parent
    /// without a tag, does not count as that.
    Parent,
    /// Another tagged snapshot has it, in whichever image and at whichever place.
    Shared,
    /// No other tagged snapshot has it.
    Own,
}

impl PageKind {
    /// All kinds, in their order.
    pub const ALL: [Self; 4] = [Self::Zero, Self::Parent, Self::Shared, Self::Own];
}

/// Pages in a row that are alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct PageRun {
    /// The number of the first one.
    pub first_page: u64,
    /// How many they are.
    pub pages: u64,
    /// Who has them.
    pub kind: PageKind,
    /// Whether they are in the working set that was recorded.
    pub in_working_set: bool,
}
