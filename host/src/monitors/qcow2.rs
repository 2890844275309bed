//! The part of the qcow2 format that disks of clones need: an empty image over another one,
//! and where in an image's file the guest's bytes are.
//!
//! Source: docs/interop/qcow2.rst of QEMU. All numbers are big-endian. What is refused:
//! encryption, compressed clusters, data in another file, subclusters, and images that say
//! of themselves that they are corrupt.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};

const MAGIC: u32 = 0x5146_49fb;
/// Clusters of images that are made here.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// The header of version 3 without extensions.
const HEADER_BYTES: u32 = 104;
/// The header extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Bits 9 to 55 of an entry: an offset in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Features that change nothing of what is read: an image that was not closed (bit 0), and
/// another method of compression (bit 3).
const KNOWN_INCOMPATIBLE: u64 = 1 | 1 << 3;
/// Images up to this length: a table of all clusters fits into memory.
const LONGEST_BYTES: u64 = 16 << 40;

/// Where a part of the guest's disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// It is zeros.
    Zeros,
    /// In the image's file, from here on.
    At(u64),
}

/// A part of the guest's disk that is in the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where it begins in the guest's disk, in bytes.
    pub disk_offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where its bytes are.
    pub content: Content,
}

/// An image's parts; what lies between them is the backing file's, or zeros.
#[derive(Debug)]
pub struct Layer {
    /// The length of the guest's disk, in bytes.
    pub size_bytes: u64,
    /// In the order of their places in the disk.
    pub parts: Vec<Part>,
}

/// Writes an image into an empty file, that has nothing of its own yet and lies over a raw
/// image.
pub fn write_empty(file: &File, size_bytes: u64, backing: &Path) -> anyhow::Result<()> {
    let name = backing.to_str().context("the path of a disk is no text")?;
    ensure!(
        (1..=1023).contains(&name.len()),
        "{name} is too long for the name of a backing file"
    );
    let l1_entries = size_bytes.div_ceil(CLUSTER * (CLUSTER / 8)).max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    // Header, refcount table, refcount block, L1 table: in this order, one after the other.
    let clusters = 3 + l1_clusters;
    ensure!(
        size_bytes <= LONGEST_BYTES && clusters <= CLUSTER / 2,
        "a disk of {size_bytes} bytes is too long"
    );
    let mut header = Vec::new();
    let extensions = u64::from(HEADER_BYTES) + 8 + 8 + 8;
    header.extend(MAGIC.to_be_bytes());
    header.extend(3_u32.to_be_bytes());
    header.extend(extensions.to_be_bytes()); // where the backing file's name is
    header.extend(u32::try_from(name.len())?.to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size_bytes.to_be_bytes());
    header.extend(0_u32.to_be_bytes()); // no encryption
    header.extend(u32::try_from(l1_entries)?.to_be_bytes());
    header.extend((3 * CLUSTER).to_be_bytes()); // the L1 table
    header.extend(CLUSTER.to_be_bytes()); // the refcount table,
    header.extend(1_u32.to_be_bytes()); // of one cluster
    header.extend(0_u32.to_be_bytes()); // no snapshots
    header.extend(0_u64.to_be_bytes());
    header.extend([0; 24]); // no features
    header.extend(4_u32.to_be_bytes()); // refcounts of 16 bits
    header.extend(HEADER_BYTES.to_be_bytes());
    header.extend(BACKING_FORMAT.to_be_bytes());
    header.extend(3_u32.to_be_bytes());
    header.extend(b"raw\0\0\0\0\0");
    header.extend([0; 8]); // no more extensions
    header.extend(name.as_bytes());
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    let used = 1_u16.to_be_bytes().repeat(usize::try_from(clusters)?);
    file.write_all_at(&used, 2 * CLUSTER)?;
    file.set_len(clusters * CLUSTER)?;
    Ok(())
}

/// The name of the file under an image, if it has one; none at all if the file is no qcow2
/// image.
pub fn backing(file: &File) -> anyhow::Result<Option<Option<String>>> {
    let mut head = [0; 20];
    if file.read_at(&mut head, 0)? < head.len() || head[..4] != MAGIC.to_be_bytes() {
        return Ok(None);
    }
    let offset = u64::from_be_bytes(head[8..16].try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(head[16..20].try_into().expect("four bytes"));
    if offset == 0 || length == 0 {
        return Ok(Some(None));
    }
    ensure!(length <= 1023, "the name of a backing file is too long");
    let mut name = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut name, offset)?;
    let name = String::from_utf8(name).context("the name of a backing file is no text")?;
    Ok(Some(Some(name)))
}

