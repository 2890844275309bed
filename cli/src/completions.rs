//! Completion of what is typed in a shell: commands and options, and what there is to be
//! named: tags, machines, mounts.
//!
//! The shell's script (`snapstore completions SHELL`) calls the program again, with
//! [`VARIABLE`] set, so that it knows the tags of the store.

use clap::{Command, CommandFactory as _};
use clap_complete::env::{CompleteEnv, Shells};
use clap_complete::{ArgValueCandidates, CompletionCandidate};
use snapstore_host::runtime::{Runtime, runtime_dir};
use snapstore_store::Store;

use crate::args::Cli;
use crate::context::Context;

/// Set by the shell's script.
const VARIABLE: &str = "SNAPSTORE_COMPLETE";

/// What the value of an argument names.
#[derive(Clone, Copy)]
enum Named {
    Tag,
    Machine,
    Mount,
}

use Named::{Machine, Mount, Tag};

/// Commands, their arguments, and what those name.
const NAMED: [(&str, &str, Named); 23] = [
    ("commit", "parent", Tag),
    ("commit", "vm", Machine),
    ("mount", "what", Tag),
    ("umount", "dir", Mount),
    ("run", "or_restore", Tag),
    ("restore", "snapshot", Tag),
    ("ps", "name", Machine),
    ("pause", "name", Machine),
    ("resume", "name", Machine),
    ("stop", "names", Machine),
    ("console", "name", Machine),
    ("exec", "name", Machine),
    ("tag", "source", Tag),
    ("rm", "tags", Tag),
    ("log", "tag", Tag),
    ("show", "snapshot", Tag),
    ("diff", "old", Tag),
    ("diff", "new", Tag),
    ("map", "snapshot", Tag),
    ("report", "snapshot", Tag),
    ("export", "snapshots", Tag),
    ("warm", "snapshot", Tag),
    ("push", "tag", Tag),
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
        .into_iter()
        .fold(Cli::command(), |cli, (command, argument, named)| {
            cli.mut_subcommand(command, |command| {
                // Not `mut_arg`, which makes it the last positional one.
                command.mut_args(|it| match it.get_id() == argument {
                    true => it.add(ArgValueCandidates::new(move || candidates(named))),
                    false => it,
                })
            })
        })
}

/// What there is; nothing where that cannot be said.
fn candidates(named: Named) -> Vec<CompletionCandidate> {
    let names = match named {
        Tag => tags(),
        Machine => machines(),
        Mount => snapstore_fuse::Mountpoint::all().ok().map(|mounts| {
            let mounts = mounts.into_iter();
            mounts
                .map(|mount| mount.dir.display().to_string())
                .collect()
        }),
    };
    let names = names.unwrap_or_default().into_iter();
    names.map(CompletionCandidate::new).collect()
}

fn tags() -> Option<Vec<String>> {
    // What is typed after --store is not known here.
    let path = Context::new(None, false, None).store_path().ok()?;
    Store::open(&path).ok()?.tag_names().ok()
}

fn machines() -> Option<Vec<String>> {
    // Not made by looking.
    if !runtime_dir().exists() {
        return None;
    }
    let vms = Runtime::open().ok()?.vms().ok()?;
    Some(vms.into_iter().map(|vm| vm.name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mut_subcommand` and `mut_arg` would make what is not there.
    #[test]
    fn each_named_argument_is_one() {
        let cli = Cli::command();
        for (name, argument, _) in NAMED {
            let command = cli.find_subcommand(name).unwrap();
            let mut arguments = command.get_arguments();
            assert!(
                arguments.any(|it| it.get_id() == argument),
                "{name} has no {argument}"
            );
        }
        command().debug_assert();
    }
}
