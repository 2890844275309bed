//! Faults that can be put back, to see the simulator find them.

/// One fault. Each is switched on in one place of the code, which says
/// `sim::on(Fault::...)`.
#[cfg_attr(not(feature = "sim"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fault {
    /// The index keeps a delta where a copy that can be a base is published. Deltas
    /// are made against what hints lead to, and the collector marks as their base
    /// what the index leads to.
    DeltaKeptInIndex,
    /// The same, and what was marked as a base is not marked again, so that its own
    /// base is not.
    BaseOfBaseNotMarked,
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
    /// The base of what is marked is not marked.
    BaseNotMarked,
    /// The index leads to copies before they are durable.
    CopiesEnteredBeforeSealed,
    /// What is found by hints only is not entered before packs are condemned.
    FoundNotIndexed,
    /// On a full disk packs are removed that a commit under way may rely on.
    RoomMadeBesideWriters,
    /// A commit looks whether what it relies on stays before it has the lock.
    RevivedWithoutLock,
    /// A snapshot without a tag is taken for whole though it needs a pack that is
    /// deleted: this process has it open still.
    DeletedPackTrusted,
    /// Repair moves the old index away before the new one is in its place.
    IndexMovedAway,
    /// A collection removes index entries by a list of packs that it made before it
    /// had the publish lock.
    CleanedByOldList,
    /// A collection that has waited for an upgrade goes on in the format from before.
    FormatNotLookedAt,
    /// Packs of format 2 are made before the configuration that says so is durable,
    /// which an upgrade that was killed has left behind.
    UpgradeNotSettled,
    /// What was condemned in format 1 is never condemned by its identity.
    CondemnedWithoutIdentity,
    /// A commit looks all chunks of a pack up under the publish lock.
    LookedUpUnderLock,
    /// What an upgrade has renamed is called missing by who has opened the store before.
    RenamedCalledMissing,
    /// A large pack that is in the index is removed if its commit fails after all.
    LargePackNotKept,
    /// The collector takes the place that a chunk's hint says for the one that counts
    /// where an entry of either of its keys leads there.
    EitherKeyCounts,
    /// An entry that leads to a pack which is deleted next is not made to lead to the
    /// copy of another one.
    CopyOfGoingPackKept,
    /// An optimisation makes a delta of what a writer may take for a base.
    RebasedBesideWriters,
    /// An optimisation makes a delta of what is a base.
    NeededBaseRebased,
    /// The index leads to what an optimisation writes before it is durable.
    RearrangedBeforeSealed,
    /// What a collection writes is not charged.
    RewriteNotCharged,
    /// A working set is written in its place.
    GuessInPlace,
    /// The checksum of a small file is not looked at: a power cut may tear a working set.
    SealNotChecked,
    /// A collection lists the working sets when it has read the tags.
    SetsListedLate,
}

/// Whether encoding is taken for identity, in one of both ways.
pub(crate) fn bases_by_id() -> bool {
    super::on(Fault::DeltaKeptInIndex) || super::on(Fault::BaseOfBaseNotMarked)
}

/// Whether a commit does not look again, under the publish lock, whether what it
/// relies on is there.
pub(crate) fn no_second_look() -> bool {
    super::on(Fault::WriterDuringRepair)
}

#[cfg(feature = "sim")]
impl Fault {
    /// Those that the simulator has to find.
    pub const FOUND: [Self; 44] = [
        Self::DeltaKeptInIndex,
        Self::BaseOfBaseNotMarked,
        Self::WriterDuringRepair,
        Self::PackNotLookedFor,
        Self::DeadDeltaTrusted,
        Self::PublishHeldThroughout,
        Self::TagBeforeIndex,
        Self::RenameBeforeSync,
        Self::PackNotSynced,
        Self::PackNameNotSynced,
        Self::SmallFileNotSynced,
        Self::SmallFileNameNotSynced,
        Self::DeletedWithoutLock,
        Self::OldWriterIgnored,
        Self::CondemnedReused,
        Self::StaleHintTrusted,
        Self::LateRootsNotMarked,
        Self::ParentNotPinned,
        Self::BaseNotMarked,
        Self::CopiesEnteredBeforeSealed,
        Self::RoomMadeBesideWriters,
        Self::DeletedPackTrusted,
        Self::IndexMovedAway,
        Self::CleanedByOldList,
        Self::FormatNotLookedAt,
        Self::LeaseAfterEpoch,
        Self::StaleLeafTrusted,
        Self::RevivedWithoutLock,
        Self::NotRevived,
        Self::NumberUsedAgain,
        Self::PublishingPackJudged,
        Self::TagsNotSyncedBeforeDeletion,
        Self::RepairEntersDeadDelta,
        Self::UpgradeNotSettled,
        Self::CondemnedWithoutIdentity,
        Self::LookedUpUnderLock,
        Self::LargePackNotKept,
        Self::CopyOfGoingPackKept,
        Self::RebasedBesideWriters,
        Self::NeededBaseRebased,
        Self::RearrangedBeforeSealed,
        Self::GuessInPlace,
        Self::SealNotChecked,
        Self::SetsListedLate,
    ];

    /// Those that nothing can come of in a store that only this version has written.
    ///
    /// [`Fault::FoundNotIndexed`]: a chunk that a snapshot needs is found by a hint
    /// alone only if the index leads elsewhere or nowhere. An entry is replaced by
    /// one that leads to a copy, and a pack is deleted only if no entry leads to
    /// anything in it that is needed; so the index leads to all that is needed. Older
    /// versions did not keep to that (they let a delta take the entry of what was
    /// its base), and what they left is put right by this step.
    pub const OF_OLDER_STORES: [Self; 1] = [Self::FoundNotIndexed];

    /// What hides this fault, as what is done twice does, and has to be put back
    /// along with it to be found. Then the store has to get through a history with
    /// that alone for it to say anything of this fault.
    #[must_use]
    pub fn hidden_by(self) -> Option<Self> {
        match self {
            Self::LeaseAfterEpoch
            | Self::OldWriterIgnored
            | Self::CondemnedReused
            | Self::DeletedWithoutLock
            | Self::LateRootsNotMarked
            | Self::ParentNotPinned
            | Self::PublishingPackJudged
            | Self::RoomMadeBesideWriters => Some(Self::WriterDuringRepair),
            Self::FormatNotLookedAt => Some(Self::RenamedCalledMissing),
            Self::CopyOfGoingPackKept => Some(Self::EitherKeyCounts),
            // Nobody builds on a leaf whose pages are not in their places.
            Self::NotRevived => Some(Self::StaleLeafTrusted),
            _ => None,
        }
    }
}
