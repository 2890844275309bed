//! What the `table` guest prints: the same computation as `asm/table.S`.
//!
//! Each line is a pure function of its step, so a machine that was paused,
//! saved, restored or forked can be held against a machine that never was.

use std::fmt;

/// Where the table begins: guest physical, in bytes.
pub const TABLE_ADDRESS: u64 = 0x20_0000;

/// The table's length, in entries of four bytes.
pub const TABLE_ENTRIES: usize = 16384;

/// Where the counters of the vCPUs are: vCPU n's, 64 bits, at this address plus n
/// times [`COUNTERS_STRIDE`], for n from 1. The 32-bit word after it is 0 unless
/// that vCPU found its counter in memory and in its register to differ.
pub const COUNTERS_ADDRESS: u64 = 0x30_0000;

/// Bytes from one vCPU's counter to the next one's.
pub const COUNTERS_STRIDE: u64 = 4096;

const OPERATIONS: u32 = 2000;
const SEED: u32 = 0x2545_f491;

/// A step that the guest found good, and its line (by `Display`, without the end
/// of line): `step 00000042 sum 1a2b3c4d ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableStep {
    /// The step's number, from 1.
    pub number: u32,
    /// The checksum of the table after that step.
    pub checksum: u32,
}

impl TableStep {
    /// Reads a line of the guest. `None` if it is another line, and also if the
    /// guest found itself damaged (`BAD` in the place of `ok`).
    pub fn parse(line: &str) -> Option<TableStep> {
        let rest = line.trim_end().strip_prefix("step ")?;
        let (number, rest) = rest.split_once(" sum ")?;
        let checksum = rest.strip_suffix(" ok")?;
        let number = number.parse().ok()?;
        let checksum = u32::from_str_radix(checksum, 16).ok()?;
        Some(TableStep { number, checksum })
    }
}

impl fmt::Display for TableStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {:08} sum {:08x} ok", self.number, self.checksum)
    }
}

/// The guest's computation: an endless iterator over its steps, from 1.
#[derive(Clone, Debug)]
pub struct TableModel {
    entries: Vec<u32>,
    generator: u32,
    checksum: u32,
    step: u32,
}

impl TableModel {
    /// The table as it is filled, before the first step.
    pub fn new() -> TableModel {
        let mut generator = SEED;
        let entries = (0..TABLE_ENTRIES)
            .map(|_| {
                generator = xorshift(generator);
                generator
            })
            .collect();
        let mut model = TableModel {
            entries,
            generator,
            checksum: 0,
            step: 0,
        };
        model.checksum = model.fresh_checksum();
        model
    }

    /// The table's entries after the last step that was taken: what the guest's
    /// memory holds at [`TABLE_ADDRESS`] when it prints that step's line.
    pub fn entries(&self) -> &[u32] {
        &self.entries
    }

    fn operation(&mut self) {
        self.generator = xorshift(self.generator);
        let i = self.generator as usize % TABLE_ENTRIES;
        let j = (self.generator >> 14) as usize % TABLE_ENTRIES;
        let (a, b) = (self.entries[i], self.entries[j]);
        self.entries.swap(i, j);
        let added = self.step.wrapping_add(self.generator);
        self.entries[i] = self.entries[i].wrapping_add(added);
        let swapped = b
            .wrapping_sub(a)
            .wrapping_mul(weight(i).wrapping_sub(weight(j)));
        self.checksum = self
            .checksum
            .wrapping_add(swapped)
            .wrapping_add(added.wrapping_mul(weight(i)));
    }

    fn fresh_checksum(&self) -> u32 {
        let products = self
            .entries
            .iter()
            .enumerate()
            .map(|(i, e)| e.wrapping_mul(weight(i)));
        products.fold(0, u32::wrapping_add)
    }
}

impl Default for TableModel {
    fn default() -> TableModel {
        TableModel::new()
    }
}

impl Iterator for TableModel {
    type Item = TableStep;

    fn next(&mut self) -> Option<TableStep> {
        self.step = self.step.wrapping_add(1);
        for _ in 0..OPERATIONS {
            self.operation();
        }
        Some(TableStep {
            number: self.step,
            checksum: self.checksum,
        })
    }
}

/// The line that the guest prints after this step, without the end of line.
/// Takes time in proportion to the step: use [`TableModel`] for many. Step 0
/// gives the checksum of the table as filled, which the guest does not print.
pub fn table_line(step: u32) -> String {
    let mut model = TableModel::new();
    let filled = TableStep {
        number: 0,
        checksum: model.checksum,
    };
    let last = (0..step).filter_map(|_| model.next()).last();
    last.unwrap_or(filled).to_string()
}

fn xorshift(mut state: u32) -> u32 {
    state ^= state << 13;
    state ^= state >> 17;
    state ^ state << 5
}

fn weight(index: usize) -> u32 {
    (index as u32).wrapping_mul(0x9e37_79b1) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_checksum_is_the_tables() {
        let mut model = TableModel::new();
        for _ in 0..50 {
            let step = model.next().unwrap();
            assert_eq!(step.checksum, model.fresh_checksum(), "{step}");
        }
    }

    /// What the guest itself printed, on KVM.
    #[test]
    fn lines_are_those_of_the_guest() {
        assert_eq!(table_line(1), "step 00000001 sum 734f273b ok");
        assert_eq!(table_line(23), "step 00000023 sum 822ba8a9 ok");
        assert_eq!(table_line(81), "step 00000081 sum 08ee36c8 ok");
    }

    #[test]
    fn exchanged_or_stale_pages_change_the_checksum() {
        let mut model = TableModel::new();
        let old = model.entries.clone();
        let step = model.next().unwrap();
        let new = model.entries.clone();
        for page in 0..TABLE_ENTRIES / 1024 {
            let at = page * 1024..(page + 1) * 1024;
            model.entries[at.clone()].copy_from_slice(&old[at.clone()]);
            assert_ne!(model.fresh_checksum(), step.checksum, "stale page {page}");
            model.entries[at.clone()].fill(0);
            assert_ne!(model.fresh_checksum(), step.checksum, "lost page {page}");
            model.entries.copy_from_slice(&new);
            let other = (page + 1) % (TABLE_ENTRIES / 1024);
            for entry in at {
                model.entries.swap(entry, other * 1024 + entry % 1024);
            }
            assert_ne!(
                model.fresh_checksum(),
                step.checksum,
                "exchanged page {page}"
            );
            model.entries.copy_from_slice(&new);
        }
    }

    #[test]
    fn lines_are_read_back() {
        let step = TableModel::new().nth(41).unwrap();
        assert_eq!(TableStep::parse(&step.to_string()), Some(step));
        assert_eq!(TableStep::parse(&format!("{step}\r\n")), Some(step));
        assert_eq!(table_line(42), step.to_string());
        assert_eq!(
            TableStep::parse("step 00000042 sum 1a2b3c4d BAD table"),
            None
        );
        assert_eq!(TableStep::parse("pong"), None);
    }
}
