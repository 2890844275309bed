//! What a user can do about an error of the store: the store names no commands and
//! no options, since it does not know who shows its messages.

use snapstore_store::{Damage, Error, Finding};
use snapstore_vmm::agent::AgentError;

/// What can be done about the first error of the store among an error's causes.
pub fn of(error: &anyhow::Error) -> Option<&'static str> {
    if let Some(error) = error.downcast_ref() {
        return about_remote(error);
    }
    if let Some(AgentError::NoAgent { .. }) = error.downcast_ref() {
        return Some("does the guest run snapstore-agent, and has it booted?");
    }
    error.chain().find_map(|cause| {
        let wrapped = match cause.downcast_ref() {
            Some(snapstore_fuse::Error::Store(error)) => Some(error),
            _ => cause.downcast_ref(),
        };
        wrapped.and_then(about)
    })
}

/// The message of an error, and what can be done about it.
pub fn told(error: &Error) -> String {
    with(error, about(error))
}

/// The same of damage.
pub fn told_damage(damage: &Damage) -> String {
    with(damage, Some(about_damage(damage)))
}

fn with(message: &impl ToString, hint: Option<&str>) -> String {
    match hint {
        Some(hint) => format!("{}; {hint}", message.to_string()),
        None => message.to_string(),
    }
}

fn about_remote(error: &snapstore_remote::Error) -> Option<&'static str> {
    use snapstore_remote::Error as Remote;
    use snapstore_remote::protocol::Error as Protocol;
    match error {
        Remote::NoRemote { .. } => Some("`snapstore remote init NAME` makes one"),
        Remote::RemoteExists { .. } => Some("use it as it is"),
        Remote::ForeignConfig { .. } => Some(
            "choose an empty directory or prefix; if it is a damaged remote without a snapshot, remove the object",
        ),
        Remote::NothingThere {
            was_there: false, ..
        } => Some(
            "mount it, and run the command again; if the bucket is new, `snapstore remote init \
             NAME` makes it a remote",
        ),
        Remote::NothingThere {
            was_there: true, ..
        } => Some(
            "mount it, and run the command again; to begin anew there, run `snapstore remote \
             add NAME URL` once more, and then `snapstore remote init NAME`",
        ),
        Remote::InClear { .. } => Some(
            "use https://; for a test, `snapstore remote add NAME URL --allow-http` with the same \
             name and URL allows it",
        ),
        Remote::NoKey { .. } | Remote::OtherKey { .. } => Some(
            "`snapstore remote add` once more, with the same name and URL and --key FILE, says \
             which key it is",
        ),
        Remote::InClearThere { .. } => Some(
            "`snapstore remote add` once more, with the same name and URL and without --key, \
             uses it as it is; only a new bucket can be made an encrypted remote",
        ),
        Remote::OtherPageSize { .. } => {
            Some("`snapstore init --page-size` makes a store with pages as those")
        }
        Remote::Protocol(Protocol::Damaged { key, .. }) if key == "config" => Some(
            "`snapstore remote init NAME` makes it anew, from a store with pages as those of the \
             snapshots there",
        ),
        Remote::Protocol(Protocol::Unanswered(error)) if error.changed_nothing() => {
            Some("that request changed nothing: once this is mended, run the command again")
        }
        Remote::Protocol(Protocol::Unanswered(_)) => {
            Some("it may have happened: run the command again, which finds out")
        }
        Remote::Protocol(Protocol::TagExists { .. } | Protocol::Ambiguous { .. }) => {
            Some("`snapstore push TAG NAME --replace` moves it")
        }
        Remote::Protocol(Protocol::NoTag { .. }) => {
            Some("`snapstore remote tags NAME` lists what there is")
        }
        Remote::Protocol(Protocol::TagBusy { .. }) => Some(
            "`snapstore remote leases NAME` says whose it is; if that has ended, \
                  `snapstore remote gc NAME` gives it up after 15 minutes",
        ),
        Remote::Protocol(Protocol::LeaseLost { .. } | Protocol::Gone { .. }) => {
            Some("run the command again")
        }
        Remote::Protocol(Protocol::Missing { key, .. } | Protocol::Damaged { key, .. })
            if key.starts_with("packs/") || key.starts_with("heads/") =>
        {
            Some(
                "`snapstore remote verify NAME --read-data` lists what is damaged; push each snapshot \
                 that needs it again with --replace, from a store that has it",
            )
        }
        Remote::Protocol(Protocol::RolledBack { .. }) => Some(
            "try again in some minutes; if it stays so, ask who can write to the bucket: \
             `snapstore remote accept NAME TAG` takes what is there for right",
        ),
        // What is no file is in the way of every command: none mends that.
        Remote::Protocol(Protocol::Damaged { key, reason })
            if key.starts_with("refs/") && reason.ends_with("remove it") =>
        {
            Some("then run the command again")
        }
        Remote::Protocol(Protocol::Missing { key, .. } | Protocol::Damaged { key, .. })
            if key
                .strip_prefix("refs/")
                .is_some_and(|tag| tag.contains('/')) =>
        {
            Some(
                "`snapstore push TAG NAME --replace` writes this tag anew, and `snapstore remote rm \
                 NAME TAG` removes it; `snapstore remote verify NAME` lists what else is damaged",
            )
        }
        // What is to be done about others, their own messages say.
        Remote::Protocol(Protocol::Missing { .. } | Protocol::Damaged { .. }) => {
            Some("`snapstore remote verify NAME` lists what else is damaged")
        }
        _ => None,
    }
}

