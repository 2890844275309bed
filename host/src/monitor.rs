//! Processes of other monitors: which snapshot their guest's memory is of, and what they
//! changed.
//!
//! A monitor that restores from a mount maps `memory.bin` privately. What its guest writes
//! becomes pages of the process's own, and the kernel tells which those are. So a commit
//! needs nothing of the monitor but that it stands still.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use snapstore_store::{
    Extent, ImageRole, Input, InputData, InputKind, MountEntry, SnapshotId, Store,
};
use snapstore_vmm::memory::{ScanMethod, private_ranges};

use crate::commit::extents;
use crate::error::{Busy, NotFound};
use crate::look;
use crate::mappings::{Mapped, Parts, parts};

/// How long a process is watched for changes before it is taken for paused.
const WATCHED: Duration = Duration::from_millis(50);

/// What a mount calls the file with a guest's memory: the usual name, and those that monitors
/// look for.
pub(crate) const MEMORY_FILES: [&str; 4] = ["memory.bin", "mem_file", "memory-ranges", "ram"];

/// The memory of another monitor's guest, as changes to the snapshot that it was restored
/// from.
pub struct ForeignMemory {
    /// That snapshot.
    pub parent: SnapshotId,
    /// The changed pages, to be read from the process.
    pub input: Input,
    /// How many bytes of the process that is.
    pub changed_bytes: u64,
}

/// Finds the mapping of a mounted `memory.bin` of this store in a process, and the pages
/// that the process changed.
///
/// # Errors
/// [`NotFound`] if there is no such process, or it has no such mapping; [`Busy`] if it writes
/// to the memory meanwhile; what the kernel says if this user may not look at it.
pub fn memory_of(store: &Store, pid: u32) -> anyhow::Result<ForeignMemory> {
    look_at(store, pid, false)
}

/// The same of a process that is known to be paused.
pub(crate) fn memory_of_paused(store: &Store, pid: u32) -> anyhow::Result<ForeignMemory> {
    look_at(store, pid, true)
}

fn look_at(store: &Store, pid: u32, is_paused: bool) -> anyhow::Result<ForeignMemory> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let table = fs::read_to_string(proc.join("maps")).map_err(|error| refused(pid, error))?;
    let all: Vec<Mapped> = table.lines().filter_map(Mapped::parse).collect();
    let mapped: Vec<Mapped> = all
        .iter()
        .filter(|it| is_memory_file(it))
        .cloned()
        .collect();
    let shown = shown_in(store, &mapped)?.ok_or_else(|| {
        NotFound(format!(
            "process {pid} has not mapped memory.bin of a mount of {}; only a monitor that was \
             restored from one can be committed like this",
            store.path().display()
        ))
    })?;
    let manifest = store.manifest(shown.id)?;
    let image = manifest
        .images
        .iter()
        .find(|image| image.role == ImageRole::Memory)
        .context("the mounted snapshot has no memory")?;
    let is_image =
        |it: &Mapped| is_memory_file(it) && (it.device, it.inode) == (shown.device, shown.inode);
    let parts = parts(&all, is_image, image.size_bytes)?;
    let pagemap = File::open(proc.join("pagemap")).map_err(|error| refused(pid, error))?;
    let memory = File::open(proc.join("mem")).map_err(|error| refused(pid, error))?;
    let zeros = File::open("/dev/zero").context("cannot open /dev/zero")?;
    let look = || -> anyhow::Result<_> {
        let extents = changed_parts(&pagemap, &parts)?;
        let bytes = match is_paused {
            true => 0,
            false => digest(&memory, &extents).map_err(|error| refused(pid, error))?,
        };
        Ok((extents, bytes))
    };
    let before = match is_paused {
        true => None,
        false => Some(look()?),
    };
    if before.is_some() {
        std::thread::sleep(WATCHED);
    }
    let (extents, bytes) = look()?;
    if before.is_some_and(|before| (&extents, bytes) != (&before.0, before.1)) {
        bail!(Busy(format!(
            "process {pid} writes to its guest's memory; pause the guest in its monitor first, \
             and take its state then"
        )));
    }
    Ok(ForeignMemory {
        parent: shown.id,
        changed_bytes: of_memory(&extents).map(|extent| extent.length).sum(),
        input: Input {
            name: image.name.clone(),
            role: ImageRole::Memory,
            data: InputData::Extents {
                files: vec![Arc::new(memory), Arc::new(zeros)],
                label: format!("the memory of process {pid}"),
                size_bytes: image.size_bytes,
                extents,
            },
            kind: InputKind::Diff,
        },
    })
}

/// Those that are read from the process.
fn of_memory(extents: &[Extent]) -> impl Iterator<Item = &Extent> {
    extents.iter().filter(|extent| extent.file == 0)
}

/// Tells whether the bytes have changed.
fn digest(memory: &File, extents: &[Extent]) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; 1 << 20];
    for extent in of_memory(extents) {
        let mut at = extent.file_offset;
        let end = at + extent.length;
        while at < end {
            let len = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            memory.read_exact_at(&mut buffer[..len], at)?;
            hasher.write(&buffer[..len]);
            at += len as u64;
        }
    }
    Ok(hasher.finish())
}

pub(crate) fn refused(pid: u32, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::NotFound => NotFound(format!("there is no process {pid}")).into(),
        _ => anyhow::Error::from(error).context(format!(
            "cannot look at the memory of process {pid}; it takes its user and the right to \
             trace it (kernel.yama.ptrace_scope), or root"
        )),
    }
}

