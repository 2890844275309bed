//! What ended processes left: machines that ended badly, mounts without a server, views that
//! were written to.

use std::path::{Path, PathBuf};

use snapstore_fuse::Mountpoint;

use super::check::Check;
use crate::look::{self, State};
use crate::mount_server::Writing;
use crate::runtime::{Runtime, VmDir, forget, runtime_dir};

pub(super) fn checks() -> Vec<Check> {
    vec![machines(), mounts(), views()]
}

/// Machines that have ended badly, whose directories say why. `None` if there has never
/// been a machine of this user.
fn ended() -> Option<anyhow::Result<Vec<VmDir>>> {
    // Not made by looking.
    if !runtime_dir().exists() {
        return None;
    }
    let all = Runtime::open().and_then(|runtime| runtime.vms());
    Some(all.map(|all| {
        all.into_iter()
            .filter(|vm| !vm.is_running() && !vm.is_reserved())
            .collect()
    }))
}

fn machines() -> Check {
    const NAME: &str = "ended_machines";
    match ended() {
        None => Check::ok(NAME, "none"),
        Some(Ok(ended)) if ended.is_empty() => Check::ok(NAME, "none"),
        Some(Ok(ended)) => {
            let said = ended.iter().map(|vm| match vm.ending() {
                Some(why) => format!("{} ({why})", vm.name),
                None => vm.name.clone(),
            });
            Check::warning(
                NAME,
                said.collect::<Vec<_>>().join(", "),
                "they only take a little room, and say in `ps` why they ended",
                "`snapstore doctor --fix`, or `snapstore stop NAME`",
            )
        }
        Some(Err(error)) => Check::error(
            NAME,
            format!("{error:#}"),
            "machines cannot be started or found",
            "",
        ),
    }
}

/// Mounts of this user whose servers are gone or do not answer.
fn broken() -> anyhow::Result<Vec<(PathBuf, State)>> {
    let user = rustix::process::geteuid().as_raw();
    let mut broken = Vec::new();
    for mount in Mountpoint::all()?.into_iter().filter(|it| it.user == user) {
        match look::state(&mount.dir) {
            State::Serves => {}
            state => broken.push((mount.dir, state)),
        }
    }
    Ok(broken)
}

fn mounts() -> Check {
    const NAME: &str = "mounts";
    let broken = match broken() {
        Ok(broken) => broken,
        Err(error) => {
            return Check::error(NAME, format!("{error:#}"), "mounts cannot be listed", "");
        }
    };
    if broken.is_empty() {
        return Check::ok(NAME, "each that is there answers");
    }
    let said = broken.iter().map(|(dir, state)| match state {
        State::Dead => format!("{} has lost its server", dir.display()),
        _ => format!("{} does not answer", dir.display()),
    });
    Check::warning(
        NAME,
        said.collect::<Vec<_>>().join(", "),
        "who reads there gets an error, or waits",
        "`snapstore doctor --fix` undoes those without a server; `snapstore umount --lazy DIR` \
         any",
    )
}

/// Writable views whose servers have ended, where they are kept unless somebody wants it
/// otherwise. They are their user's work: nothing here removes one.
fn views() -> Check {
    const NAME: &str = "kept_views";
    let views = match snapstore_fuse::kept_views(Path::new(Writing::OVERLAY_DIR)) {
        Ok(views) => views,
        Err(error) => {
            let found = error.to_string();
            return Check::error(NAME, found, "kept views cannot be listed", "");
        }
    };
    if views.is_empty() {
        return Check::ok(NAME, format!("none in {}", Writing::OVERLAY_DIR));
    }
    let said = views.iter().map(|view| {
        format!(
            "{} of {} ({} KiB in {})",
            view.dir.display(),
            view.store.display(),
            view.disk_bytes >> 10,
            view.place.display()
        )
    });
    Check::warning(
        NAME,
        said.collect::<Vec<_>>().join(", "),
        "what was written there is in no commit, and takes room",
        "`snapstore mount --rw --resume DIR` goes on with one; removing its directory gives it up",
    )
}

/// Clears away what ended processes left: machines that ended badly, with what they said,
/// and mounts whose servers are gone. What runs, and what only does not answer, stays.
/// Returns what was done.
///
/// # Errors
/// The first that could not be cleared away.
pub fn mend() -> anyhow::Result<Vec<String>> {
    let mut done = Vec::new();
    if let Some(ended) = ended() {
        for vm in ended? {
            forget(&vm)?;
            done.push(format!("forgot the machine {}", vm.name));
        }
    }
    for (dir, state) in broken()? {
        if state == State::Dead {
            snapstore_fuse::unmount(&dir, true, &look::is_dead)?;
            done.push(format!("unmounted {}", dir.display()));
        }
    }
    Ok(done)
}
