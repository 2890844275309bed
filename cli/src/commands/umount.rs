//! `snapstore umount`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use snapstore_fuse::{Kept, Mountpoint, ViewClient};
use snapstore_host::look;
use snapstore_host::mount_server::Writing;

use crate::args::UmountArgs;
use crate::context::Context;
use crate::exit;
use crate::format::size;
use crate::logging::say;

pub fn run(context: &Context, args: &UmountArgs) -> anyhow::Result<ExitCode> {
    let (view, uncommitted, silent) = match prepare(args)? {
        Server::Told(view, uncommitted) => (Some(view), uncommitted, false),
        Server::Silent => (None, None, true),
        Server::Indifferent => (None, None, false),
    };
    let (mut view, mut unsynced) = (view, None);
    if args.keep
        && let Some(view) = &mut view
    {
        // While it is mounted, so that a disk that is slow is waited for, and one that fails
        // says why. The server has the rest on the disk at its end.
        unsynced = view.sync().err().map(|error| error.to_string());
    }
    let undone = snapstore_fuse::unmount(&args.dir, args.lazy, &look::is_dead);
    match (view, undone) {
        (None, undone) => undone?,
        // It goes on, and is not given up by whoever ends it.
        (Some(mut view), Err(error)) => {
            view.at_end(true)?;
            return Err(error.into());
        }
        (Some(view), Ok(())) if !args.lazy => {
            view.wait_for_end(PATIENCE);
        }
        (Some(_), Ok(())) => {}
    }
    let dir = args.dir.display().to_string();
    let bytes = uncommitted.as_ref().map(|it| it.bytes);
    let kept = match &uncommitted {
        Some(it) if args.keep => Some((it, kept(args, it, unsynced))),
        _ => None,
    };
    let place = kept.as_ref().map(|(it, _)| it.place.display().to_string());
    let on_disk = kept
        .as_ref()
        .map(|(_, found)| matches!(found, Found::OnDisk));
    let value = json!({
        "dir": dir, "unmounted": true, "uncommitted_bytes": bytes, "kept": place,
        "on_disk": on_disk,
    });
    context.answer(&value, || match (&uncommitted, &kept) {
        (None, _) if silent => format!(
            "Unmounted {dir}. Its server did not answer: what was written and not committed, \
             if there is anything, is kept, and `{}` goes on with it when the server has ended.",
            resume(args, None)
        ),
        (None, _) => format!("Unmounted {dir}."),
        (Some(lost), None) => format!(
            "Unmounted {dir}. What was written and not committed is given up: {}. (--keep keeps \
             it.)",
            lost.told()
        ),
        (Some(it), Some((_, Found::OnDisk))) => format!(
            "Unmounted {dir}. What was not committed is kept in {}, on the disk; `{}` goes on \
             with it.",
            it.place.display(),
            resume(args, Some(&it.place))
        ),
        (Some(it), Some((_, Found::Later))) => format!(
            "Unmounted {dir}. What is not committed is kept in {} when the last process that uses \
             it has ended; `{}` then goes on with it.",
            it.place.display(),
            resume(args, Some(&it.place))
        ),
        (Some(it), Some((_, Found::Unconfirmed(_)))) => format!(
            "Unmounted {dir}. What was not committed is left in {}.",
            it.place.display()
        ),
    })?;
    let Some((it, Found::Unconfirmed(why))) = kept else {
        return Ok(ExitCode::SUCCESS);
    };
    say!(
        "error: what was not committed is not known to be on the disk ({why}): it may be lost if \
         this host goes down; `{}` goes on with what is there",
        resume(args, Some(&it.place))
    );
    Ok(ExitCode::from(exit::FAILED))
}

/// What there is of what was to be kept.
enum Found {
    /// All of it, and on the disk.
    OnDisk,
    /// Its server ends later.
    Later,
    /// It is not known to be on the disk, for a reason.
    Unconfirmed(String),
}

/// What the server has left, which has ended or has had its time; `unsynced` is why it could not
/// have it on the disk before that.
fn kept(args: &UmountArgs, uncommitted: &Uncommitted, unsynced: Option<String>) -> Found {
    let found = snapstore_fuse::is_kept(&uncommitted.place);
    match (found, unsynced) {
        (Ok(Kept::OnDisk), None) => Found::OnDisk,
        (_, Some(why)) => Found::Unconfirmed(why),
        (Err(error), None) => Found::Unconfirmed(error.to_string()),
        (Ok(_), None) if args.lazy => Found::Later,
        (Ok(_), None) => Found::Unconfirmed(
            "its server has not said so; its log, mounts.log in the store, may tell why".to_owned(),
        ),
    }
}

/// The command that goes on with what is kept, in `place` if that is known.
fn resume(args: &UmountArgs, place: Option<&Path>) -> String {
    let overlays = place
        .and_then(Path::parent)
        .filter(|it| *it != Path::new(Writing::OVERLAY_DIR));
    let overlays = overlays.map(|it| format!(" --overlay-dir {}", it.display()));
    let dir = std::path::absolute(&args.dir).unwrap_or_else(|_| args.dir.clone());
    format!(
        "snapstore mount --rw{} --resume {}",
        overlays.unwrap_or_default(),
        dir.display()
    )
}

/// How long the server of a view may take to remove what it kept.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is in no commit.
struct Uncommitted {
    /// Of images.
    bytes: u64,
    files: bool,
    place: PathBuf,
}

impl Uncommitted {
    fn told(&self) -> String {
        let bytes = size(self.bytes);
        match (self.bytes, self.files) {
            (0, true) => "files that were written, made, renamed or removed there".to_owned(),
            (_, true) => format!(
                "{bytes} of images, and files that were written, made, renamed or removed there"
            ),
            (_, false) => format!("{bytes} of images"),
        }
    }
}

/// What the server of a mount has been told of what is in no commit.
enum Server {
    /// Nothing: it has no such thing.
    Indifferent,
    /// Nothing: it does not answer, so it keeps all there is.
    Silent,
    /// What becomes of this.
    Told(ViewClient, Option<Uncommitted>),
}

/// Tells the server of a writable mount what becomes of what is in no commit.
fn prepare(args: &UmountArgs) -> anyhow::Result<Server> {
    // Nobody looks at any other mount: one who waits for its server keeps it in use.
    if !Mountpoint::at(&args.dir)?.is_some_and(|it| it.is_writable) {
        return Ok(Server::Indifferent);
    }
    match look::state(&args.dir) {
        look::State::Serves => {}
        look::State::Dead => return Ok(Server::Indifferent),
        look::State::Silent => return Ok(Server::Silent),
    }
    let Ok(mut view) = ViewClient::connect(&args.dir) else {
        return Ok(Server::Indifferent);
    };
    // What was stored through mappings that are still there (`--lazy`) is not with the server
    // yet. What cannot be given to it is found out by whoever has it on the disk.
    if let Err(error) = view.write_out() {
        tracing::debug!(%error, "what is mapped is not written out");
    }
    let status = view.status()?;
    view.at_end(args.keep)?;
    let any = status.clones.iter().any(|clone| clone.is_uncommitted);
    let bytes = status.clones.iter().map(|clone| clone.uncommitted_bytes);
    let uncommitted = any.then(|| Uncommitted {
        bytes: bytes.sum(),
        files: status.clones.iter().any(|it| it.has_uncommitted_files),
        place: status.overlays,
    });
    Ok(Server::Told(view, uncommitted))
}
