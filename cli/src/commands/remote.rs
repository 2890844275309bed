//! `snapstore remote`, `snapstore push` and `snapstore pull`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;
use snapstore_host::{NotFound, Usage};
use snapstore_remote::{DomainKey, Place, Remote};
use snapstore_store::Store;

use crate::args::{
    AddArgs, PullArgs, PushArgs, RemoteArgs, RemoteCommand, RemoteGcArgs, of_remote,
};
use crate::commands::remote_told::{told, with_requests};
use crate::commands::{each_once, ended, remote_gc};
use crate::context::Context;
use crate::exit;
use crate::form::Fields;
use crate::format::{count, counted, size, table};
use crate::known::{Known, change, check_apart, remotes};
use crate::progress::{Bar, Unit};

const NO_REMOTES: &str = "No remotes yet; `snapstore remote add NAME URL` makes one known.";
/// After so long a silence a push is given up.
const SILENCE: Duration = Duration::from_secs(15 * 60);

pub(super) fn remote(store: &Store, name: &str) -> anyhow::Result<Remote> {
    let known = remotes(store.path())?.remove(name);
    let known = known.ok_or_else(|| unknown(name))?;
    let remote = told(Remote::at(&known.place))?.was_there(known.used);
    Ok(remote.remembered_in(store.path()))
}

fn unknown(name: &str) -> NotFound {
    NotFound(format!(
        "there is no remote {name:?}; `snapstore remote add NAME URL` makes one known"
    ))
}

/// Remembers that a remote was there: if its directory is empty later, nothing is mounted
/// there. A server does not answer then, so nothing has to be known of it.
pub(super) fn remember(store: &Store, name: &str) {
    let is_new = |one: &Known| !one.used && one.place.url.starts_with("file:");
    let remember = || {
        if !remotes(store.path())?.get(name).is_some_and(is_new) {
            return Ok(());
        }
        change(store.path(), |known| {
            let one = known.get_mut(name).filter(|one| is_new(one));
            Ok(one.map(|one| one.used = true).is_some())
        })
    };
    if let Err(error) = remember() {
        tracing::warn!(%error, "that this remote was there is not remembered");
    }
}

fn add(context: &Context, args: &AddArgs) -> anyhow::Result<ExitCode> {
    let name = &args.name;
    let place = place(args)?;
    // First, since the default store may have to be created.
    told(Remote::at(&place))?;
    check_apart(&context.store_path()?, &place.url)?;
    let store = context.open_or_create_default()?;
    let url = place.url.clone();
    change(store.path(), |known| {
        // Another key for the same bucket is the same remote.
        let before = known.get(name).map(|known| &known.place.url);
        if before.is_some_and(|url| *url != place.url) {
            bail!("remote {name:?} is another one; choose another name");
        }
        // It is taken for new, also if it was used: it may be made anew.
        let used = false;
        known.insert(name.clone(), Known { place, used });
        Ok(true)
    })?;
    context.answer(&json!({"name": name, "url": url}), || {
        format!("{name} is {url}; `snapstore remote init {name}` makes a new bucket a remote.")
    })?;
    Ok(ExitCode::SUCCESS)
}

fn forget(context: &Context, store: &Store, name: &str) -> anyhow::Result<ExitCode> {
    let mut url = None;
    change(store.path(), |known| {
        url = known.remove(name).map(|known| known.place.url);
        Ok(url.is_some())
    })?;
    let url = url.ok_or_else(|| unknown(name))?;
    context.answer(&json!({"name": name, "url": url}), || {
        format!("{name} is forgotten; {url} is as it was.")
    })?;
    Ok(ExitCode::SUCCESS)
}

fn place(args: &AddArgs) -> anyhow::Result<Place> {
    let absolute = |path: &Option<PathBuf>| {
        let path = path.as_ref().map(|path| {
            std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))
        });
        path.transpose()
    };
    Ok(Place {
        url: args.url.clone(),
        endpoint: args.endpoint.clone(),
        region: args.region.clone(),
        allow_http: args.allow_http,
        credentials: absolute(&args.credentials)?,
        machine_role: args.machine_role,
        key: absolute(&args.key)?,
        retry_seconds: args.retry_seconds,
    })
}