/// Whether it is a private mapping of a file that is called as memory is.
fn is_memory_file(mapped: &Mapped) -> bool {
    let name = mapped.path.file_name().and_then(|name| name.to_str());
    mapped.is_private && name.is_some_and(|name| MEMORY_FILES.contains(&name))
}

/// A mounted snapshot that a process has mapped.
struct Shown {
    id: SnapshotId,
    device: (u32, u32),
    inode: u64,
}

/// The one snapshot of the store whose memory is among these mappings.
fn shown_in(store: &Store, mapped: &[Mapped]) -> anyhow::Result<Option<Shown>> {
    let mounts = snapstore_store::mount_table().context("cannot read the table of mounts")?;
    let mut found: Option<Shown> = None;
    for mapping in mapped {
        let file = MountedFile {
            device: mapping.device,
            inode: mapping.inode,
            path: &mapping.path,
        };
        let Some(id) = snapshot_of(store, &mounts, file)? else {
            continue;
        };
        match &found {
            Some(other) if other.id != id => bail!(
                "it has mapped the memory of two snapshots, {} and {}",
                other.id.short(),
                id.short()
            ),
            _ => {
                found = Some(Shown {
                    id,
                    device: mapping.device,
                    inode: mapping.inode,
                });
            }
        }
    }
    Ok(found)
}

/// A file that a process uses, as the kernel tells of it.
#[derive(Clone, Copy)]
pub(crate) struct MountedFile<'a> {
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    /// Where the process sees it.
    pub(crate) path: &'a Path,
}

/// The snapshot of the store that this file shows an image of, if it is a mount's.
pub(crate) fn snapshot_of(
    store: &Store,
    mounts: &[MountEntry],
    file: MountedFile<'_>,
) -> anyhow::Result<Option<SnapshotId>> {
    // A part of it may be mounted elsewhere once more.
    let is_it = |it: &&MountEntry| it.device == file.device && it.filesystem == "fuse.snapstore";
    for mount in mounts.iter().filter(is_it) {
        if let Some(id) = id_of(mount, file)? {
            return Ok(store.has_snapshot(id)?.then_some(id));
        }
    }
    Ok(None)
}

/// The id of the snapshot that this file of a mount is of.
fn id_of(mount: &MountEntry, file: MountedFile<'_>) -> anyhow::Result<Option<SnapshotId>> {
    ensure!(
        look::state(&mount.dir) == look::State::Serves,
        "the mount at {} does not answer",
        mount.dir.display()
    );
    // The process may see the mount elsewhere. Of all tags each is in a directory of its own.
    let Some(name) = file.path.file_name() else {
        return Ok(None);
    };
    let tag = file.path.parent().and_then(Path::file_name);
    let dirs = [Some(mount.dir.clone()), tag.map(|tag| mount.dir.join(tag))];
    for dir in dirs.into_iter().flatten() {
        let is_it = fs::metadata(dir.join(name)).is_ok_and(|it| it.ino() == file.inode);
        if !is_it {
            continue;
        }
        let path = dir.join("manifest.json");
        let manifest = match fs::read(&path) {
            // A writable one has none. What of it nobody wrote to says what it is of.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(snapstore_fuse::image_of(&dir.join(name)));
            }
            other => other.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
        return Ok(manifest["id"].as_str().and_then(SnapshotId::from_hex));
    }
    Ok(None)
}

/// The changed pages of an image: from the process's memory, which is the first file, or
/// zeros, which are the second.
fn changed_parts(pagemap: &File, parts: &Parts) -> anyhow::Result<Vec<Extent>> {
    let changed = private_ranges(pagemap, &parts.mapped, ScanMethod::Automatic)?;
    let mut found = extents(&parts.mapped, &changed)?;
    let touched = private_ranges(pagemap, &parts.replaced, ScanMethod::Automatic)?;
    found.extend(extents(&parts.replaced, &touched)?);
    for slot in &parts.replaced {
        let (mut at, end) = (slot.image_offset, slot.image_offset + slot.length);
        let inside = touched.iter().filter(|it| at < it.end && it.start < end);
        let bounds: Vec<_> = inside
            .map(|it| (it.start, it.end))
            .chain([(end, end)])
            .collect();
        for (from, to) in bounds {
            if at < from {
                found.push(Extent {
                    image_offset: at,
                    file: 1,
                    file_offset: 0,
                    length: from - at,
                });
            }
            at = to;
        }
    }
    found.sort_unstable_by_key(|extent| extent.image_offset);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_mappings_of_memory_are_read() {
        let line = "7f0000000000-7f0000200000 rw-p 00100000 00:4a 5  /mnt/a b/memory.bin";
        let mapped = Mapped::parse(line).unwrap();
        assert!(is_memory_file(&mapped));
        assert_eq!(mapped.path, Path::new("/mnt/a b/memory.bin"));
        assert_eq!((mapped.offset, mapped.inode), (1 << 20, 5));
        assert_eq!(mapped.device, (0, 0x4a));
        for line in [
            "7f0000000000-7f0000200000 rw-s 00000000 00:4a 5  /mnt/memory.bin",
            "7f0000000000-7f0000200000 rw-p 00000000 00:4a 5  /mnt/root.img",
            "7f0000000000-7f0000200000 rw-p 00000000 00:00 0",
        ] {
            assert!(!is_memory_file(&Mapped::parse(line).unwrap()), "{line}");
        }
    }
}