/// Reads where the guest's bytes are in an image that nobody writes to. `label` is what
/// messages call it.
pub fn read(file: &File, label: &str) -> anyhow::Result<Layer> {
    let mut head = [0; HEADER_BYTES as usize];
    let got = file
        .read_at(&mut head, 0)
        .with_context(|| format!("cannot read {label}"))?;
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let long = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    ensure!(got >= 72 && word(0) == MAGIC, "{label} is no qcow2 image");
    let version = word(4);
    ensure!(
        version == 2 || (version == 3 && got == head.len()),
        "{label} is a qcow2 image of the unknown version {version}"
    );
    let (cluster_bits, size_bytes, l1_entries, l1_offset) =
        (word(20), long(24), word(36), long(40));
    ensure!(
        (9..=21).contains(&cluster_bits) && size_bytes <= LONGEST_BYTES,
        "the header of {label} makes no sense"
    );
    ensure!(
        word(32) == 0,
        "{label} is encrypted, and what is in it cannot be read"
    );
    let incompatible = if version == 3 { long(72) } else { 0 };
    ensure!(
        incompatible & !KNOWN_INCOMPATIBLE == 0,
        "{label} uses features of qcow2 that are not known here ({incompatible:#x}: data in \
         another file, subclusters, or it is corrupt); make another of it with qemu-img convert"
    );
    let cluster = 1_u64 << cluster_bits;
    let per_table = cluster / 8;
    let needed = size_bytes.div_ceil(cluster * per_table);
    ensure!(
        u64::from(l1_entries) >= needed,
        "the table of {label} is too short for its disk"
    );
    let mut layer = Layer {
        size_bytes,
        parts: Vec::new(),
    };
    let l1 = entries(file, l1_offset, needed).with_context(|| format!("cannot read {label}"))?;
    for (number, entry) in (0_u64..).zip(l1) {
        let table = entry & OFFSET_MASK;
        if table == 0 {
            continue;
        }
        let first = number * per_table * cluster;
        let l2 = entries(file, table, per_table).with_context(|| format!("cannot read {label}"))?;
        for (number, entry) in (0_u64..).zip(l2) {
            let at = first + number * cluster;
            if at >= size_bytes {
                break;
            }
            if let Some(content) = content(entry, version, label)? {
                layer.add(at, cluster.min(size_bytes - at), content);
            }
        }
    }
    Ok(layer)
}

/// What an entry of an L2 table says; none if the cluster is the backing file's.
fn content(entry: u64, version: u32, label: &str) -> anyhow::Result<Option<Content>> {
    if entry & COMPRESSED != 0 {
        bail!(
            "{label} has compressed clusters, which are not read here; make another of it with \
             qemu-img convert"
        );
    }
    if version >= 3 && entry & ZERO != 0 {
        return Ok(Some(Content::Zeros));
    }
    let offset = entry & OFFSET_MASK;
    Ok((offset != 0).then_some(Content::At(offset)))
}

fn entries(file: &File, offset: u64, count: u64) -> anyhow::Result<Vec<u64>> {
    let mut bytes = vec![0; usize::try_from(count * 8)?];
    file.read_exact_at(&mut bytes, offset)?;
    let words = bytes.chunks_exact(8);
    Ok(words
        .map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes")))
        .collect())
}

impl Layer {
    /// Adds a part behind the last, as one with it where they touch at both ends.
    fn add(&mut self, disk_offset: u64, length: u64, content: Content) {
        if let Some(last) = self.parts.last_mut()
            && last.disk_offset + last.length == disk_offset
        {
            let goes_on = match (last.content, content) {
                (Content::Zeros, Content::Zeros) => true,
                (Content::At(before), Content::At(now)) => before + last.length == now,
                _ => false,
            };
            if goes_on {
                last.length += length;
                return;
            }
        }
        self.parts.push(Part {
            disk_offset,
            length,
            content,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size_bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        write_empty(&file, size_bytes, Path::new("/mnt/disk0.img")).unwrap();
        file
    }

    #[test]
    fn an_empty_image_has_no_parts() {
        for size in [512, 1 << 20, (1 << 40) + 512] {
            let layer = read(&image(size), "it").unwrap();
            assert_eq!((layer.size_bytes, layer.parts.len()), (size, 0));
            let name = Some(Some("/mnt/disk0.img".to_owned()));
            assert_eq!(backing(&image(size)).unwrap(), name);
        }
    }

    #[test]
    fn parts_are_found_and_joined() {
        let file = image((2 << 29) + 4096);
        let put = |at: u64, value: u64| file.write_all_at(&value.to_be_bytes(), at).unwrap();
        // A table for the first 512 MiB, and one for what is behind 1 GiB.
        put(3 * CLUSTER, (4 * CLUSTER) | (1 << 63));
        put(3 * CLUSTER + 16, (5 * CLUSTER) | (1 << 63));
        file.set_len(9 * CLUSTER).unwrap();
        put(4 * CLUSTER + 8, (6 * CLUSTER) | (1 << 63));
        put(4 * CLUSTER + 16, (7 * CLUSTER) | (1 << 63));
        put(4 * CLUSTER + 24, ZERO);
        put(5 * CLUSTER, (8 * CLUSTER) | (1 << 63));
        let layer = read(&file, "it").unwrap();
        let part = |disk_offset, length, content| Part {
            disk_offset,
            length,
            content,
        };
        assert_eq!(
            layer.parts,
            [
                part(CLUSTER, 2 * CLUSTER, Content::At(6 * CLUSTER)),
                part(3 * CLUSTER, CLUSTER, Content::Zeros),
                // Cut at the disk's end.
                part(1 << 30, 4096, Content::At(8 * CLUSTER)),
            ]
        );
        put(4 * CLUSTER + 32, COMPRESSED | 77);
        let error = read(&file, "it").unwrap_err();
        assert!(error.to_string().contains("compressed"), "{error}");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let change = |at: u64, bytes: &[u8]| {
            let file = image(1 << 20);
            file.write_all_at(bytes, at).unwrap();
            read(&file, "it").map(drop).unwrap_err().to_string()
        };
        assert!(change(0, b"RAW!").contains("no qcow2"));
        assert!(change(7, &[4]).contains("unknown version"));
        assert!(change(23, &[60]).contains("no sense"));
        assert!(change(35, &[1]).contains("encrypted"));
        for bit in [2, 4, 16] {
            assert!(change(79, &[bit]).contains("features"), "{bit}");
        }
        assert!(change(36, &[0; 4]).contains("too short"));
        // A table outside of the file.
        assert!(change(40, &[0, 0, 1]).contains("cannot read"));
    }
}
