//! The one place where the store asks the kernel to make something durable.
//!
//! Every fsync, rename, unlink and directory fsync of the store goes through
//! here (RocksDB's own excepted). That makes the order of durable steps
//! readable in one place per operation, and gives tests a seam: in builds with
//! debug assertions, `SNAPSTORE_KILL_AT_STEP=N` ends the process with SIGKILL
//! just before its N-th durable step, and `SNAPSTORE_STOP_AT_STEP=N` stops it
//! there with SIGSTOP until it is continued. The simulator is told of every step
//! too (`sim`), and of some that make nothing durable. There is deliberately no
//! way to skip a step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, IoContext as _, Result};
use crate::regular;
use crate::sim::{self, Fault, StepKind};

/// Flushes a file's data and length to the disk.
pub(crate) fn sync_file(file: &File, path: &Path) -> Result<()> {
    step("sync file", path);
    sim::before(StepKind::SyncFile, path).context("flush", path)?;
    file.sync_all().context("flush", path)?;
    sim::synced_file(path);
    Ok(())
}

/// Makes the creations, renames and removals inside `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    step("sync directory", dir);
    sim::before(StepKind::SyncDir, dir)
        .and_then(|()| File::open(dir))
        .and_then(|handle| handle.sync_all())
        .context("flush directory", dir)?;
    sim::synced_dir(dir);
    Ok(())
}

/// Renames `from` to `to`, replacing what is there. Durable after [`sync_dir`].
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    step("rename", to);
    sim::before(StepKind::Rename, to)
        .and_then(|()| fs::rename(from, to))
        .context("rename", from)?;
    sim::changed(from);
    sim::changed(to);
    Ok(())
}

/// Renames a directory whose content can be done without, or removes it where it cannot
/// be renamed: one that overlayfs shows from a lower layer. Durable after [`sync_dir`].
pub(crate) fn move_away(dir: &Path, to: &Path) -> Result<()> {
    match rename(dir, to) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::CrossesDevices => {
            remove_dir(dir)
        }
        other => other,
    }
}

/// Exchanges what two names lead to, in one step: neither is missing meanwhile. Durable
/// after [`sync_dir`]. Returns false where the filesystem cannot.
pub(crate) fn exchange(one: &Path, other: &Path) -> Result<bool> {
    step("exchange", other);
    sim::before(StepKind::Rename, other).context("rename", one)?;
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::XDEV) => return Ok(false),
        done => done.context("rename", one)?,
    }
    sim::changed(one);
    sim::changed(other);
    Ok(true)
}

/// Removes a file. Durable after [`sync_dir`]. A file that is already gone is
/// no error: removal is retried after a crash.
pub(crate) fn unlink(path: &Path) -> Result<()> {
    step("unlink", path);
    sim::before(StepKind::Unlink, path).context("remove", path)?;
    let removed = match fs::remove_file(path) {
        // Something else in the place of a file; one that is not empty stays.
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => fs::remove_dir(path),
        other => other,
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.context("remove", path)?,
    }
    sim::changed(path);
    Ok(())
}

/// Removes a file that nobody needs, if it can: a later collection removes what
/// is left.
pub(crate) fn discard(path: &Path) {
    if sim::before(StepKind::Discard, path).is_ok() {
        // Not a directory of ours; one that is empty is nobody's loss.
        let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
        sim::changed(path);
    }
}

/// Opens a file that `options` may create.
pub(crate) fn create(path: &Path, options: &OpenOptions) -> io::Result<File> {
    sim::before(StepKind::Create, path)?;
    let file = options.open(path)?;
    sim::changed(path);
    Ok(file)
}

/// Appends to a file.
pub(crate) fn write_all(mut file: &File, path: &Path, bytes: &[u8]) -> Result<()> {
    sim::before(StepKind::Write, path)
        .and_then(|()| file.write_all(bytes))
        .context("write", path)
}

/// Writes at a place in a file.
pub(crate) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
    sim::before(StepKind::Write, path)
        .and_then(|()| file.write_all_at(bytes, offset))
        .context("write", path)
}

/// Reads exactly `out.len()` bytes at `offset` of a pack.
pub(crate) fn read_at(file: &File, path: &Path, out: &mut [u8], offset: u64) -> Result<()> {
    sim::before(StepKind::ReadPack, path)
        .and_then(|()| sim::reads(path, offset, out.len()))
        .and_then(|()| file.read_exact_at(out, offset))
        .context("read", path)
}

/// Makes a directory and those above it. Durable after [`sync_dir`].
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    sim::before(StepKind::MakeDir, path)
        .and_then(|()| fs::create_dir_all(path))
        .context("create", path)?;
    sim::changed(path);
    Ok(())
}

/// Removes a directory and all in it, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    sim::before(StepKind::RemoveDir, path).context("remove", path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.context("remove", path)?,
    }
    sim::changed(path);
    Ok(())
}

/// Marks a step that another library makes durable (RocksDB's flush), so that
/// tests can stop there too.
pub(crate) fn foreign_step(what: &'static str, path: &Path) {
    step(what, path);
}

