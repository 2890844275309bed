//! What kind of failure an error is, for exit codes and for whoever can go on nevertheless.

use std::io;

use super::{Error, ErrorClass};

impl Error {
    /// Whether what is stored cannot be read, by this version, by this process, or at
    /// all.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Damaged(_) | Self::Newer { .. } | Self::Denied { .. }
        )
    }

    /// Whether one thing of the store cannot be read, which is in nobody's way but of who
    /// asks for it.
    #[must_use]
    pub fn is_of_what_is_stored(&self) -> bool {
        self.is_lost() || matches!(self, Self::Index { .. })
    }

    /// Whether stored bytes are at fault, and nothing else.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged(_))
    }

    /// Whether there is no room left on the disk.
    pub(crate) fn is_full_disk(&self) -> bool {
        use rustix::io::Errno;
        let Self::Io { source, .. } = self else {
            return false;
        };
        let errno = Errno::from_io_error(source);
        matches!(errno, Some(Errno::NOSPC | Errno::DQUOT))
    }

    /// Whether another process has what is needed, for a moment.
    pub(crate) fn is_held_by_another(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        rustix::io::Errno::from_io_error(source) == Some(rustix::io::Errno::AGAIN)
    }

    /// Whether the process or the host has no descriptor left.
    pub(crate) fn lacks_descriptors(&self) -> bool {
        use rustix::io::Errno;
        let Self::Io { source, .. } = self else {
            return false;
        };
        let errno = Errno::from_io_error(source);
        matches!(errno, Some(Errno::MFILE | Errno::NFILE))
    }

    /// Whether the process or the host has no memory, descriptor or thread left.
    pub(crate) fn is_exhaustion(&self) -> bool {
        use rustix::io::Errno;
        let Self::Io { source, .. } = self else {
            return false;
        };
        let errno = Errno::from_io_error(source);
        let short = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::AGAIN];
        source.kind() == io::ErrorKind::OutOfMemory
            || errno.is_some_and(|errno| short.contains(&errno))
    }

    /// The kind of failure this is.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Io { .. }
            | Self::Denied { .. }
            | Self::Unconfirmed { .. }
            | Self::InputLost { .. } => ErrorClass::Io,
            Self::Cancelled => ErrorClass::Cancelled,
            Self::NoStore { .. } | Self::NotFound { .. } => ErrorClass::NotFound,
            Self::Damaged(_) | Self::Index { .. } | Self::SecretLost { .. } => ErrorClass::Damaged,
            Self::Busy { .. }
            | Self::Overtaken { .. }
            | Self::Upgraded { .. }
            | Self::NotAtHand => ErrorClass::Busy,
            Self::Foreign { class, .. } => *class,
            Self::Newer { .. } | Self::ReadOnlyFeature { .. } => ErrorClass::Newer,
            Self::PageSize { .. } | Self::BadName { .. } | Self::DuplicateName { .. } => {
                ErrorClass::Usage
            }
            Self::NoLocks { .. }
            | Self::OldFormat { .. }
            | Self::NotAStream { .. }
            | Self::OtherPageSize { .. }
            | Self::NotImportable { .. }
            | Self::NotEmpty { .. }
            | Self::StoreExists { .. }
            | Self::PartialPage { .. }
            | Self::EmptyInput { .. }
            | Self::DiffWithoutHoles { .. }
            | Self::DiffGrain { .. }
            | Self::NothingToInherit
            | Self::BadSnapshot { .. }
            | Self::ImageSize { .. }
            | Self::TooLarge { .. }
            | Self::NotAFile { .. }
            | Self::InputChanged { .. }
            | Self::BadExtent { .. }
            | Self::DiffSize { .. }
            | Self::NoParentImage { .. }
            | Self::NameTaken { .. }
            | Self::Ambiguous { .. }
            | Self::Protected { .. }
            | Self::TagExists { .. } => ErrorClass::Invalid,
        }
    }
}
