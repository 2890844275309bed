//! A frozen disk as an input of a commit.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use snapstore_store::{
    Extent, FileState, ImageReader, ImageRole, Input, InputData, InputKind, Unchanging,
};
use snapstore_vmm::control::FrozenDisk;
use snapstore_vmm::virtio::Content;

use crate::discarded::discarded;

/// The files of a disk's input, by their places.
const OVERLAY: usize = 0;
const ZEROS: usize = 1;
const BASE: usize = 2;

/// Extents of a store begin and end at multiples of this many bytes.
const GRAIN: u64 = 4096;

/// What a commit reads of a disk: for a diff what changed since `before`, else all of it.
pub fn input(
    disk: &FrozenDisk,
    kind: InputKind,
    before: Option<&ImageReader>,
) -> anyhow::Result<Input> {
    let zeros = File::open("/dev/zero").context("cannot open /dev/zero")?;
    let base = disk.base.try_clone()?;
    let overlay = match &disk.overlay {
        Some(overlay) => overlay.try_clone()?,
        // Nothing is read from it then.
        None => zeros.try_clone()?,
    };
    let written = disk.extents.iter().map(stored);
    let extents = match kind {
        InputKind::Diff | InputKind::DenseDiff => {
            let mut changed = Vec::new();
            for extent in written {
                match before.filter(|_| extent.file == ZEROS) {
                    None => changed.push(extent),
                    Some(before) => {
                        let range = extent.image_offset..end(&extent);
                        discarded(before, range, ZEROS, &mut changed)
                            .with_context(|| format!("cannot read the parent's {}", disk.name))?;
                    }
                }
            }
            changed
        }
        InputKind::Full => {
            let written: Vec<Extent> = written.collect();
            let mut all = over_base(&written, &data_ranges(&base, disk.size_bytes)?);
            // What has no data is zeros.
            all.retain(|extent| extent.file != ZEROS);
            all
        }
    };
    Ok(Input {
        name: disk.name.clone(),
        role: ImageRole::Disk,
        data: InputData::Extents {
            files: vec![Arc::new(overlay), Arc::new(zeros), Arc::new(base)],
            label: format!("the disk {}", disk.name),
            size_bytes: disk.size_bytes,
            extents,
        },
        kind,
    })
}

/// The file under a disk, which must not have changed since the machine began, and
/// must not change until the commit is done.
pub fn unchanging(disk: &FrozenDisk) -> anyhow::Result<Unchanging> {
    let base = Arc::new(disk.base.try_clone()?);
    let label = format!("the file under the disk {}", disk.name);
    let watched = Unchanging::now(base.clone(), label)?;
    let Some((modified_seconds, modified_nanoseconds)) = disk.base_modified else {
        return Ok(watched);
    };
    let began = FileState {
        size_bytes: disk.size_bytes,
        modified_seconds,
        modified_nanoseconds,
    };
    let now = FileState::of(&base).context("cannot examine a disk's file")?;
    match now {
        Some(now) if now == began => Ok(watched),
        now => bail!(
            "the file under the disk {} has changed since the machine began ({}); what the guest \
             saw of it is lost, so the machine cannot be committed; keep such files as they are, \
             or copy them first",
            disk.name,
            match now {
                Some(now) if now.size_bytes != began.size_bytes => format!(
                    "it is {} bytes long and was {}",
                    now.size_bytes, began.size_bytes
                ),
                _ => "somebody wrote to it".to_owned(),
            }
        ),
    }
}

fn stored(extent: &snapstore_vmm::virtio::Extent) -> Extent {
    let (file, file_offset) = match extent.content {
        Content::Zeros => (ZEROS, 0),
        Content::Overlay { file_offset } => (OVERLAY, file_offset),
    };
    Extent {
        image_offset: extent.image_offset,
        file,
        file_offset,
        length: extent.length,
    }
}

/// The data of a file, in whole grains.
pub fn data_ranges(file: &File, size_bytes: u64) -> anyhow::Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut from = 0;
    while from < size_bytes {
        let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A block device, or a filesystem that does not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => from,
            Err(error) => return Err(error).context("cannot find the data of a disk's file"),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end,
            _ => size_bytes,
        };
        let start = start - start % GRAIN;
        let end = end.next_multiple_of(GRAIN).min(size_bytes);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => ranges.push(start..end),
        }
        from = end;
    }
    Ok(ranges)
}

/// The written extents, and the base's data where nothing was written.
fn over_base(written: &[Extent], base: &[Range<u64>]) -> Vec<Extent> {
    let mut extents = written.to_vec();
    for data in base {
        let mut at = data.start;
        let first = written.partition_point(|extent| end(extent) <= at);
        for extent in written[first..]
            .iter()
            .take_while(|extent| extent.image_offset < data.end)
        {
            if at < extent.image_offset {
                extents.push(of_base(at..extent.image_offset));
            }
            at = at.max(end(extent));
        }
        if at < data.end {
            extents.push(of_base(at..data.end));
        }
    }
    extents.sort_by_key(|extent| extent.image_offset);
    extents
}

fn end(extent: &Extent) -> u64 {
    extent.image_offset + extent.length
}

fn of_base(range: Range<u64>) -> Extent {
    Extent {
        image_offset: range.start,
        file: BASE,
        file_offset: range.start,
        length: range.end - range.start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(start: u64, end: u64) -> Extent {
        Extent {
            image_offset: start,
            file: OVERLAY,
            file_offset: 0,
            length: end - start,
        }
    }

    #[test]
    fn what_was_written_hides_the_base() {
        let extents = over_base(
            &[written(10, 20), written(30, 40), written(90, 95)],
            &[0..12, 15..35, 50..60],
        );
        let shown: Vec<_> = extents
            .iter()
            .map(|extent| (extent.image_offset, end(extent), extent.file))
            .collect();
        assert_eq!(
            shown,
            [
                (0, 10, BASE),
                (10, 20, OVERLAY),
                (20, 30, BASE),
                (30, 40, OVERLAY),
                (50, 60, BASE),
                (90, 95, OVERLAY),
            ]
        );
    }

    #[test]
    fn the_data_of_a_sparse_file_is_found() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 100], 300_000).unwrap();
        let ranges = data_ranges(&file, 1 << 20).unwrap();
        let covered = |at: u64| ranges.iter().any(|range| range.contains(&at));
        assert!(covered(300_000) && covered(300_099), "{ranges:?}");
        assert!(
            ranges
                .iter()
                .all(|r| r.start % GRAIN == 0 && r.end % GRAIN == 0)
        );
    }

    #[test]
    fn a_disk_whose_file_has_changed_is_refused() {
        use std::os::unix::fs::FileExt as _;
        use std::time::{Duration, UNIX_EPOCH};
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::new(5, 7)).unwrap();
        let disk = FrozenDisk {
            name: "disk0".to_owned(),
            size_bytes: 8192,
            base: file.try_clone().unwrap(),
            base_modified: Some((5, 7)),
            overlay: None,
            extents: Vec::new(),
        };
        unchanging(&disk).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        let error = unchanging(&disk).unwrap_err().to_string();
        assert!(error.contains("somebody wrote to it"), "{error}");
        file.set_len(4096).unwrap();
        let error = unchanging(&disk).unwrap_err().to_string();
        assert!(error.contains("4096 bytes long and was 8192"), "{error}");
    }
}
