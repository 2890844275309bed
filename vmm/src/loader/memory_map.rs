//! What a kernel is told about memory, as a BIOS does by its call E820.

use std::ops::Range;

use crate::addresses::{ACPI_TABLES, BIOS, EBDA, HIGH_MEMORY, KVM_IDENTITY_MAP};
use crate::memory::{DEVICE_HOLE_END, MemoryLayout};

/// What is at a range of addresses, by its number in a memory map (ACPI
/// specification, "System Address Map Interfaces").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Memory to use.
    Ram = 1,
    /// Nothing to use.
    Reserved = 2,
    /// Memory with ACPI's tables.
    Acpi = 3,
}

impl Kind {
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// An entry of the map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub range: Range<u64>,
    pub kind: Kind,
}

/// The map of a machine, in ascending order.
pub(super) fn memory_map(layout: &MemoryLayout) -> Vec<Entry> {
    let mut map = vec![
        (0..EBDA.start, Kind::Ram),
        (EBDA, Kind::Reserved),
        (ACPI_TABLES, Kind::Acpi),
        (BIOS, Kind::Reserved),
    ];
    for slot in layout.slots() {
        let end = slot.guest_address + slot.length;
        map.push((slot.guest_address.max(HIGH_MEMORY)..end, Kind::Ram));
    }
    map.push((KVM_IDENTITY_MAP..DEVICE_HOLE_END, Kind::Reserved));
    map.retain(|(range, _)| !range.is_empty());
    map.sort_by_key(|(range, _)| range.start);
    map.into_iter()
        .map(|(range, kind)| Entry { range, kind })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::VM_GENERATION;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn map(size: u64) -> Vec<Entry> {
        memory_map(&MemoryLayout::new(size).unwrap())
    }

    fn ram(size: u64) -> Vec<Range<u64>> {
        let ram = map(size)
            .into_iter()
            .filter(|entry| entry.kind == Kind::Ram);
        ram.map(|entry| entry.range).collect()
    }

    #[test]
    fn memory_is_where_the_layout_has_it() {
        let low = 0..0x9_fc00;
        for size in [256 * MIB, 512 * MIB, 3 * GIB] {
            assert_eq!(ram(size), [low.clone(), MIB..size]);
        }
        assert_eq!(ram(5 * GIB), [low.clone(), MIB..3 * GIB, 4 * GIB..6 * GIB]);
        assert_eq!(ram(MIB), [low]);
    }

    #[test]
    fn entries_ascend_without_overlap() {
        for size in [MIB, 256 * MIB, 512 * MIB, 3 * GIB, 3 * GIB + 4096, 5 * GIB] {
            let layout = MemoryLayout::new(size).unwrap();
            let map = memory_map(&layout);
            assert!(
                map.windows(2)
                    .all(|two| two[0].range.end <= two[1].range.start)
            );
            for entry in map.iter().filter(|entry| entry.kind == Kind::Ram) {
                assert!(layout.is_ram(entry.range.start) && layout.is_ram(entry.range.end - 1));
            }
        }
    }

    #[test]
    fn tables_and_the_generation_are_not_for_use() {
        let kind = |address| {
            let map = map(512 * MIB);
            let found = map.iter().find(|entry| entry.range.contains(&address));
            found.map(|entry| entry.kind)
        };
        assert_eq!(kind(ACPI_TABLES.start), Some(Kind::Acpi));
        assert_eq!(kind(VM_GENERATION), Some(Kind::Reserved));
        assert_eq!(kind(KVM_IDENTITY_MAP), Some(Kind::Reserved));
        assert_eq!(kind(0xa_0000), None);
        assert_eq!(kind(0xd000_0000), None);
    }
}
