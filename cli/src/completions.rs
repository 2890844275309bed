//! Completion of what is typed in a shell: commands and options, and what there is to be
//! named: tags, ids of snapshots, machines, mounts, remotes.
//!
//! The shell's script (`snapstore completions SHELL`) calls the program again, with
//! [`VARIABLE`] set, so that it knows the tags of the store.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Arg, Command, CommandFactory as _};
use clap_complete::CompletionCandidate;
use clap_complete::engine::{ArgValueCompleter, PathCompleter, ValueCompleter};
use clap_complete::env::{CompleteEnv, Shells};
use snapstore_host::runtime::{Runtime, runtime_dir};
use snapstore_store::{SnapshotId, Store};

use crate::args::Cli;
use crate::context::Context;
use crate::known::remotes;

/// Set by the shell's script.
const VARIABLE: &str = "SNAPSTORE_COMPLETE";

/// What the value of an argument names.
#[derive(Clone, Copy)]
enum Named {
    Tag,
    /// A tag, or the beginning of an id.
    Snapshot,
    Machine,
    Mount,
    Remote,
    /// A tag of a remote, of which only the remote is known here.
    RemoteTag,
    /// A snapshot of the store, or of a remote, of which only the remote is known here.
    SnapshotAnywhere,
    /// That and a directory, or a directory alone: which of them is not known here.
    SnapshotOrDir,
    /// A machine with a colon, or a file.
    MachineOrFile,
    /// One of these words.
    Word(&'static [&'static str]),
}

use Named::{
    Machine, MachineOrFile, Mount, Remote, RemoteTag, Snapshot, SnapshotAnywhere, SnapshotOrDir,
    Tag, Word,
};

const MONITORS: Named = Word(&["qemu", "firecracker", "cloud-hypervisor"]);

/// Commands, their arguments, and what those name.
const NAMED: &[(&str, &str, Named)] = &[
    ("commit", "parent", Snapshot),
    ("commit", "vm", Machine),
    ("commit", "mount", Mount),
    ("mount", "what", SnapshotOrDir),
    ("mount", "layout", MONITORS),
    ("umount", "dir", Mount),
    ("run", "or_restore", Snapshot),
    (
        "run",
        "cpu",
        Word(&["host", "x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"]),
    ),
    ("restore", "snapshot", SnapshotAnywhere),
    ("restore", "with", MONITORS),
    ("ps", "name", Machine),
    ("pause", "name", Machine),
    ("resume", "name", Machine),
    ("stop", "names", Machine),
    ("console", "name", Machine),
    ("exec", "name", Machine),
    ("cp", "from", MachineOrFile),
    ("cp", "to", MachineOrFile),
    ("tag", "source", Snapshot),
    ("rm", "tags", Tag),
    ("forget", "group_by", Word(&["none", "chain", "label:"])),
    ("log", "tag", Snapshot),
    ("show", "snapshot", Snapshot),
    ("diff", "old", Snapshot),
    ("diff", "new", Snapshot),
    ("map", "snapshot", Snapshot),
    ("report", "snapshot", Snapshot),
    ("export", "snapshots", Snapshot),
    ("warm", "snapshot", Snapshot),
    ("push", "tag", Snapshot),
    ("push", "remote", Remote),
    ("pull", "from", RemoteTag),
    ("remote forget", "name", Remote),
    ("remote init", "name", Remote),
    ("remote check", "name", Remote),
    ("remote tags", "name", Remote),
    ("remote accept", "name", Remote),
    ("remote rm", "name", Remote),
    ("remote gc", "name", Remote),
    ("remote verify", "name", Remote),
    ("remote leases", "name", Remote),
];

/// Answers a shell that asks what can be typed, and ends; else it does nothing.
pub fn answer_shell() {
    CompleteEnv::with_factory(command).var(VARIABLE).complete();
}

/// The script of a shell, by the shell's name.
pub fn script(shell: &str) -> std::io::Result<Vec<u8>> {
    let mut script = Vec::new();
    let shells = Shells::builtins();
    let shell = shells
        .completer(shell)
        .ok_or_else(|| std::io::Error::other("unknown shell"))?;
    shell.write_registration(VARIABLE, "snapstore", "snapstore", "snapstore", &mut script)?;
    Ok(script)
}

/// The command line with what can be named.
fn command() -> Command {
    NAMED
        .iter()
        .copied()
        .fold(Cli::command(), |cli, (command, argument, named)| {
            let completed = move |it: Arg| match it.get_id() == argument {
                true => it.add(ArgValueCompleter::new(named)),
                false => it,
            };
            // Not `mut_arg`, which makes it the last positional one.
            match command.split_once(' ') {
                None => cli.mut_subcommand(command, |command| command.mut_args(completed)),
                Some((outer, inner)) => cli.mut_subcommand(outer, |command| {
                    command.mut_subcommand(inner, |command| command.mut_args(completed))
                }),
            }
        })
}

