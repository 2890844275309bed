//! `snapstore commit`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use serde_json::json;
use snapstore_store::{
    CommitRequest, CommitTimings, Committed, Error, ImageRole, Input, InputData, InputKind,
    ParentChoice, Store,
};

use crate::args::CommitArgs;
use crate::commands::commit_vm;
use crate::context::Context;
use crate::exit::Usage;
use crate::format::{count, size};
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &CommitArgs) -> anyhow::Result<ExitCode> {
    if let Some(name) = &args.vm {
        return commit_vm::run(context, args, name);
    }
    let request = request(args)?;
    if request.inputs.is_empty() {
        bail!(Usage(
            "there is nothing to commit; name a file with --memory, --disk or --vmstate, \
             or a machine with --vm"
                .to_owned()
        ));
    }
    let store = context.open_or_create_default()?;
    let committed = store.commit(&request, &Bar::new(Unit::Bytes))?;
    let parent = parent_name(&store, &committed)?;
    let value = json!({
        "tag": args.tag,
        "id": committed.id,
        "parent": committed.manifest.parent,
        "parent_tag": parent,
        "images": committed.manifest.images,
        "added_chunks": committed.manifest.added_chunks,
        "added_bytes": committed.manifest.added_bytes,
        "timings": timings(&committed.timings),
    });
    context.answer(&value, || {
        describe(&args.tag, &committed, parent.as_deref())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn request(args: &CommitArgs) -> anyhow::Result<CommitRequest> {
    let kind = if args.diff {
        InputKind::Diff
    } else {
        InputKind::Full
    };
    let input = |name: &str, role, path: &Path, kind| Input {
        name: name.to_owned(),
        role,
        data: InputData::File(path.to_owned()),
        kind,
    };
    let mut inputs = Vec::new();
    if let Some(path) = &args.memory {
        inputs.push(input("memory", ImageRole::Memory, path, kind));
    }
    for (name, path) in &args.disks {
        inputs.push(input(name, ImageRole::Disk, &PathBuf::from(path), kind));
    }
    if let Some(path) = &args.vmstate {
        inputs.push(input("vmstate", ImageRole::File, path, InputKind::Full));
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
        labels: labels(args)?,
        keep: false,
    })
}

fn timings(timings: &CommitTimings) -> serde_json::Value {
    json!({
        "prepare_seconds": timings.prepare.as_secs_f64(),
        "pages_seconds": timings.pages.as_secs_f64(),
        "seal_seconds": timings.seal.as_secs_f64(),
        "publish_seconds": timings.publish.as_secs_f64(),
        "total_seconds": timings.total().as_secs_f64(),
    })
}

/// The labels of the request.
pub fn labels(args: &CommitArgs) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for (key, value) in &args.labels {
        if labels.insert(key.clone(), value.clone()).is_some() {
            return Err(Error::DuplicateName { name: key.clone() }.into());
        }
    }
    Ok(labels)
}

/// A tag of the parent, or the beginning of its id.
pub fn parent_name(store: &Store, committed: &Committed) -> anyhow::Result<Option<String>> {
    let Some(parent) = committed.manifest.parent else {
        return Ok(None);
    };
    let tag = store.tags()?.into_iter().find(|(_, id)| *id == parent);
    Ok(Some(tag.map_or_else(|| parent.short(), |(tag, _)| tag)))
}

pub fn describe(tag: &str, committed: &Committed, parent: Option<&str>) -> String {
    let manifest = &committed.manifest;
    let mut out = format!(
        "{tag} {}{}\n",
        committed.id.short(),
        parent.map_or_else(String::new, |parent| format!(", made from {parent}"))
    );
    for image in &manifest.images {
        out += &format!(
            "  {:<12} {:>9}, {} pages in use, {} changed\n",
            image.file_name(),
            size(image.size_bytes),
            count(image.nonzero_pages),
            count(image.changed_pages),
        );
    }
    out + &format!(
        "  stored {} new chunks in {}\n",
        count(manifest.added_chunks),
        size(manifest.added_bytes)
    )
}