/// Of `remote list`.
const REMOTES: Fields = Fields {
    rows: "remotes",
    of_row: &["name", "url", "key"],
    of_answer: &[],
};

/// Of `remote tags`.
const TAGS: Fields = Fields {
    rows: "tags",
    of_row: &["tag", "id", "problem", "damaged"],
    of_answer: &[],
};

/// Of `remote leases`.
const LEASES: Fields = Fields {
    rows: "leases",
    of_row: &["session", "kind", "who", "last_seen", "problem"],
    of_answer: &[],
};

pub fn run(context: &Context, args: &RemoteArgs) -> anyhow::Result<ExitCode> {
    // What is wrong with the words is told before a store is opened, or created.
    let context = &match &args.command {
        RemoteCommand::Key { file } => return key(context, file),
        RemoteCommand::Add(args) => return add(context, args),
        RemoteCommand::List { form } => context.listing(form, &REMOTES)?,
        RemoteCommand::Tags { form, .. } => context.listing(form, &TAGS)?,
        RemoteCommand::Leases { form, .. } => context.listing(form, &LEASES)?,
        RemoteCommand::Rm { tags, .. } => {
            each_once(tags)?;
            context.clone()
        }
        _ => context.clone(),
    };
    let store = context.open_or_create_default()?;
    let code = on_store(context, &store, &args.command)?;
    match &args.command {
        RemoteCommand::Init { name }
        | RemoteCommand::Tags { name, .. }
        | RemoteCommand::Rm { name, .. }
        | RemoteCommand::Gc(RemoteGcArgs { name, .. })
        | RemoteCommand::Verify { name, .. }
        | RemoteCommand::Accept { name, .. }
        | RemoteCommand::Leases { name, .. } => remember(&store, name),
        RemoteCommand::Key { .. }
        | RemoteCommand::Add(_)
        | RemoteCommand::Forget { .. }
        | RemoteCommand::List { .. }
        | RemoteCommand::Check { .. } => {}
    }
    Ok(code)
}

