//! `snapstore umount`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use snapstore_fuse::{Mountpoint, ViewClient};
use snapstore_host::look;
use snapstore_host::mount_server::Writing;

use crate::args::UmountArgs;
use crate::context::Context;
use crate::format::size;

pub fn run(context: &Context, args: &UmountArgs) -> anyhow::Result<ExitCode> {
    let (view, uncommitted, silent) = match prepare(args)? {
        Server::Told(view, uncommitted) => (Some(view), uncommitted, false),
        Server::Silent => (None, None, true),
        Server::Indifferent => (None, None, false),
    };
    let undone = snapstore_fuse::unmount(&args.dir, args.lazy, &look::is_dead);
    match (view, &undone) {
        // It goes on, and is not given up by whoever ends it.
        (Some(mut view), Err(_)) => view.at_end(true)?,
        (Some(view), Ok(())) if !args.lazy => {
            view.wait_for_end(PATIENCE);
        }
        _ => {}
    }
    undone?;
    let dir = args.dir.display().to_string();
    let bytes = uncommitted.as_ref().map(|it| it.bytes);
    let kept = uncommitted.as_ref().filter(|_| args.keep);
    let place = kept.map(|it| it.place.display().to_string());
    let again = kept.map(|it| resume(args, Some(&it.place)));
    let value = json!({
        "dir": dir, "unmounted": true, "uncommitted_bytes": bytes, "kept": place,
    });
    context.answer(&value, || match (&uncommitted, &place) {
        (None, _) if silent => format!(
            "Unmounted {dir}. Its server did not answer: what was written and not committed, \
             if there is anything, is kept, and `{}` goes on with it when the server has ended.",
            resume(args, None)
        ),
        (None, _) => format!("Unmounted {dir}."),
        (Some(lost), None) => format!(
            "Unmounted {dir}. What was written and not committed is given up: {} of images, \
             and files that were made there. (--keep keeps it.)",
            size(lost.bytes)
        ),
        (Some(_), Some(place)) => format!(
            "Unmounted {dir}. What was not committed is kept in {place}; `{}` goes on with it.",
            again.unwrap_or_default()
        ),
    })?;
    Ok(ExitCode::SUCCESS)
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
    bytes: u64,
    place: PathBuf,
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
    let status = view.status()?;
    view.at_end(args.keep)?;
    let any = status.clones.iter().any(|clone| clone.is_uncommitted);
    let bytes = status.clones.iter().map(|clone| clone.uncommitted_bytes);
    let uncommitted = any.then(|| Uncommitted {
        bytes: bytes.sum(),
        place: status.overlays,
    });
    Ok(Server::Told(view, uncommitted))
}
