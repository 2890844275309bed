//! `snapstore forget`

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use serde_json::json;
use snapstore_host::Usage;
use snapstore_store::retention::{Decision, Group, Policy};
use snapstore_store::{Listing, Store};

use crate::args::{ForgetArgs, GroupBy};
use crate::commands::tag::{tell_unreadable, unreadable};
use crate::context::Context;
use crate::form::Fields;
use crate::format::{counted, size, table, time};

const FIELDS: Fields = Fields {
    rows: "tags",
    of_row: &[
        "tag",
        "id",
        "group",
        "created_unix_seconds",
        "keep",
        "reasons",
        "expired",
    ],
    of_answer: &["removed", "frees_at_least_bytes", "unreadable."],
};

pub fn run(context: &Context, args: &ForgetArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let context = &context.stopped_by_signals()?;
    let policy = Policy {
        keep_last: args.keep_last,
        keep_within: args.keep_within,
        keep_tags: args.keep_tags.clone(),
        keep_labels: args.keep_labels.clone(),
        only_expired: args.expired,
    };
    if !policy.has_rules() && !args.expired {
        bail!(Usage(
            "nothing says what to keep; give a --keep option, or --expired to remove only what \
             has expired"
                .to_owned()
        ));
    }
    let group = match &args.group_by {
        GroupBy::None => Group::All,
        GroupBy::Chain => Group::Chain,
        GroupBy::Label(key) => Group::Label(key.clone()),
    };
    let store = context.open()?;
    let listing = store.listing()?;
    let protected = store.protected_tags()?;
    let plan = policy.plan(&listing.snapshots, &protected, &group, SystemTime::now());
    let goes: Vec<_> = plan
        .iter()
        .filter(|decision| decision.reasons.is_empty())
        .map(|decision| (decision.tag.clone(), decision.id))
        .collect();
    let removed = match args.dry_run {
        true => Vec::new(),
        false => store.remove_tags_if(&goes)?,
    };
    let frees = match args.dry_run && !goes.is_empty() {
        true => Some(freed(&store, &goes)?),
        false => None,
    };
    let value = json!({
        "tags": plan.iter().map(value).collect::<Vec<_>>(),
        "removed": removed,
        "frees_at_least_bytes": frees,
        "unreadable": unreadable(&listing.unreadable),
    });
    context.answer(&value, || {
        let mut out = describe(&plan, &group, &listing);
        let kept = plan.len() - goes.len();
        let tags = |number: usize| counted(number as u64, "tag");
        out += &match (args.dry_run, goes.len()) {
            (_, 0) => format!("Nothing to remove; {} kept.\n", tags(kept)),
            (true, count) => format!(
                "Would remove {} and keep {kept}; `gc` could then free at least {}.\n",
                tags(count),
                size(frees.unwrap_or(0))
            ),
            (false, _) => format!(
                "Removed {} and kept {}; `snapstore gc` frees the space.\n",
                tags(removed.len()),
                plan.len() - removed.len()
            ),
        };
        for (tag, _) in goes.iter().filter(|(tag, _)| !removed.contains(tag)) {
            if !args.dry_run {
                out += &format!("{tag} stays: it was moved, removed or protected meanwhile.\n");
            }
        }
        out
    })?;
    Ok(tell_unreadable(&listing.unreadable))
}

/// What only these tags hold: as much as that is free once they are gone.
fn freed(store: &Store, goes: &[(String, snapstore_store::SnapshotId)]) -> anyhow::Result<u64> {
    let stats = store.stats()?;
    let of_these = stats
        .per_snapshot
        .iter()
        .filter(|snapshot| goes.iter().any(|(tag, _)| *tag == snapshot.tag));
    Ok(of_these.map(|it| it.exclusive_stored_bytes).sum())
}

fn value(decision: &Decision) -> serde_json::Value {
    let reasons = decision.reasons.iter().map(ToString::to_string);
    json!({
        "tag": decision.tag,
        "id": decision.id,
        "group": decision.group,
        "created_unix_seconds": decision.created_unix_seconds,
        "keep": !decision.reasons.is_empty(),
        "reasons": reasons.collect::<Vec<_>>(),
        "expired": decision.expired,
    })
}

fn describe(plan: &[Decision], group: &Group, listing: &Listing) -> String {
    if plan.is_empty() && listing.unreadable.is_empty() {
        return String::new();
    }
    let grouped = *group != Group::All;
    let rows: Vec<_> = plan
        .iter()
        .map(|decision| {
            let created = UNIX_EPOCH + Duration::from_secs(decision.created_unix_seconds);
            let reasons: Vec<_> = decision.reasons.iter().map(ToString::to_string).collect();
            let mut row = vec![decision.tag.clone(), time(created)];
            if grouped {
                row.push(decision.group.clone());
            }
            let (what, why) = match (reasons.is_empty(), decision.expired) {
                (false, _) => ("keep", reasons.join(", ")),
                (true, true) => ("remove", "expired".to_owned()),
                (true, false) => ("remove", "no rule keeps it".to_owned()),
            };
            row.extend([what.to_owned(), why]);
            row
        })
        .collect();
    let mut header = vec!["TAG", "COMMITTED (UTC)"];
    if grouped {
        header.push("GROUP");
    }
    header.extend(["DECISION", "WHY"]);
    let columns = header.len();
    table(&header, columns, &rows)
}
