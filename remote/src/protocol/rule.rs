//! The rules that safety rests on. The checker takes one away at a time and has to find
//! what is lost then.

/// A rule of the protocol; docs/REMOTE.md has them with their reasons.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// R1: a name is used once.
    NamesAreUsedOnce,
    /// R2: exclusion rests on a write that was acknowledged.
    OwnWriteIsAcknowledged,
    /// R2: a fence that another collector is writing is written again.
    FenceIsWrittenAgain,
    /// R3: the lease is there before condemnations are read.
    LeaseBeforeCondemned,
    /// R3: the condemnation is there before leases are read.
    CondemnedBeforeLeases,
    /// R4: condemned is for life, as long as the object exists.
    CondemnedForLife,
    /// R4: what is condemned is used only on the word of a root.
    CondemnedIsNotUsed,
    /// R5: a collection waits for pushes that have not seen its record.
    WaitsForPushes,
    /// R5: a collection deletes only what it condemned itself.
    OwnCondemnedOnly,
    /// R6: no acknowledgement once there is a fence.
    FenceRefuses,
    /// R6: what a push relied on is looked at again.
    RootsAreReadAgain,
    /// R7: fences before the last look at the tags.
    FenceBeforeLook,
    /// R8: a head lists all packs that it needs.
    HeadListsAll,
    /// R9: an error is not taken for "not done".
    ErrorIsUnknown,
    /// R9: silence alone ends nobody; a fence does.
    SilenceNeedsFence,
    /// A fenced record supersedes nothing.
    FencedSupersedesNothing,
    /// A record of a session that has a lease supersedes nothing.
    ActiveSupersedesNothing,
    /// Fenced records count as roots.
    FencedIsRoot,
    /// A session that fails puts its own fence before it ends its lease.
    FailureIsFenced,
    /// A fence stays when the lease goes.
    FenceStays,
    /// A fenced record is confirmed before it is relied on.
    FencedIsConfirmed,
    /// Whether a session ended is looked at after its record: lease first, fence then.
    LooksInOrder,
    /// A collection believes what two looks at the tags agree on.
    TwoLooksAgree,
    /// A push relies on records of sessions that ended well only.
    RootIsSettled,
    /// A reused object is looked for after the condemnations were read.
    ReusedExists,
    /// A view's tag is read again after its lease was written.
    ViewLooksAgain,
    /// A push looks for others of its number after its record is there.
    LooksForOthers,
    /// A collection forgets a fenced record only if what it needs is gone.
    ForgottenIsVoid,
    /// A repack writes records of the change that they are of: it takes no number of its own.
    RepackKeepsNumber,
    /// A repack writes only records anew that count.
    RepackOfWhatCounts,
    /// The lease of a repack goes after the last record of all tags was written.
    LeaseOutlivesRecords,
    /// A repack that was given up is finished by the next one.
    CutOffRepackIsFinished,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 32] = [
        Self::NamesAreUsedOnce,
        Self::OwnWriteIsAcknowledged,
        Self::FenceIsWrittenAgain,
        Self::LeaseBeforeCondemned,
        Self::CondemnedBeforeLeases,
        Self::CondemnedForLife,
        Self::CondemnedIsNotUsed,
        Self::WaitsForPushes,
        Self::OwnCondemnedOnly,
        Self::FenceRefuses,
        Self::RootsAreReadAgain,
        Self::FenceBeforeLook,
        Self::HeadListsAll,
        Self::ErrorIsUnknown,
        Self::SilenceNeedsFence,
        Self::FencedSupersedesNothing,
        Self::ActiveSupersedesNothing,
        Self::FencedIsRoot,
        Self::FailureIsFenced,
        Self::FenceStays,
        Self::FencedIsConfirmed,
        Self::LooksInOrder,
        Self::TwoLooksAgree,
        Self::RootIsSettled,
        Self::ReusedExists,
        Self::ViewLooksAgain,
        Self::LooksForOthers,
        Self::ForgottenIsVoid,
        Self::RepackKeepsNumber,
        Self::RepackOfWhatCounts,
        Self::LeaseOutlivesRecords,
        Self::CutOffRepackIsFinished,
    ];
}
