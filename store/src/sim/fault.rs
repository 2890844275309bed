//! Faults that can be put back, to see the simulator find them.

/// One fault. Each is switched on in one place of the code, which says
/// `sim::on(Fault::...)`.
#[cfg_attr(not(feature = "sim"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fault {
    /// The index keeps a delta where a copy that can be a base is published.
    DeltaKeptInIndex,
    /// The base of a delta is not marked.
    BaseNotMarked,
    /// A commit that begins while repair runs trusts the old index.
    WriterDuringRepair,
    /// Deduplication does not look whether the pack is still there.
    PackNotLookedFor,
    /// Deduplication trusts a delta whose base was collected.
    DeadDeltaTrusted,
    /// Repair enters a delta whose base is gone.
    RepairEntersDeadDelta,
    /// A collection holds the publish lock for all that it deletes.
    PublishHeldThroughout,
    /// The tag is set before the index is changed.
    TagBeforeIndex,
    /// A pack gets its name before it is flushed.
    RenameBeforeSync,
    /// A pack is not flushed.
    PackNotSynced,
    /// The name of a pack is not flushed.
    PackNameNotSynced,
    /// A tag's bytes are not flushed.
    SmallFileNotSynced,
    /// A tag's name is not flushed.
    SmallFileNameNotSynced,
    /// A writer reads the epoch, and takes its lease then.
    LeaseAfterEpoch,
    /// A collection deletes without the publish lock.
    DeletedWithoutLock,
    /// A collection deletes what a writer of an older epoch may rely on.
    OldWriterIgnored,
    /// Deduplication uses chunks of condemned packs.
    CondemnedReused,
    /// A leaf is reused though its pages are gone.
    StaleLeafTrusted,
    /// A stale hint is taken for the chunk's place.
    StaleHintTrusted,
    /// A commit does not take what it relies on off the list of the condemned.
    NotRevived,
    /// The number of a condemned pack is used again.
    NumberUsedAgain,
    /// A pack whose commit is under way is collected.
    PublishingPackJudged,
    /// Roots added while the collection ran are not marked.
    LateRootsNotMarked,
    /// A commit does not pin its parent.
    ParentNotPinned,
    /// A removal that a power cut takes back is relied on.
    TagsNotSyncedBeforeDeletion,
    /// A pack that the index may lead to is removed when a commit fails.
    PackNotKept,
}

#[cfg(feature = "sim")]
impl Fault {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::DeltaKeptInIndex,
        Self::BaseNotMarked,
        Self::WriterDuringRepair,
        Self::PackNotLookedFor,
        Self::DeadDeltaTrusted,
        Self::RepairEntersDeadDelta,
        Self::PublishHeldThroughout,
        Self::TagBeforeIndex,
        Self::RenameBeforeSync,
        Self::PackNotSynced,
        Self::PackNameNotSynced,
        Self::SmallFileNotSynced,
        Self::SmallFileNameNotSynced,
        Self::LeaseAfterEpoch,
        Self::DeletedWithoutLock,
        Self::OldWriterIgnored,
        Self::CondemnedReused,
        Self::StaleLeafTrusted,
        Self::StaleHintTrusted,
        Self::NotRevived,
        Self::NumberUsedAgain,
        Self::PublishingPackJudged,
        Self::LateRootsNotMarked,
        Self::ParentNotPinned,
        Self::TagsNotSyncedBeforeDeletion,
        Self::PackNotKept,
    ];
}
