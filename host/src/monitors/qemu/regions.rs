//! What a guest of QEMU can read beside its memory: the BIOS, a display's memory and the like.
//! A migration would send them; the state of the devices does not have them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::commit::data_ranges;
use crate::monitors::memory::GuestMemory;
use crate::monitors::peer::Peer;
use crate::monitors::qmp::Qmp;

/// The most that all of them may have.
const MOST_BYTES: u64 = 1 << 30;

/// A part of the guest's address space that is not its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where the guest sees it.
    pub address: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What QEMU calls it.
    pub block: String,
}

/// The block at an address of the guest, and where it is in QEMU's process.
pub fn host_address(qmp: &mut Qmp, address: u64) -> anyhow::Result<Option<(String, u64)>> {
    let said = qmp.human(&format!("gpa2hva {address:#x}"))?;
    Ok(parse_host_address(&said))
}

/// `Host virtual address for 0x0 (pc.ram) is 0x7f0000000000`.
fn parse_host_address(said: &str) -> Option<(String, u64)> {
    let (_, rest) = said.trim().split_once('(')?;
    let (block, rest) = rest.rsplit_once(") is 0x")?;
    Some((block.to_owned(), u64::from_str_radix(rest.trim(), 16).ok()?))
}

/// What is in the guest's address space now, without its devices' registers.
pub fn list(qmp: &mut Qmp) -> anyhow::Result<Vec<Region>> {
    let said = qmp.human("info mtree -f")?;
    let regions = parse(&said).context("QEMU does not list its guest's address space")?;
    Ok(regions)
}

/// The ranges of the flat view of memory that are RAM or ROM:
/// `  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios @0000000000000000`.
fn parse(table: &str) -> Option<Vec<Region>> {
    let is_memory = |view: &&str| {
        view.lines()
            .any(|line| line.trim() == "AS \"memory\", root: system")
            || view
                .lines()
                .any(|line| line.trim() == "Root memory region: system")
    };
    let view = table.split("FlatView #").find(is_memory)?;
    let mut regions = Vec::new();
    for line in view.lines() {
        let Some((range, rest)) = line.trim().split_once(" (prio ") else {
            continue;
        };
        let (kind, name) = rest.split_once("): ")?;
        let (_, kind) = kind.split_once(", ")?;
        let is_kept = matches!(kind, "ram" | "rom" | "romd" | "nv-ram" | "nv-rom");
        if !is_kept {
            continue;
        }
        let (first, last) = range.split_once('-')?;
        let first = u64::from_str_radix(first, 16).ok()?;
        let last = u64::from_str_radix(last, 16).ok()?;
        let name = name.split(" @").next()?.trim();
        let name = name.strip_suffix(" KVM").unwrap_or(name);
        regions.push(Region {
            address: first,
            length: last.checked_sub(first)?.checked_add(1)?,
            block: name.to_owned(),
        });
    }
    Some(regions)
}

/// Reads all of them but the memory itself.
pub fn read(
    qmp: &mut Qmp,
    peer: &Peer,
    memory: GuestMemory,
) -> anyhow::Result<(Vec<Region>, Vec<u8>)> {
    let from = File::open(peer.proc("mem")).context("cannot read the memory of QEMU")?;
    let inside = memory.host_address..memory.host_address + memory.size_bytes;
    let (mut kept, mut bytes) = (Vec::new(), Vec::new());
    for mut region in list(qmp)? {
        let Some((block, at)) = host_address(qmp, region.address)? else {
            continue;
        };
        if inside.contains(&at) {
            continue;
        }
        let length = region.length;
        ensure!(
            length + bytes.len() as u64 <= MOST_BYTES,
            "the machine has {length} bytes of {block}, which is more than is committed beside \
             its memory"
        );
        region.block = block;
        let mut part = vec![0; usize::try_from(length)?];
        from.read_exact_at(&mut part, at)
            .with_context(|| format!("cannot read {} of QEMU", region.block))?;
        bytes.extend(part);
        kept.push(region);
    }
    // A file that is attached has bytes.
    if bytes.is_empty() {
        bytes.push(0);
    }
    Ok((kept, bytes))
}

/// What is in the file of the regions. Most of it is a hole, which is not read.
pub fn load(path: &Path) -> anyhow::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(length)?];
    for range in data_ranges(&file, length)? {
        let part = usize::try_from(range.start)?..usize::try_from(range.end)?;
        file.read_exact_at(&mut bytes[part], range.start)?;
    }
    Ok(bytes)
}

/// Writes them into a process that has not run its guest yet, where they differ.
pub fn write(qmp: &mut Qmp, peer: &Peer, regions: &[Region], bytes: &[u8]) -> anyhow::Result<()> {
    let memory = File::options()
        .read(true)
        .write(true)
        .open(peer.proc("mem"))
        .context("cannot write to the memory of QEMU")?;
    let mut rest = bytes;
    for region in regions {
        let length = usize::try_from(region.length)?;
        ensure!(length <= rest.len(), "the snapshot's regions are cut off");
        let (wanted, behind) = rest.split_at(length);
        rest = behind;
        let found = host_address(qmp, region.address)?;
        let Some((block, at)) = found.filter(|(block, _)| *block == region.block) else {
            bail!(
                "the machine has no {} at {:#x}, as the one had that was committed; is it of \
                 another version, or started with other options?",
                region.block,
                region.address
            );
        };
        let mut present = vec![0; length];
        memory
            .read_exact_at(&mut present, at)
            .with_context(|| format!("cannot read {block} of QEMU"))?;
        if present != wanted {
            memory
                .write_all_at(wanted, at)
                .with_context(|| format!("cannot write {block} of QEMU"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let said = "Host virtual address for 0xfffc0000 (pc.bios) is 0x7f2384400000\n";
        let read = parse_host_address(said);
        assert_eq!(read, Some(("pc.bios".to_owned(), 0x7f23_8440_0000)));
        assert_eq!(
            parse_host_address("No memory is mapped at address 0x9"),
            None
        );
    }

    #[test]
    fn the_view_of_memory_is_read() {
        let table = "\
FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000febff000-00000000febfffff (prio 1, i/o): ahci
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
";
        let regions = parse(table).unwrap();
        let names: Vec<_> = regions
            .iter()
            .map(|it| (it.block.as_str(), it.length))
            .collect();
        assert_eq!(
            names,
            [
                ("pc.ram", 0xc_0000),
                ("pc.ram", 0xb000),
                ("vga.vram", 16 << 20),
                ("pc.bios", 0x4_0000)
            ]
        );
        assert_eq!(parse("nothing"), None);
    }
}