fn about(error: &Error) -> Option<&'static str> {
    match error {
        Error::NoStore { .. } => Some("create one with `snapstore init`"),
        Error::StoreExists { .. } => {
            Some("use it as it is, or choose another directory with --store")
        }
        Error::NotFound { .. } => Some("`snapstore tags` lists what there is"),
        Error::TagExists { .. } => Some("use --replace to move it"),
        Error::Protected { .. } => Some("`snapstore tag --unprotect TAG` ends that"),
        Error::NothingToInherit | Error::NoParentImage { .. } => Some("name one with --parent"),
        Error::DiffWithoutHoles { .. } | Error::DiffGrain { .. } => {
            Some("if all of its data is meant to replace the parent's, say --dense-diff")
        }
        Error::NotAStream { .. } => Some("`snapstore export` writes one"),
        Error::OtherPageSize { .. } => Some("`snapstore init --page-size` makes a store for it"),
        Error::Upgraded { .. } => Some("try again"),
        Error::OldFormat { .. } => Some("`snapstore upgrade` does that"),
        Error::Index { .. } => Some("if this persists run `snapstore repair`"),
        Error::Damaged(damage) => Some(about_damage(damage)),
        _ => None,
    }
}

/// No commit makes the manifest of a snapshot again.
const OF_MANIFEST: &str = "run `snapstore repair`; if the manifest stays lost, commit its images \
                           under another tag and remove its tags with `snapstore rm`";

/// Chunks are named by their kind and their hash.
fn is_manifest(chunk: &str) -> bool {
    chunk.starts_with("manifest ")
}

/// What can be done about what a verification found.
pub fn about_finding(finding: &Finding) -> &'static str {
    match &finding.damage {
        Damage::Chunk { .. } if finding.read_all_the_same || finding.snapshots.is_empty() => {
            "run `snapstore repair`, which sets its pack aside and keeps what is whole"
        }
        Damage::Chunk { chunk, .. } if is_manifest(chunk) => OF_MANIFEST,
        // That is what was run.
        Damage::Chunk { .. } => {
            "run `snapstore repair`, then commit an image that holds it to store it anew"
        }
        other => about_damage(other),
    }
}

/// What can be done about damage.
pub fn about_damage(damage: &Damage) -> &'static str {
    match damage {
        Damage::File { .. } => "`snapstore repair` says what can be rebuilt",
        Damage::Pack { .. } => {
            "run `snapstore repair`, which copies what is whole and sets the pack aside"
        }
        Damage::Footer { .. } => {
            "run `snapstore repair`, which finds these chunks by their content"
        }
        Damage::Chunk { chunk, .. } | Damage::Missing { chunk } if is_manifest(chunk) => {
            OF_MANIFEST
        }
        Damage::Chunk { .. } => {
            "run `snapstore repair`, then commit an image that holds it to store it anew; \
             `snapstore verify --read-data` lists the snapshots it touches"
        }
        Damage::Missing { .. } => {
            "run `snapstore repair`, which names the snapshots that still lack it then: commit their \
             images again, or remove them with `snapstore rm`"
        }
        Damage::Manifest { .. } => "`snapstore rm` removes its tags",
        Damage::Stream { .. } => "export it again, or get another copy of it",
        Damage::Index { .. } => "run `snapstore repair`, which makes it anew",
    }
}