/// Replaces the file at `path` by `bytes`, whole or not at all.
///
/// Order: write and flush the temporary file, rename it, flush the directory.
/// Were the rename first, a power cut could leave an empty file under the final
/// name; without the last flush the old file could come back after this call
/// has returned.
///
/// # Errors
/// As long as the old file is in place, what the system said. Once the new one is,
/// [`Error::Unconfirmed`]: everybody sees it, and only the disk has not said that it
/// will be there after a power cut. Then it has been tried twice, from the beginning:
/// after a failed flush the kernel may call clean what it could not write, so that
/// a second flush alone would prove nothing.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_once(path, bytes)?.or_else(|_| match replace_once(path, bytes) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(unconfirmed("in place", path, source)),
        // The first one is in place all the same.
        Err(error) => Err(unconfirmed("in place", path, io::Error::other(error))),
    })
}

/// Replaces the file at `path`, whole or not at all while the machine runs. After a
/// power cut it may be torn: for what costs nothing if it is lost.
pub(crate) fn replace_guess(path: &Path, bytes: &[u8]) -> Result<()> {
    let (dir, temporary) = beside(path);
    // Others may replace it at the same time.
    let mut name = temporary.file_name().unwrap_or_default().to_owned();
    let process = sim::process_id().unwrap_or_else(std::process::id);
    name.push(format!(".{process}.new"));
    let temporary = match sim::on(Fault::GuessInPlace) {
        true => path.to_owned(),
        false => dir.join(name),
    };
    let file = create_temporary(&temporary)?;
    let written = write_all(&file, &temporary, bytes).and_then(|()| rename(&temporary, path));
    if written.is_err() {
        discard(&temporary);
    }
    written
}

/// The outer error leaves the old file in place, the inner one the new file.
fn replace_once(path: &Path, bytes: &[u8]) -> Result<io::Result<()>> {
    let (dir, temporary) = beside(path);
    // Now: once the file is renamed there may be no descriptor for it.
    let handle = File::open(dir).context("open", dir)?;
    let file = create_temporary(&temporary)?;
    let written = write_all(&file, &temporary, bytes).and_then(|()| {
        if !sim::on(Fault::SmallFileNotSynced) {
            sync_file(&file, &temporary)?;
        }
        rename(&temporary, path)
    });
    if let Err(error) = written {
        discard(&temporary);
        return Err(error);
    }
    if sim::on(Fault::SmallFileNameNotSynced) {
        return Ok(Ok(()));
    }
    Ok(sync_open_dir(&handle, dir))
}

fn create_temporary(path: &Path) -> Result<File> {
    // Whatever else stands there is in the way of a file that nobody else uses.
    if regular::oddity(path).is_some() {
        discard(path);
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    create(path, &regular::never_waiting(&options)).context("create", path)
}

/// Whether a file of this name is one that [`replace_file`] makes and renames, left
/// behind by a process that was killed.
pub(crate) fn is_temporary(name: &std::ffi::OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b".") && name.ends_with(b".new")
}

/// Removes a file that is one of several of its kind, durably.
///
/// # Errors
/// As [`replace_file`]: [`Error::Unconfirmed`] once it is gone.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    let (dir, temporary) = beside(path);
    let handle = File::open(dir).context("open", dir)?;
    unlink(path)?;
    let Err(first) = sync_open_dir(&handle, dir) else {
        return Ok(());
    };
    // Another change of the directory, so that there is something to flush.
    let again = File::create(&temporary)
        .and_then(|_| fs::remove_file(&temporary))
        .and_then(|()| sync_open_dir(&handle, dir));
    again.map_err(|_| unconfirmed("removed", path, first))
}

fn sync_open_dir(handle: &File, dir: &Path) -> io::Result<()> {
    step("sync directory", dir);
    sim::before(StepKind::SyncDir, dir)?;
    handle.sync_all()?;
    sim::synced_dir(dir);
    Ok(())
}

fn unconfirmed(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Unconfirmed {
        what,
        path: path.to_owned(),
        source,
    }
}

/// The directory of a file, and the name of a temporary file in it.
fn beside(path: &Path) -> (&Path, PathBuf) {
    let dir = path
        .parent()
        .expect("files of a store have a parent directory");
    let name = path.file_name().expect("files of a store have a name");
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(".new");
    (dir, dir.join(temporary_name))
}

#[cfg(debug_assertions)]
fn step(what: &'static str, path: &Path) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static KILL_AT: LazyLock<Option<u64>> = LazyLock::new(|| number("SNAPSTORE_KILL_AT_STEP"));
    static STOP_AT: LazyLock<Option<u64>> = LazyLock::new(|| number("SNAPSTORE_STOP_AT_STEP"));
    static STEPS: AtomicU64 = AtomicU64::new(0);

    fn number(variable: &str) -> Option<u64> {
        std::env::var(variable).ok()?.parse().ok()
    }

    if KILL_AT.is_none() && STOP_AT.is_none() {
        return;
    }
    let number = STEPS.fetch_add(1, Ordering::SeqCst) + 1;
    if *STOP_AT == Some(number) {
        eprintln!("stopped before step {number}: {what} {}", path.display());
        let _ = kill_process(getpid(), Signal::STOP);
    }
    if *KILL_AT == Some(number) {
        eprintln!("killed before step {number}: {what} {}", path.display());
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

#[cfg(not(debug_assertions))]
fn step(_what: &'static str, _path: &Path) {}
