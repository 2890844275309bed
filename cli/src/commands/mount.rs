//! `snapstore mount`: in the foreground, or in a process that is forked off and stays once
//! the mount is usable.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::json;
use snapstore_fuse::{
    Ended, Layout, MountOptions, MountTarget, Part, Surroundings, Undo, WritableOptions, mount,
    mount_writable,
};
use snapstore_host::monitors::{self, Kind};
use snapstore_host::mount_server::{Announcement, Reading, RemoteReading, Writing, fork, log_path};
use snapstore_host::mounts::lock_dir;
use snapstore_host::{ChildFailure, Usage, look, runtime};
use snapstore_remote::Lazy;
use snapstore_store::Store;
use snapstore_vmm::confine::forbid_for_server;

use crate::args::MountArgs;
use crate::bounded_log::Sink;
use crate::commands::lazy::{self, RemoteTagName};
use crate::context::Context;
use crate::exit;
use crate::logging::{self, say};

/// What is to be shown.
enum What {
    AllTags,
    /// A tag, or the beginning of a snapshot id.
    Snapshot(String),
    Remote(RemoteTagName),
}

impl What {
    /// What is not UTF-8 is no name either.
    fn parse(name: &OsStr) -> anyhow::Result<Self> {
        let name = name.to_string_lossy();
        if let Some(remote) = RemoteTagName::parse(&name)? {
            return Ok(Self::Remote(remote));
        }
        snapstore_store::check_snapshot(&name)?;
        Ok(Self::Snapshot(name.into_owned()))
    }

    fn name(&self) -> Option<String> {
        match self {
            Self::AllTags => None,
            Self::Snapshot(name) => Some(name.clone()),
            Self::Remote(name) => Some(name.to_string()),
        }
    }
}

