//! `snapstore remote gc`

use std::process::ExitCode;

use serde_json::json;
use snapstore_remote::protocol::{NotCollected, RefKey, Stays};
use snapstore_remote::{Remote, RepackOptions, Repacked};

use crate::args::RemoteGcArgs;
use crate::commands::ended;
use crate::commands::remote_told::{told, with_requests};
use crate::context::Context;
use crate::exit;
use crate::format::{count, counted, size};
use crate::logging::say;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, remote: &Remote, args: &RemoteGcArgs) -> anyhow::Result<ExitCode> {
    let dry_run = args.dry_run;
    let options = RepackOptions {
        dry_run,
        percent: args.repack,
        most_bytes: args.max_bytes.unwrap_or(u64::MAX),
    };
    let done = told(remote.gc(options, &Bar::new(Unit::Bytes)))?;
    let (collected, repacked) = (done.collected, done.repacked);
    let untidied = done.untidied.as_ref().map(ToString::to_string);
    let bytes: u64 = collected.deleted.iter().map(|one| one.len_bytes).sum();
    let keys: Vec<_> = collected.deleted.iter().map(|one| &one.key).collect();
    let fenced: Vec<_> = collected.fenced.iter().map(ToString::to_string).collect();
    let void: Vec<_> = collected.void.iter().map(RefKey::key).collect();
    let idle: Vec<_> = collected
        .idle
        .iter()
        .map(|(record, stays)| json!({"record": record.key(), "tag": record.tag, "because": stays.why()}))
        .collect();
    let waits = match &collected.not_deleted {
        Some(NotCollected::Waits(session)) => Some(format!("session {session} is under way")),
        Some(NotCollected::TagsChange) => Some("its tags change all the time".to_owned()),
        None => None,
    };
    let value = json!({
        "dry_run": dry_run,
        "deleted": keys,
        "deleted_bytes": bytes,
        "kept_bytes": collected.kept_bytes,
        "given_up": fenced,
        "void_records": void,
        "idle_records": idle,
        "not_deleted_because": waits,
        "repacked": repacked,
        "hooks_not_tidied_because": untidied,
    });
    context.answer(&with_requests(&value, remote)?, || {
        let verb = if dry_run { "Would delete" } else { "Deleted" };
        let mut out = String::new();
        let given_up = if dry_run {
            "would be given up"
        } else {
            "given up"
        };
        for session in &fenced {
            out += &format!("  {given_up}, since it was silent: session {session}\n");
        }
        for record in &void {
            out += &format!("  of a push that was given up, and void: {record}\n");
        }
        // Each tag that was ever removed has one, which is no news.
        let told = |(_, stays): &&(_, Stays)| *stays != Stays::Removed;
        for (record, stays) in collected.idle.iter().filter(told) {
            out += &format!("  stays: {}: {}\n", record.key(), stays.why());
        }
        out += &told_of(&repacked, dry_run);
        out + &format!(
            "{verb} {} objects, {}.",
            count((keys.len() + void.len()) as u64),
            size(bytes)
        )
    })?;
    let unfinished = match (done.failed, done.untidied) {
        (Some(error), _) => Some((error, "what was done before it failed is told")),
        (None, Some(error)) => Some((error, "what was done is told, but hooks were not tidied")),
        (None, None) => None,
    };
    if let Some((error, what)) = unfinished {
        say!("{what}; the next `remote gc` does the rest");
        return told(Err(error));
    }
    match waits {
        None if repacked.damaged.is_empty() => Ok(ExitCode::SUCCESS),
        None => {
            let damaged = counted(repacked.damaged.len() as u64, "damaged object");
            Ok(ended(exit::DAMAGED, &format!("{damaged}: not repacked")))
        }
        Some(waits) => {
            let what = match repacked.packs {
                0 => "nothing was deleted",
                _ => "what was repacked is not deleted yet",
            };
            say!("{what}: {waits}; run it again later");
            Ok(ExitCode::from(exit::BUSY))
        }
    }
}

/// What was repacked, for people.
fn told_of(repacked: &Repacked, dry_run: bool) -> String {
    let mut out = String::new();
    for one in &repacked.damaged {
        let tags = one.tags.join(", ");
        out += &format!(
            "  not repacked: {}: {} (needed by {tags})\n",
            one.object, one.problem
        );
    }
    if repacked.packs > 0 {
        let packs = count(repacked.packs);
        let (needed, of) = (size(repacked.needed_bytes), size(repacked.packs_bytes));
        let snapshots = count(repacked.snapshots);
        out += &match dry_run {
            true => format!(
                "Would repack {packs} packs, of which {needed} of {of} are needed, by {snapshots} \
                 snapshots.\n"
            ),
            false => format!(
                "Repacked {packs} packs, of which {needed} of {of} were needed, by {snapshots} \
                 snapshots: read {}, wrote {}.\n",
                size(repacked.read_bytes),
                size(repacked.written_bytes)
            ),
        };
    }
    if repacked.left > 0 {
        let packs = count(repacked.left);
        out += &format!("{packs} packs that are needed in part stay for now.\n");
    }
    out
}
