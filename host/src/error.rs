//! What goes wrong, in classes that a front end tells its user by: as exit codes, say.

use serde::{Deserialize, Serialize};
use snapstore_vmm::agent::{self, AgentError};

/// What cannot be meant, with what to say of it.
#[derive(Debug)]
pub struct Usage(pub String);

/// A thing that does not exist, with what to say of it.
#[derive(Debug)]
pub struct NotFound(pub String);

/// A thing that another process holds, with what to say of it.
#[derive(Debug)]
pub struct Busy(pub String);

/// A mount that was found, and is not there any more when it is used, with what to say of it.
/// Trying again finds or makes another.
#[derive(Debug)]
pub struct Unmounted(pub String);

/// What another process of this program failed with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildFailure {
    /// What it would have said.
    pub message: String,
    /// Of its error.
    pub class: ErrorClass,
}

/// What kind of thing went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// Nothing of the others.
    Failed,
    /// What was asked for cannot be meant.
    Usage,
    /// There is no such snapshot, machine or mount.
    NotFound,
    /// Stored data is damaged.
    Damaged,
    /// Another process holds it; trying again may help.
    Busy,
    /// A mount was undone that was about to be used; trying again makes another.
    Unmounted,
    /// Another host did not answer: what was asked for may have happened.
    Unanswered,
}

macro_rules! message_is_field {
    ($($error:ty: $field:tt),*) => {$(
        impl std::fmt::Display for $error {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(&self.$field)
            }
        }
        impl std::error::Error for $error {}
    )*};
}

message_is_field!(Usage: 0, NotFound: 0, Busy: 0, Unmounted: 0, ChildFailure: message);

impl ChildFailure {
    /// What this process hands to the one that waits for it.
    pub fn of(error: &anyhow::Error) -> Self {
        Self {
            message: message(error),
            class: class(error),
        }
    }
}

/// The error and its causes. Many of ours name their cause themselves: what the
/// line ends with already is not said again.
pub fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message += ": ";
            message += &cause;
        }
    }
    message
}

/// What kind of thing went wrong.
pub fn class(error: &anyhow::Error) -> ErrorClass {
    if error.is::<Usage>() {
        return ErrorClass::Usage;
    }
    if error.is::<NotFound>() {
        return ErrorClass::NotFound;
    }
    if error.is::<Busy>() {
        return ErrorClass::Busy;
    }
    if error.is::<Unmounted>() {
        return ErrorClass::Unmounted;
    }
    if let Some(error) = error.downcast_ref::<ChildFailure>() {
        return error.class;
    }
    if let Some(error) = error.downcast_ref::<snapstore_vmm::Error>() {
        return of_machine(error);
    }
    if let Some(error) = error.downcast_ref::<snapstore_store::Error>() {
        return of_store(error);
    }
    if let Some(AgentError::Refused { kind, .. }) = error.downcast_ref::<AgentError>() {
        return match kind {
            agent::ErrorKind::Busy => ErrorClass::Busy,
            _ => ErrorClass::Failed,
        };
    }
    match error.downcast_ref::<snapstore_fuse::Error>() {
        Some(snapstore_fuse::Error::Store(error)) => of_store(error),
        Some(
            snapstore_fuse::Error::NotMounted { .. }
            | snapstore_fuse::Error::NotWritable { .. }
            | snapstore_fuse::Error::NoView { .. },
        ) => ErrorClass::NotFound,
        Some(
            snapstore_fuse::Error::ViewDamaged { .. }
            | snapstore_fuse::Error::StateDamaged { .. }
            | snapstore_fuse::Error::EndDamaged { .. }
            | snapstore_fuse::Error::OverlayDamaged { .. },
        ) => ErrorClass::Damaged,
        Some(
            snapstore_fuse::Error::ViewServed { .. }
            | snapstore_fuse::Error::ViewCommitted { .. }
            | snapstore_fuse::Error::ViewRefused { busy: true, .. },
        ) => ErrorClass::Busy,
        Some(
            snapstore_fuse::Error::InUse { .. } | snapstore_fuse::Error::AlreadyMounted { .. },
        ) => ErrorClass::Busy,
        _ => ErrorClass::Failed,
    }
}

fn of_store(error: &snapstore_store::Error) -> ErrorClass {
    use snapstore_store::ErrorClass as Stored;
    match error.class() {
        Stored::NotFound => ErrorClass::NotFound,
        Stored::Damaged => ErrorClass::Damaged,
        Stored::Busy => ErrorClass::Busy,
        Stored::Usage => ErrorClass::Usage,
        Stored::Cancelled | Stored::Invalid | Stored::Newer | Stored::Io => ErrorClass::Failed,
    }
}

fn of_machine(error: &snapstore_vmm::Error) -> ErrorClass {
    use snapstore_vmm::control::ErrorKind;
    match error {
        snapstore_vmm::Error::NoMachine { .. } | snapstore_vmm::Error::NoTap { .. } => {
            ErrorClass::NotFound
        }
        snapstore_vmm::Error::TapBusy { .. }
        | snapstore_vmm::Error::DiskBusy { .. }
        | snapstore_vmm::Error::NoAnswer { .. }
        | snapstore_vmm::Error::Refused {
            kind: ErrorKind::Busy,
            ..
        } => ErrorClass::Busy,
        _ => ErrorClass::Failed,
    }
}
