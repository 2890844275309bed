//! `snapstore commit`

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::bail;
use serde_json::json;
use snapstore_host::{Usage, monitor, views};
use snapstore_store::retention::EXPIRES;
use snapstore_store::{
    CommitRequest, Error, ImageRole, Input, InputData, InputKind, MAX_IMAGES, ParentChoice,
};

use crate::args::CommitArgs;
use crate::committed::{Told, timings};
use crate::context::Context;
use crate::progress::{Bar, Unit};

/// The last second of the year 9999 since 1970: times are written with four digits of a year.
const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

pub fn run(context: &Context, args: &CommitArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let mut request = request(args)?;
    let named = args.pid.is_some() || args.mount.is_some();
    if request.inputs.is_empty() && !named {
        bail!(Usage(
            "there is nothing to commit; name a file with --memory, --disk, --vmstate or --file, \
             a machine with --vm, a writable mount with --mount, one of another monitor with \
             --qmp, --firecracker or --cloud-hypervisor, or its process with --pid"
                .to_owned()
        ));
    }
    // First, since the default store may have to be created.
    if request.inputs.len() > MAX_IMAGES {
        bail!(Usage(format!(
            "{} images and files are given, and a snapshot has at most {MAX_IMAGES}",
            request.inputs.len()
        )));
    }
    request.check()?;
    let store = match named {
        // What it was mounted from is there.
        true => context.open()?,
        false => context.open_or_create_default()?,
    };
    if let Some(pid) = args.pid {
        store.check_tag_free(&args.tag, args.replace)?;
        let memory = monitor::memory_of(&store, pid)?;
        request.parent = ParentChoice::Pinned(memory.parent);
        request.inputs.insert(0, memory.input);
    }
    let bar = Bar::new(Unit::Bytes);
    let (committed, notes) = match &args.mount {
        None => (store.commit(&request, &bar)?, Vec::new()),
        Some(dir) => {
            let done = views::commit(&store, dir, request, &bar)?;
            (done.committed, done.notes)
        }
    };
    let told = Told {
        tag: &args.tag,
        parent: args.parent.as_deref(),
        remarks: &notes,
        timings: timings(&committed.timings),
        more: json!({}),
        more_text: String::new(),
    };
    told.answer(context, &store, &committed)?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}

fn request(args: &CommitArgs) -> anyhow::Result<CommitRequest> {
    check_diffs(args)?;
    let diff = if args.dense_diff {
        InputKind::DenseDiff
    } else {
        InputKind::Diff
    };
    let input = |name: &str, role, path: &Path, kind| Input {
        name: name.to_owned(),
        role,
        data: InputData::File(path.to_owned()),
        kind,
    };
    let mut inputs = Vec::new();
    if let Some(path) = &args.memory {
        let kind = if args.diff { diff } else { InputKind::Full };
        inputs.push(input("memory", ImageRole::Memory, path, kind));
    }
    if let Some(path) = &args.memory_diff {
        inputs.push(input("memory", ImageRole::Memory, path, diff));
    }
    for (name, path) in &args.disks {
        inputs.push(input(name, ImageRole::Disk, path, InputKind::Full));
    }
    for (name, path) in &args.disk_diffs {
        inputs.push(input(name, ImageRole::Disk, path, diff));
    }
    if let Some(path) = &args.vmstate {
        inputs.push(input("vmstate", ImageRole::File, path, InputKind::Full));
    }
    for (name, path) in &args.files {
        inputs.push(input(name, ImageRole::File, path, InputKind::Full));
    }
    let parent = match &args.parent {
        Some(name) => ParentChoice::Named(name.clone()),
        None if args.no_parent => ParentChoice::Nothing,
        None => ParentChoice::Automatic,
    };
    Ok(CommitRequest {
        tag: args.tag.clone(),
        replace: args.replace,
        parent,
        inputs,
        inherit: args.inherit || args.diff,
        labels: labels(args)?,
        ..CommitRequest::default()
    })
}

/// Refuses options that would mean something else than they seem to.
fn check_diffs(args: &CommitArgs) -> anyhow::Result<()> {
    if args.diff && !args.disks.is_empty() {
        bail!(Usage(
            "--diff says that the memory is a diff; of a --disk it does not say whether its holes \
             are zeros or the parent's bytes: use --memory-diff for the memory, and --disk for a \
             whole disk or --disk-diff for its changes"
                .to_owned()
        ));
    }
    let diffs = args.diff || args.memory_diff.is_some() || !args.disk_diffs.is_empty();
    if args.dense_diff && !diffs {
        bail!(Usage(
            "--dense-diff is about diffs, and none is given; name one with --memory-diff or \
             --disk-diff"
                .to_owned()
        ));
    }
    Ok(())
}

/// When a time from `now` on is over, as a label says it.
fn end_of(span: Duration, now: SystemTime) -> Result<String, Usage> {
    let when = now.checked_add(span);
    let when = when.filter(|when| *when <= SystemTime::UNIX_EPOCH + LAST_SECOND);
    let when = when.ok_or_else(|| {
        Usage(
            "--expires ends after the year 9999; see whether this host's clock is right".to_owned(),
        )
    })?;
    Ok(humantime::format_rfc3339_seconds(when).to_string())
}

/// The labels of the request.
pub fn labels(args: &CommitArgs) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for (key, value) in &args.labels {
        if labels.insert(key.clone(), value.clone()).is_some() {
            return Err(Error::DuplicateName { name: key.clone() }.into());
        }
    }
    if let Some(span) = args.expires {
        let when = end_of(span, SystemTime::now())?;
        if labels.insert(EXPIRES.to_owned(), when).is_some() {
            bail!(Usage(format!(
                "--expires and --label {EXPIRES}= say the same; give one of them"
            )));
        }
    }
    if let Some(text) = labels.get(EXPIRES)
        && humantime::parse_rfc3339(text).is_err()
    {
        bail!(Usage(format!(
            "{EXPIRES}={text} is not a time in UTC such as 2027-01-31T00:00:00Z"
        )));
    }
    Ok(labels)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_far_in_the_future_is_told() {
        let year = Duration::from_secs(365 * 86400);
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(end_of(year, at(0)).unwrap(), "1971-01-01T00:00:00Z");
        assert!(end_of(year, at(253_402_300_000)).is_err());
        assert!(end_of(Duration::MAX, at(0)).is_err());
    }
}
