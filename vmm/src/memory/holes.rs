//! Finding the parts of an image that hold no data.
//!
//! An image that a server shows has as many holes as its guest has runs of zero
//! pages, and each question costs a round trip. So the image is looked at in
//! grains: a file of any size is answered by at most two questions a grain, and
//! cut into at most [`MAX_GRAINS`] pieces. What lies in smaller holes stays
//! mapped from the file, where it reads as zeros just the same.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::ranges;

/// The least grain in bytes.
const MIN_GRAIN_BYTES: u64 = 64 << 10;

/// The most grains in an image. Every hole takes at least one, and so does the
/// data between two holes: this is also the most mappings that a guest's memory
/// consists of. Linux allows a process 65530 (vm.max_map_count).
const MAX_GRAINS: u64 = 4096;

/// The grain for an image of `size_bytes`, in bytes: a power of two.
fn grain_bytes(size_bytes: u64) -> u64 {
    size_bytes
        .div_ceil(MAX_GRAINS)
        .next_power_of_two()
        .max(MIN_GRAIN_BYTES)
}

/// The holes of the image at the offsets `within`, in bytes; each begins at a
/// multiple of the grain and is at least one grain long, or reaches the end of
/// `within`. A filesystem that cannot tell has none. Moves the file's position.
pub(super) fn holes(
    image: &File,
    size_bytes: u64,
    within: Range<u64>,
) -> io::Result<Vec<Range<u64>>> {
    let grain = grain_bytes(size_bytes);
    let mut found = Vec::new();
    let mut at = within.start.next_multiple_of(grain);
    while at < within.end {
        let data = match seek(image, SeekFrom::Data(at)) {
            Ok(data) => data.clamp(at, within.end),
            Err(Errno::NXIO) => within.end,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        // Whole grains only, so that every piece is one at least.
        let end = if data == within.end {
            data
        } else {
            data - data % grain
        };
        if end > at {
            ranges::push(&mut found, at..end);
        }
        if data == within.end {
            break;
        }
        let hole = seek(image, SeekFrom::Hole(data))?.max(data + 1);
        at = hole.next_multiple_of(grain);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, MIB};
    use super::*;

    #[test]
    fn grain_follows_the_size() {
        assert_eq!(grain_bytes(MIB), MIN_GRAIN_BYTES);
        assert_eq!(grain_bytes(256 * MIB), MIN_GRAIN_BYTES);
        assert_eq!(grain_bytes(256 * MIB + 4096), 2 * MIN_GRAIN_BYTES);
        assert_eq!(grain_bytes(1 << 40), 256 * MIB);
    }

    #[test]
    fn a_file_without_data_is_one_hole() {
        let file = testing::image(8 * MIB, &[]);
        assert_eq!(holes(&file, 8 * MIB, 0..8 * MIB).unwrap(), [0..8 * MIB]);
        assert_eq!(
            holes(&file, 8 * MIB, 4 * MIB..8 * MIB).unwrap(),
            [4 * MIB..8 * MIB]
        );
    }

    #[test]
    fn a_file_without_holes_has_none() {
        let file = testing::image(2 * MIB, &[0..2 * MIB]);
        assert!(holes(&file, 2 * MIB, 0..2 * MIB).unwrap().is_empty());
    }

    #[test]
    fn holes_are_whole_grains_and_never_data() {
        let data = [
            0..4096,
            40 * 4096..41 * 4096,
            MIB..MIB + 4096,
            3 * MIB - 4096..3 * MIB,
        ];
        let size = 4 * MIB + 4096;
        let file = testing::image(size, &data);
        let found = holes(&file, size, 0..size).unwrap();
        assert!(ranges::intersect(&found, &data).is_empty());
        assert_eq!(
            found,
            [
                64 << 10..128 << 10,
                192 << 10..MIB,
                MIB + (64 << 10)..3 * MIB - (64 << 10),
                3 * MIB..size
            ]
        );
    }

    #[test]
    fn pieces_stay_bounded() {
        // Data in every second page of 64 MiB, holes of 4 KiB between them.
        let size = 64 * MIB;
        let data: Vec<_> = (0..size / 8192)
            .map(|i| i * 8192..i * 8192 + 4096)
            .collect();
        let file = testing::image(size, &data);
        assert!(holes(&file, size, 0..size).unwrap().is_empty());
    }
}
