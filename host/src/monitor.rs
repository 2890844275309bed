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
use snapstore_vmm::memory::{HostSlot, ScanMethod, private_ranges};

use crate::commit::extents;
use crate::error::{Busy, NotFound};
use crate::look;

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
    /// How many bytes that is.
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
    let mapped: Vec<Mapped> = table.lines().filter_map(Mapped::of_image).collect();
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
    let slots = slots(&mapped, &shown, image.size_bytes)?;
    let pagemap = File::open(proc.join("pagemap")).map_err(|error| refused(pid, error))?;
    let memory = File::open(proc.join("mem")).map_err(|error| refused(pid, error))?;
    let look = || -> anyhow::Result<_> {
        let changed = private_ranges(&pagemap, &slots, ScanMethod::Automatic)?;
        let extents = extents(&slots, &changed)?;
        let bytes = match is_paused {
            true => 0,
            false => digest(&memory, &extents).map_err(|error| refused(pid, error))?,
        };
        Ok((changed, extents, bytes))
    };
    let before = match is_paused {
        true => None,
        false => Some(look()?),
    };
    if before.is_some() {
        std::thread::sleep(WATCHED);
    }
    let (changed, extents, bytes) = look()?;
    if before.is_some_and(|before| (&changed, bytes) != (&before.0, before.2)) {
        bail!(Busy(format!(
            "process {pid} writes to its guest's memory; pause the guest in its monitor first, \
             and take its state then"
        )));
    }
    Ok(ForeignMemory {
        parent: shown.id,
        changed_bytes: changed.iter().map(|range| range.end - range.start).sum(),
        input: Input {
            name: image.name.clone(),
            role: ImageRole::Memory,
            data: InputData::Extents {
                files: vec![Arc::new(memory)],
                label: format!("the memory of process {pid}"),
                size_bytes: image.size_bytes,
                extents,
            },
            kind: InputKind::Diff,
        },
    })
}

/// Tells whether the bytes have changed.
fn digest(memory: &File, extents: &[Extent]) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; 1 << 20];
    for extent in extents {
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

/// A mapping, as `/proc/PID/maps` tells (proc(5)).
#[derive(Clone, Debug)]
pub(crate) struct Mapped {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Where it begins in its file.
    pub(crate) offset: u64,
    /// Of its file's filesystem; zeros if it has no file.
    pub(crate) device: (u32, u32),
    /// Zero if it has no file.
    pub(crate) inode: u64,
    pub(crate) path: PathBuf,
    pub(crate) is_private: bool,
}

impl Mapped {
    /// `None` for what is no private mapping of a file that is called as memory is.
    fn of_image(line: &str) -> Option<Self> {
        let mapped = Self::parse(line)?;
        let name = mapped.path.file_name()?.to_str()?;
        (mapped.is_private && MEMORY_FILES.contains(&name)).then_some(mapped)
    }

    /// `None` for what is no line of the table.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let is_private = words.next()?.ends_with('p');
        let offset = words.next()?;
        let (major, minor) = words.next()?.split_once(':')?;
        let inode = words.next()?;
        let path = PathBuf::from(words.next().unwrap_or_default().trim_start());
        let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
        let device = (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        );
        Some(Self {
            start: hexadecimal(start)?,
            end: hexadecimal(end)?,
            offset: hexadecimal(offset)?,
            device,
            inode: inode.parse().ok()?,
            path,
            is_private,
        })
    }
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
    let mut mounts = mounts.iter().filter(|it| it.device == file.device);
    let Some(mount) = mounts.find(|it| it.filesystem == "fuse.snapstore") else {
        return Ok(None);
    };
    match id_of(mount, file)? {
        Some(id) if store.has_snapshot(id)? => Ok(Some(id)),
        _ => Ok(None),
    }
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

/// Where the image is in the process, each part once.
fn slots(mapped: &[Mapped], shown: &Shown, size_bytes: u64) -> anyhow::Result<Vec<HostSlot>> {
    let mut slots: Vec<HostSlot> = mapped
        .iter()
        .filter(|it| (it.device, it.inode) == (shown.device, shown.inode))
        .filter(|it| it.offset < size_bytes)
        .map(|it| HostSlot {
            guest_address: 0,
            image_offset: it.offset,
            length: (it.end - it.start).min(size_bytes - it.offset),
            host_address: it.start,
        })
        .collect();
    slots.sort_by_key(|slot| slot.image_offset);
    for pair in slots.windows(2) {
        ensure!(
            pair[0].image_offset + pair[0].length <= pair[1].image_offset,
            "the process has mapped a part of memory.bin twice, and which one its guest writes \
             to is not known"
        );
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_mappings_of_memory_are_read() {
        let line = "7f0000000000-7f0000200000 rw-p 00100000 00:4a 5  /mnt/a b/memory.bin";
        let mapped = Mapped::of_image(line).unwrap();
        assert_eq!(mapped.path, Path::new("/mnt/a b/memory.bin"));
        assert_eq!((mapped.offset, mapped.inode), (1 << 20, 5));
        assert_eq!(mapped.device, (0, 0x4a));
        for line in [
            "7f0000000000-7f0000200000 rw-s 00000000 00:4a 5  /mnt/memory.bin",
            "7f0000000000-7f0000200000 rw-p 00000000 00:4a 5  /mnt/root.img",
            "7f0000000000-7f0000200000 rw-p 00000000 00:00 0",
        ] {
            assert!(Mapped::of_image(line).is_none(), "{line}");
        }
    }

    #[test]
    fn a_part_that_is_mapped_twice_is_refused() {
        let mapped = |start: u64, offset: u64| Mapped {
            start,
            end: start + (1 << 20),
            offset,
            device: (0, 1),
            inode: 1,
            path: "/mnt/memory.bin".into(),
            is_private: true,
        };
        let shown = Shown {
            id: SnapshotId::from_hex(&"0".repeat(64)).unwrap(),
            device: (0, 1),
            inode: 1,
        };
        let apart = [mapped(1 << 30, 0), mapped(1 << 31, 1 << 20)];
        assert_eq!(slots(&apart, &shown, 3 << 19).unwrap()[1].length, 1 << 19);
        assert!(
            slots(
                &[mapped(1 << 30, 0), mapped(1 << 31, 4096)],
                &shown,
                2 << 20
            )
            .is_err()
        );
    }
}
