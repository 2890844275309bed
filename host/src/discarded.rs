//! What a guest discarded of a disk, as an input of a commit.

use std::io;
use std::ops::Range;

use snapstore_store::{Extent, ImageReader, ReadAt as _};

/// What was discarded in `range` and had been something before, as zeros of the input's file
/// `zeros`. A hole that stays one is not looked at, however long it is: whoever makes a
/// filesystem discards all of its disk.
pub(crate) fn discarded(
    before: &ImageReader,
    range: Range<u64>,
    zeros: usize,
    extents: &mut Vec<Extent>,
) -> io::Result<()> {
    let mut from = range.start;
    while let Some(data) = before.next_data(from)? {
        let end = data.end.min(range.end);
        if data.start >= end {
            break;
        }
        extents.push(Extent {
            image_offset: data.start,
            file: zeros,
            file_offset: 0,
            length: end - data.start,
        });
        from = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use snapstore_store::{
        CommitRequest, ImageRole, Input, InputData, InputKind, PageSize, Silent, Store,
    };

    use super::*;

    const PAGE: u64 = 4096;

    /// A disk of a TiB of which few pages are there.
    #[test]
    fn only_what_was_there_becomes_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(&dir.path().join("store"), PageSize::KIB_4).unwrap();
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, &[7; 3 * 4096], 0).unwrap();
        let there = [5 * PAGE, 900 << 30];
        let extent = |(image_offset, pages): (u64, u64)| Extent {
            image_offset,
            file: 0,
            file_offset: 0,
            length: pages * PAGE,
        };
        let input = Input {
            name: "disk0".to_owned(),
            role: ImageRole::Disk,
            data: InputData::Extents {
                files: vec![Arc::new(file)],
                label: "a disk".to_owned(),
                size_bytes: 1 << 40,
                extents: there.into_iter().zip([3, 1]).map(extent).collect(),
            },
            kind: InputKind::Full,
        };
        let request = CommitRequest {
            tag: "base".to_owned(),
            inputs: vec![input],
            ..CommitRequest::default()
        };
        let committed = store.commit(&request, &Silent).unwrap();
        let before = store.image_reader(committed.manifest.image("disk0").unwrap());
        let of = |range: Range<u64>| {
            let mut extents = Vec::new();
            discarded(&before, range, 1, &mut extents).unwrap();
            let shown = extents
                .iter()
                .map(|it| (it.image_offset, it.length, it.file));
            shown.collect::<Vec<_>>()
        };
        let all = [(5 * PAGE, 3 * PAGE, 1), (900 << 30, PAGE, 1)];
        assert_eq!(of(0..1 << 40), all);
        // Cut where the discarded range begins and ends.
        assert_eq!(of(6 * PAGE..7 * PAGE), [(6 * PAGE, PAGE, 1)]);
        assert_eq!(of(0..5 * PAGE), []);
        assert_eq!(of(8 * PAGE..900 << 30), []);
    }
}