pub fn run(context: &Context, args: &MountArgs) -> anyhow::Result<ExitCode> {
    let (what, dir) = match args.what.as_slice() {
        [dir] if args.rw && !args.resume => bail!(Usage(format!(
            "--rw needs a snapshot to begin with, as in `snapstore mount --rw TAG {}`",
            dir.display()
        ))),
        [dir] if args.layout.is_some() => bail!(Usage(format!(
            "--layout is for the files of one snapshot, as in `snapstore mount --layout {} TAG \
             {}`",
            args.layout.map_or("", Kind::name),
            dir.display()
        ))),
        [_, dir] if args.resume => bail!(Usage(format!(
            "--resume goes on with what was there; leave the snapshot out, as in `snapstore \
             mount --rw --resume {}`",
            dir.display()
        ))),
        [dir] => (What::AllTags, dir),
        [name, dir] => (What::parse(name)?, dir),
        _ => unreachable!("clap accepts one or two values"),
    };
    let dir = Path::new(dir);
    if let What::Remote(name) = &what {
        let others = [("--rw", args.rw), ("--layout", args.layout.is_some())];
        if let Some((option, _)) = others.iter().find(|(_, is_given)| *is_given) {
            return Err(lazy::not_with(option, name));
        }
    }
    // The server has another directory, where all that it is told is to be found.
    let place = Place {
        dir: absolute(dir)?,
        others: vec![
            absolute(&context.store_path()?)?,
            absolute(&runtime::runtime_dir())?,
        ],
    };
    if !args.foreground {
        return start_server(context, args, &what, &place);
    }
    match args.announce {
        true => Ok(ExitCode::from(serve_announced(
            context, args, &what, &place,
        ))),
        false => {
            let served = serve(context, args, &what, &place, &mut None);
            let served = served.inspect_err(|error| {
                tracing::error!(error = snapstore_host::message(error), "the server ends");
            });
            served.map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Where a mount is to be, and what it must not hide: the way to the store by the name that
/// its user has for it, and the machines' sockets. Absolute paths.
struct Place {
    dir: PathBuf,
    others: Vec<PathBuf>,
}

/// An empty path stays one, for whoever looks at it to refuse.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Ok(path.to_owned());
    }
    let lost = || {
        let shown = path.display();
        format!("cannot tell where {shown} is: the working directory is not to be found")
    };
    std::path::absolute(path).with_context(lost)
}

/// Serves as [`serve`] does, and tells whoever waits for it. Returns the exit code.
fn serve_announced(context: &Context, args: &MountArgs, what: &What, place: &Place) -> u8 {
    let mut announcement = Some(Announcement::default());
    let Err(error) = serve(context, args, what, place, &mut announcement) else {
        return 0;
    };
    match announcement {
        Some(announcement) => announcement.failed(&ChildFailure {
            message: exit::message(&error),
            class: exit::class(&error),
        }),
        None => tracing::error!(error = snapstore_host::message(&error), "the server ends"),
    }
    exit::code(&error)
}

/// Serves until the mount is undone. The announcement is taken once it is made.
fn serve(
    context: &Context,
    args: &MountArgs,
    what: &What,
    place: &Place,
    announcement: &mut Option<Announcement>,
) -> anyhow::Result<()> {
    let Place { dir, others } = place;
    let mut options = MountOptions {
        threads: usize::from(args.threads),
        read_ahead_bytes: u32::try_from(args.read_ahead).unwrap_or(u32::MAX),
        allow_other: args.allow_other,
        prefetch: !args.no_prefetch,
        part: args.part.then(part).transpose()?,
        layout: Layout::default(),
    };
    let store = context.open_resolved()?;
    // What is not there is said before anything is looked at, and cleared away, at the directory.
    if let What::Snapshot(name) = what {
        store.resolve(name)?;
    }
    let layout = layout(&store, args, what)?;
    let reading = reading(args);
    let (target, lazy) = match what {
        What::AllTags => (MountTarget::AllTags, None),
        What::Snapshot(name) => (MountTarget::Snapshot(name.clone()), None),
        What::Remote(name) => {
            let around = Surroundings {
                store: store.path().to_owned(),
                others: others.clone(),
            };
            // Before anything is asked of the remote.
            name.open(&store)?;
            snapstore_fuse::prepare(dir, &around, &look::is_dead)?;
            let lazy = lazy::begin(&store, name, &reading, !args.no_prefetch)?;
            (MountTarget::Foreign(lazy.snapshot().clone()), Some(lazy))
        }
    };
    let reaches_network = lazy.as_ref().is_some_and(Lazy::reaches_network);
    // Once there is a mount, no descriptor may be missing that its server needs.
    let null = fs::OpenOptions::new().write(true).open("/dev/null");
    let null = null.context("cannot open /dev/null")?;
    let spare = spare_descriptors(&null)?;
    let mounted = if args.rw {
        let writable = writable(args, what, layout);
        let others = others.clone();
        mount_writable(store, dir, &options, &writable, others, &look::is_dead)
    } else {
        options.layout = layout;
        mount(
            store,
            &target,
            dir,
            &options,
            others.clone(),
            &look::is_dead,
        )
    };
    drop(target);
    let mounted = match mounted {
        Ok(mounted) => mounted,
        Err(error) => {
            lazy.into_iter().for_each(lazy::end);
            return Err(error.into());
        }
    };
    drop(spare);
    let undo = mounted.undo();
    // No program is started from here on.
    let watched = forbid_for_server(reaches_network)
        .map_err(anyhow::Error::from)
        .and_then(|_| unmount_on_signal(undo.clone()))
        .and_then(|()| match &args.while_locked {
            Some(lock) => unmount_when_unused(lock, dir, undo.clone()),
            None => Ok(()),
        });
    if let Err(error) = watched {
        undo.detach()?;
        lazy.into_iter().for_each(lazy::end);
        return Err(error);
    }
    let mut notes: Vec<String> = mounted
        .not_pinned()
        .iter()
        .map(ToString::to_string)
        .collect();
    if mounted.lost_unsynced() {
        notes.push(LOST_UNSYNCED.to_owned());
    }
    if mounted.cleared_away() {
        let shown = dir.display();
        notes.push(format!(
            "what a dead server had left at {shown} was unmounted"
        ));
    }
    match announcement.take() {
        Some(mut announcement) => {
            notes
                .iter()
                .for_each(|note| announcement.note(note.clone()));
            if let Err(error) = announcement.ready(&null) {
                tracing::warn!(%error, "nobody could be told of the mount");
                notes.iter().for_each(|note| tracing::warn!("{note}"));
                // One that is made for machines may have been found by others, and ends with
                // its last user.
                if args.while_locked.is_none() {
                    undo.detach()?;
                }
            }
        }
        None => {
            notes.iter().for_each(|note| say!("warning: {note}"));
            // Without a reader it serves all the same.
            if let Err(error) = tell(context, args, what, std::process::id(), None) {
                tracing::warn!(%error, "nobody could be told of the mount");
            }
        }
    }
    // However it ended: nobody else knows of the directory, now that its lock is gone.
    let ended = mounted.wait();
    lazy.into_iter().for_each(lazy::end);
    if let Some(lock) = &args.while_locked {
        remove_mount_point(lock, dir)?;
    }
    match ended? {
        Ended::Clean => {}
        Ended::Kept(place) => tracing::warn!(
            dir = %dir.display(), place = %place.display(),
            "what was written is in no commit; `snapstore mount --rw --resume` goes on with it"
        ),
        Ended::Discarded => tracing::info!(dir = %dir.display(), "what was written is given up"),
    }
    Ok(())
}

/// Descriptors that a server opens after its mount is made: for signals, its users' lock, and
/// to find the mount that it is to undo.
const DESCRIPTORS: usize = 8;

/// As many that are open, to be closed when they are needed.
fn spare_descriptors(file: &fs::File) -> anyhow::Result<Vec<fs::File>> {
    let spare: io::Result<_> = (0..DESCRIPTORS).map(|_| file.try_clone()).collect();
    spare.context("cannot open what a mount's server needs")
}

/// What is read of the memory, if the rest is read elsewhere.
fn part() -> anyhow::Result<Part> {
    Ok(Part {
        image: Reading::PART_OF.to_owned(),
        ranges: Reading::read_part()?,
    })
}

/// What a user has to know who goes on with a view after his host went down.
const LOST_UNSYNCED: &str = "the host went down before this view was unmounted: what had been \
                             written to it and not brought to the disk, by fsync(2), is gone, and \
                             files may be there in part; what is here is as of the last fsync(2), \
                             or of the last commit";

/// How a remote is read.
fn reading(args: &MountArgs) -> RemoteReading {
    RemoteReading {
        id: args.of_snapshot.clone(),
        ..lazy::reading(&args.reading, args.fill)
    }
}

/// How a mount can be written.
fn writing(args: &MountArgs) -> Writing {
    Writing {
        count: args.count,
        owner: args.owner,
        mode: args.mode,
        overlay_dir: args.overlay_dir.clone(),
        limit_bytes: args.overlay_limit,
        resume: args.resume,
        discard: args.discard,
    }
}

/// The names of the files.
fn layout(store: &Store, args: &MountArgs, what: &What) -> anyhow::Result<Layout> {
    match (args.layout, what) {
        (Some(kind), What::Snapshot(name)) => monitors::layout(store, kind, name),
        _ => Ok(Layout::default()),
    }
}

fn writable(args: &MountArgs, what: &What, layout: Layout) -> WritableOptions {
    let writing = writing(args);
    WritableOptions {
        snapshot: what.name(),
        count: writing.count,
        owner: writing.owner,
        mode: writing.mode,
        overlay_dir: writing.overlay_dir,
        limit_bytes: writing.limit_bytes,
        layout,
        discard: writing.discard,
    }
}

/// How long a server whose mount is undone waits for the kernel to say so.
const COPIES_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// Removes the directory that was made for a mount. The kernel may take a moment to
/// let go of it. If this fails for good the next mount uses it.
fn remove_mount_point(lock: &Path, dir: &Path) -> anyhow::Result<()> {
    for _ in 0..100 {
        let undoing = lock_parent(lock)?;
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            _ => return Ok(()),
        }
        drop(undoing);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}

/// Ctrl-C and SIGTERM unmount instead of leaving a dead mount point.
fn unmount_on_signal(undo: Undo) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .context("cannot watch for signals")?;
    start_thread("signals", move || {
        for _ in signals.forever() {
            if let Err(error) = undo.detach() {
                tracing::error!(%error, "unmounting");
            }
        }
    })
}

fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("cannot start a thread")?;
    Ok(())
}

/// Unmounts once nobody holds the shared lock on this file any more: the kernel
/// drops it with its last holder, however that ends. The file goes before the
/// lock on it does, so that whoever then gets the lock can tell; and the mount
/// goes under the directory's lock, so that whoever makes the next one does not
/// find this one on its way out.
fn unmount_when_unused(lock: &Path, dir: &Path, undo: Undo) -> anyhow::Result<()> {
    let file = fs::File::open(lock).with_context(|| format!("cannot open {}", lock.display()))?;
    let (lock, dir) = (lock.to_owned(), dir.to_owned());
    start_thread("last-user", move || {
        let locked = loop {
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        let undoing = lock_parent(&lock);
        if let Err(error) = &undoing {
            tracing::error!(%error, "undoing the mount");
        }
        let ended = locked
            .map_err(io::Error::from)
            .and_then(|()| remove_if_same(&file, &lock));
        if let Err(error) = ended {
            tracing::error!(%error, "watching for the last user of the mount");
        }
        let detached = undo.detach();
        drop(undoing);
        if let Err(error) = detached {
            tracing::error!(%error, "unmounting");
            return;
        }
        // Usually the process has ended by now. Where another mount namespace still has
        // a copy of the mount, the kernel does not tell that it is over; nobody uses it.
        std::thread::sleep(COPIES_PATIENCE);
        if let Err(error) = remove_mount_point(&lock, &dir) {
            tracing::error!(%error, "clearing the mount point away");
        }
        std::process::exit(0);
    })
}

/// Another server of the same snapshot may have been here before, and the file may
/// already be that of the next one.
fn remove_if_same(file: &fs::File, path: &Path) -> io::Result<()> {
    if runtime::is_same(file, path) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn lock_parent(lock: &Path) -> anyhow::Result<fs::File> {
    lock_dir(lock.parent().context("a lock is a file of a directory")?)
}

/// Forks the server off, and waits until the mount is usable or the server says why not.
fn start_server(
    context: &Context,
    args: &MountArgs,
    what: &What,
    place: &Place,
) -> anyhow::Result<ExitCode> {
    // It waits for others as long as any server does.
    let context_there = Context::new(Some(absolute(&context.store_path()?)?), false, None);
    let args_there = MountArgs {
        overlay_dir: absolute(&args.overlay_dir)?,
        ..args.clone()
    };
    let store = context_there.resolved_path()?;
    let server = fork(&store, || {
        logging::to_bounded(0, Sink::File(log_path(&store)));
        let code = serve_announced(&context_there, &args_there, what, place);
        logging::finish();
        code
    })?;
    for note in &server.notes {
        say!("warning: {note}");
    }
    tell(context, args, what, server.pid, Some(&server.log))?;
    Ok(ExitCode::SUCCESS)
}

/// Says that there is a mount, and who serves it.
fn tell(
    context: &Context,
    args: &MountArgs,
    what: &What,
    server_pid: u32,
    log: Option<&Path>,
) -> anyhow::Result<()> {
    // As it was typed.
    let dir = args.what.last().context("clap requires one")?;
    let shown = Path::new(dir).display().to_string();
    let tag = what.name();
    let log = log.map(|log| log.display().to_string());
    let value = json!({"dir": shown, "snapshot": tag, "server_pid": server_pid, "log": log});
    context.answer(&value, || match &tag {
        Some(tag) => format!("Mounted {tag} on {shown}."),
        None if args.resume => format!("Mounted what was written on {shown} again."),
        None => format!("Mounted all tags on {shown}."),
    })
}