impl ValueCompleter for Named {
    /// What there is that begins so; nothing where that cannot be said.
    fn complete(&self, typed: &OsStr) -> Vec<CompletionCandidate> {
        let begins = |it: &CompletionCandidate| {
            let value = it.get_value().as_encoded_bytes();
            value.starts_with(typed.as_encoded_bytes())
        };
        let mut found = match self {
            Tag => tags(),
            Snapshot => snapshots(typed),
            SnapshotAnywhere | SnapshotOrDir => snapshots(typed).map(|mut found| {
                found.extend(of_remotes("/").unwrap_or_default());
                found
            }),
            Machine => machines(""),
            MachineOrFile => machines(":"),
            Mount => mounts(),
            Remote => of_remotes(""),
            RemoteTag => of_remotes("/"),
            Word(words) => Some(words.iter().map(CompletionCandidate::new).collect()),
        }
        .unwrap_or_default();
        found.retain(begins);
        // A mount point may be typed by another path than its own.
        let is_path = matches!(self, SnapshotOrDir) || matches!(self, Mount) && found.is_empty();
        if is_path {
            found.extend(PathCompleter::dir().complete(typed));
        }
        if matches!(self, MachineOrFile) {
            found.extend(PathCompleter::file().complete(typed));
        }
        found
    }
}

/// The store of the line that is typed.
fn store() -> Option<Store> {
    let path = Context::new(typed_store(), false, None).store_path().ok()?;
    Store::open(&path).ok()
}

/// What was typed after `--store`: the words of the line are this process's arguments.
fn typed_store() -> Option<PathBuf> {
    let mut words = std::env::args_os().skip_while(|word| word != "--");
    while let Some(word) = words.next() {
        if word == "--store" {
            return words.next().map(PathBuf::from);
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--store=")) {
            return Some(PathBuf::from(path));
        }
    }
    None
}

fn candidate(value: impl Into<OsString>, help: String) -> CompletionCandidate {
    let help = (!help.is_empty()).then(|| help.into());
    CompletionCandidate::new(value).help(help)
}

/// With their ids where the shell shows that.
fn tags() -> Option<Vec<CompletionCandidate>> {
    let store = store()?;
    let ids = store.tags().unwrap_or_default();
    let id = |tag: &String| ids.get(tag).map(SnapshotId::short).unwrap_or_default();
    let names = store.tag_names().ok()?.into_iter();
    Some(
        names
            .map(|tag| {
                let id = id(&tag);
                candidate(tag, id)
            })
            .collect(),
    )
}

/// Tags, and ids for who has begun to type one: they are nothing to choose from.
fn snapshots(typed: &OsStr) -> Option<Vec<CompletionCandidate>> {
    let mut found = tags()?;
    let typed = typed.to_str()?;
    let is_hex = |letter: u8| matches!(letter, b'0'..=b'9' | b'a'..=b'f');
    if typed.is_empty() || !typed.bytes().all(is_hex) {
        return Some(found);
    }
    let mut tags: BTreeMap<SnapshotId, Vec<String>> = BTreeMap::new();
    for (tag, id) in store()?.tags().ok()? {
        tags.entry(id).or_default().push(tag);
    }
    for (id, tags) in tags {
        // As short as everywhere, unless more has been typed.
        let short = Some(id.short()).filter(|short| typed.len() <= short.len());
        found.push(candidate(
            short.unwrap_or_else(|| id.to_string()),
            tags.join(", "),
        ));
    }
    Some(found)
}

/// With this after their names.
fn machines(after: &str) -> Option<Vec<CompletionCandidate>> {
    // Not made by looking.
    if !runtime_dir().exists() {
        return None;
    }
    let vms = Runtime::open().ok()?.vms().ok()?;
    Some(
        vms.into_iter()
            .map(|vm| CompletionCandidate::new(vm.name + after))
            .collect(),
    )
}

fn mounts() -> Option<Vec<CompletionCandidate>> {
    let mounts = snapstore_fuse::Mountpoint::all().ok()?.into_iter();
    Some(
        mounts
            .map(|mount| CompletionCandidate::new(mount.dir))
            .collect(),
    )
}

/// With this after their names.
fn of_remotes(after: &str) -> Option<Vec<CompletionCandidate>> {
    let known = remotes(store()?.path()).ok()?;
    let known = known.into_iter();
    Some(
        known
            .map(|(name, one)| candidate(name + after, one.place.url))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mut_subcommand` and `mut_arg` would make what is not there.
    #[test]
    fn each_named_argument_is_one() {
        let cli = Cli::command();
        for (name, argument, _) in NAMED {
            let mut command = &cli;
            for name in name.split(' ') {
                command = command.find_subcommand(name).unwrap();
            }
            let mut arguments = command.get_arguments();
            assert!(
                arguments.any(|it| it.get_id() == *argument),
                "{name} has no {argument}"
            );
        }
        command().debug_assert();
    }

    /// What is offered as a word is understood.
    #[test]
    fn each_word_is_one() {
        for (name, argument, named) in NAMED {
            let Word(words) = named else { continue };
            for word in *words {
                let option = format!("--{}={}", argument.replace('_', "-"), word);
                let option = option.replace("label:", "label:KEY");
                let rest: &[&str] = match *name {
                    "mount" => &["tag", "dir"],
                    "run" => &["name", "--kernel", "file"],
                    "restore" => &["tag"],
                    _ => &[],
                };
                let words = ["snapstore", name, &option].into_iter();
                let parsed = Cli::command().try_get_matches_from(words.chain(rest.iter().copied()));
                assert!(parsed.is_ok(), "{name} {option}: {:?}", parsed.err());
            }
        }
    }
}