fn on_store(context: &Context, store: &Store, command: &RemoteCommand) -> anyhow::Result<ExitCode> {
    match command {
        RemoteCommand::Key { .. } | RemoteCommand::Add(_) => {}
        RemoteCommand::Forget { name } => return forget(context, store, name),
        RemoteCommand::List { .. } => {
            let known = remotes(store.path())?;
            let urls = known.iter();
            // The key's file, of those that are encrypted.
            let urls = urls.map(|(name, one)| match &one.place.key {
                None => json!({"name": name, "url": one.place.url}),
                Some(key) => json!({"name": name, "url": one.place.url, "key": key}),
            });
            let value = json!({"remotes": urls.collect::<Vec<_>>()});
            context.answer(&value, || {
                if known.is_empty() {
                    return NO_REMOTES.to_owned();
                }
                let rows: Vec<_> = known
                    .iter()
                    .map(|(name, one)| {
                        let key = one.place.key.as_ref();
                        let key = key.map(|key| format!("encrypted, by {}", key.display()));
                        let url = one.place.url.clone();
                        vec![name.clone(), url, key.unwrap_or_default()]
                    })
                    .collect();
                table(&["NAME", "URL", ""], 3, &rows)
            })?;
        }
        RemoteCommand::Init { name } => {
            let remote = remote(store, name)?;
            check_apart(store.path(), remote.url())?;
            let bytes = store.page_size().bytes();
            told(remote.init(u32::try_from(bytes)?))?;
            let encrypted = remote.is_encrypted();
            let value = json!({"remote": name, "page_bytes": bytes, "encrypted": encrypted});
            let what = if encrypted { "an encrypted" } else { "a" };
            context.answer(&value, || format!("{} is {what} remote now.", remote.url()))?;
        }
        RemoteCommand::Check { name } => {
            let remote = remote(store, name)?;
            told(remote.check())?;
            context.answer(&json!({"remote": name, "fit": true}), || {
                format!("{} kept all that was asked of it.", remote.url())
            })?;
        }
        RemoteCommand::Tags { name, .. } => return tags(context, &remote(store, name)?),
        RemoteCommand::Rm { name, tags } => {
            return rm(context, &remote(store, name)?, name, tags);
        }
        RemoteCommand::Accept { name, tag } => {
            return accept(context, &remote(store, name)?, name, tag);
        }
        RemoteCommand::Gc(args) => {
            let remote = remote(store, &args.name)?.patience(SILENCE, !args.no_wait);
            return remote_gc::run(context, &remote, args);
        }
        RemoteCommand::Verify { name, read_data } => {
            return verify(context, &remote(store, name)?, *read_data);
        }
        RemoteCommand::Leases { name, .. } => return leases(context, &remote(store, name)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn key(context: &Context, file: &Path) -> anyhow::Result<ExitCode> {
    told(DomainKey::make(file))?;
    let shown = file.display();
    context.answer(&json!({"key": file}), || {
        format!(
            "Made the key {shown}. Keep a copy of it elsewhere: without it, what is encrypted \
             with it is lost."
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn rm(context: &Context, remote: &Remote, name: &str, tags: &[String]) -> anyhow::Result<ExitCode> {
    let (removed, result) = remote.remove_all(tags);
    // What was removed is the answer, also where a later one failed.
    if !removed.is_empty() {
        context.answer(&json!({"removed": removed}), || {
            format!(
                "Removed {}; `snapstore remote gc {name}` frees the space.",
                removed.join(", ")
            )
        })?;
    }
    told(result)?;
    Ok(ExitCode::SUCCESS)
}

fn accept(context: &Context, remote: &Remote, name: &str, tag: &str) -> anyhow::Result<ExitCode> {
    let accepted = told(remote.accept_older(tag))?;
    let (shown, seen) = accepted.unzip();
    let value = json!({"remote": name, "tag": tag, "accepted": shown, "seen": seen});
    context.answer(&value, || match accepted {
        None => format!("{name} shows no older record of {tag} than was seen."),
        Some((0, _)) => {
            format!("That {name} has no {tag} any more is taken for right from now on.")
        }
        Some((shown, seen)) => format!(
            "Record {shown} of {tag}, not {seen}, is taken for right from now on; `snapstore push \
             {tag} {name} --replace` writes one that is newer than both, for other stores, too."
        ),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Of so many that are damaged.
fn of_findings(number: usize, what: &str) -> ExitCode {
    match number {
        0 => ExitCode::SUCCESS,
        _ => ended(exit::DAMAGED, &counted(number as u64, what)),
    }
}

fn tags(context: &Context, remote: &Remote) -> anyhow::Result<ExitCode> {
    let tags = told(remote.tags())?;
    context.answer(&json!({"tags": tags}), || {
        if tags.is_empty() {
            return "No tags there yet; `snapstore push TAG NAME` makes one.".to_owned();
        }
        let rows: Vec<_> = tags
            .iter()
            .map(|one| {
                let id = one.id.get(..12).unwrap_or_default().to_owned();
                vec![one.tag.clone(), id, one.problem.clone().unwrap_or_default()]
            })
            .collect();
        table(&["TAG", "ID", ""], 3, &rows)
    })?;
    let damaged = tags.iter().filter(|one| one.damaged).count();
    Ok(of_findings(damaged, "damaged tag"))
}

fn leases(context: &Context, remote: &Remote) -> anyhow::Result<ExitCode> {
    let leases = told(remote.leases())?;
    context.answer(&json!({"leases": leases}), || {
        if leases.is_empty() {
            return "Nobody works on it.".to_owned();
        }
        let rows: Vec<_> = leases
            .iter()
            .map(|one| {
                let what = one.problem.clone().unwrap_or_else(|| one.who.clone());
                vec![one.session.clone(), one.kind.to_owned(), what]
            })
            .collect();
        table(&["SESSION", "WORK", "WHO"], 3, &rows)
    })?;
    let damaged = leases.iter().filter(|one| one.problem.is_some()).count();
    Ok(of_findings(damaged, "damaged lease"))
}

fn verify(context: &Context, remote: &Remote, read_data: bool) -> anyhow::Result<ExitCode> {
    let report = told(remote.verify(read_data))?;
    context.answer(&report, || {
        let mut out = String::new();
        for one in &report.findings {
            let needed = match one.tags.is_empty() {
                true => String::new(),
                false => format!(" (needed by {})", one.tags.join(", ")),
            };
            out += &format!("  {}: {}{needed}\n", one.object, one.problem);
        }
        for one in &report.notes {
            out += &format!("  not damage: {}: {}\n", one.object, one.problem);
        }
        out + &format!(
            "Checked {} snapshots in {} packs: {} findings.",
            count(report.records),
            count(report.packs),
            count(report.findings.len() as u64)
        )
    })?;
    Ok(of_findings(report.findings.len(), "finding"))
}

/// The tag under which a snapshot goes there: the one that was given, or of the snapshot's the
/// one that it was first committed under, or else the first.
fn tag_of(store: &Store, name: &str) -> anyhow::Result<String> {
    let id = store.resolve(name)?;
    if store.tag(name)?.is_some() {
        return Ok(name.to_owned());
    }
    let mut tags = store.tags_of(id)?;
    let first = store.manifest(id)?.first_tag;
    let at = tags.iter().position(|tag| *tag == first).unwrap_or(0);
    match tags.is_empty() {
        false => Ok(tags.swap_remove(at)),
        true => bail!(NotFound(format!(
            "snapshot {} has no tag, and a snapshot is pushed under its tag; `snapstore tag {} \
             TAG` gives it one",
            id.short(),
            id.short()
        ))),
    }
}

pub fn push(context: &Context, args: &PushArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let remote = remote(&store, &args.remote)?;
    let tag = tag_of(&store, &args.tag)?;
    let bar = Bar::new(Unit::Bytes);
    let report = told(remote.push(&store, &args.tag, &tag, args.replace, &bar))?;
    remember(&store, &args.remote);
    context.answer(&with_requests(&report, &remote)?, || {
        let id = report.id.get(..12).unwrap_or_default();
        match report.already {
            true if report.working_set_pages > 0 => format!(
                "{tag} names {id} there already; {} pages that are touched first were added.",
                count(report.working_set_pages),
            ),
            true => format!("{tag} names {id} there already."),
            false => format!(
                "Pushed {tag} {id} to {}: {} pages, {}; {} pages of its changed leaves{} and {} \
                 leaves were there.",
                args.remote,
                count(report.pages),
                size(report.bytes),
                count(report.reused_pages),
                match report.found_pages {
                    0 => String::new(),
                    found => format!(" ({} of them of other snapshots)", count(found)),
                },
                count(report.reused_leaves),
            ),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

pub fn pull(context: &Context, args: &PullArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let Some((name, tag)) = &of_remote(&args.from)? else {
        bail!(Usage(format!("{:?} is not REMOTE/TAG", args.from)));
    };
    let store = context.open_or_create_default()?;
    let remote = remote(&store, name)?;
    let as_tag = args.as_tag.as_deref().unwrap_or(tag);
    let bar = Bar::new(Unit::Bytes);
    let pulled = told(remote.pull(&store, tag, as_tag, args.replace, &bar))?;
    remember(&store, name);
    context.answer(&with_requests(&pulled, &remote)?, || {
        format!(
            "Pulled {} {}: {} pages, {}.",
            pulled.tag,
            pulled.id.get(..12).unwrap_or_default(),
            count(pulled.pages),
            size(pulled.bytes),
        )
    })?;
    store.tidy_index();
    Ok(ExitCode::SUCCESS)
}
