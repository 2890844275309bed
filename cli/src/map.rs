//! A map of an image's pages in letters.

use snapstore_store::{PageKind, PageMap};

/// The most rows that are drawn: more would not be seen at once.
const ROWS: u64 = 32;
/// What an address and the space behind it take.
const MARGIN: usize = 14;

/// The letter of a kind; another one for pages of the working set.
pub fn letter(kind: PageKind, in_working_set: bool) -> char {
    match (kind, in_working_set) {
        (PageKind::Zero, false) => '.',
        (PageKind::Zero, true) => ':',
        (PageKind::Parent, false) => 'p',
        (PageKind::Parent, true) => 'P',
        (PageKind::Shared, false) => 's',
        (PageKind::Shared, true) => 'S',
        (PageKind::Own, false) => 'o',
        (PageKind::Own, true) => 'O',
    }
}

/// Some pages in a row.
#[derive(Clone, Copy, Default)]
struct Cell {
    /// How many there are of each kind.
    pages: [u64; PageKind::ALL.len()],
    in_working_set: bool,
}

impl Cell {
    /// The last kind that any page is of.
    fn kind(&self) -> PageKind {
        let kinds = PageKind::ALL.into_iter().rev();
        let mut there = kinds.filter(|kind| self.pages[*kind as usize] > 0);
        there.next().unwrap_or(PageKind::Zero)
    }

    /// How a terminal is to show it: bright if most pages are of its kind, underlined
    /// if some are in the working set.
    fn attributes(&self) -> String {
        let kind = self.kind();
        let is_most = 2 * self.pages[kind as usize] >= self.pages.iter().sum();
        let colour = match (kind, is_most) {
            (PageKind::Zero, _) => "90",
            (PageKind::Parent, false) => "34",
            (PageKind::Parent, true) => "94",
            (PageKind::Shared, false) => "36",
            (PageKind::Shared, true) => "96",
            (PageKind::Own, false) => "33",
            (PageKind::Own, true) => "93",
        };
        match self.in_working_set {
            true => format!("\x1b[0;4;{colour}m"),
            false => format!("\x1b[0;{colour}m"),
        }
    }
}

/// Cells in rows. A row and a cell are a power of two of pages, so that rows begin at
/// round addresses.
pub struct Grid {
    cells: Vec<Cell>,
    per_row: usize,
    pages_per_cell: u64,
    page_bytes: u64,
}

impl Grid {
    /// A grid that fits in so many columns.
    pub fn new(map: &PageMap, page_bytes: u64, columns: usize) -> Self {
        let room = columns.saturating_sub(MARGIN).max(4);
        let per_row = 1_usize << room.ilog2();
        let pages: u64 = map.runs.iter().map(|run| run.pages).sum();
        let most = per_row as u64 * ROWS;
        let pages_per_cell = pages.div_ceil(most).max(1).next_power_of_two();
        let count = usize::try_from(pages.div_ceil(pages_per_cell)).unwrap_or(usize::MAX);
        let mut cells = vec![Cell::default(); count];
        for run in &map.runs {
            let (mut page, end) = (run.first_page, run.first_page + run.pages);
            while page < end {
                let number = page / pages_per_cell;
                let next = end.min((number + 1) * pages_per_cell);
                let at = usize::try_from(number).unwrap_or(usize::MAX);
                let Some(cell) = cells.get_mut(at) else {
                    break;
                };
                cell.pages[run.kind as usize] += next - page;
                cell.in_working_set |= run.in_working_set;
                page = next;
            }
        }
        Self {
            cells,
            per_row,
            pages_per_cell,
            page_bytes,
        }
    }

    pub fn pages_per_cell(&self) -> u64 {
        self.pages_per_cell
    }

    /// The rows, each with its first address.
    pub fn draw(&self, colours: bool) -> String {
        let row_bytes = self.per_row as u64 * self.pages_per_cell * self.page_bytes;
        let mut out = String::new();
        for (number, row) in self.cells.chunks(self.per_row).enumerate() {
            out += &format!("{:#012x}  ", number as u64 * row_bytes);
            let mut before = String::new();
            for cell in row {
                let attributes = cell.attributes();
                if colours && attributes != before {
                    out += &attributes;
                    before = attributes;
                }
                out.push(letter(cell.kind(), cell.in_working_set));
            }
            out += if colours { "\x1b[0m\n" } else { "\n" };
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use snapstore_store::{PageRun, SnapshotId};

    use super::*;

    fn map(runs: &[(u64, PageKind, bool)]) -> PageMap {
        let mut first_page = 0;
        let runs = runs.iter().map(|(pages, kind, in_working_set)| {
            first_page += pages;
            PageRun {
                first_page: first_page - pages,
                pages: *pages,
                kind: *kind,
                in_working_set: *in_working_set,
            }
        });
        let runs: Vec<_> = runs.collect();
        PageMap {
            snapshot: SnapshotId::from_hex(&"ab".repeat(32)).unwrap(),
            image: "memory".to_owned(),
            size_bytes: first_page * 4096,
            parent: None,
            has_working_set: true,
            runs,
        }
    }

    #[test]
    fn a_small_image_has_a_cell_a_page() {
        use PageKind::{Own, Parent, Shared, Zero};
        let map = map(&[
            (2, Zero, false),
            (1, Zero, true),
            (1, Parent, false),
            (1, Parent, true),
            (1, Shared, false),
            (1, Own, true),
            (3, Own, false),
        ]);
        let grid = Grid::new(&map, 4096, 80);
        assert_eq!(grid.pages_per_cell(), 1);
        assert_eq!(grid.draw(false), "0x0000000000  ..:pPsOooo\n");
        // Rows begin at round addresses, whatever the width.
        let grid = Grid::new(&map, 4096, 23);
        assert_eq!(
            grid.draw(false),
            "0x0000000000  ..:pPsOo\n0x0000008000  oo\n"
        );
    }

    #[test]
    fn a_cell_of_many_pages_shows_the_last_kind_of_them() {
        use PageKind::{Own, Parent, Zero};
        let pages = 64 * ROWS * 8;
        let map = map(&[
            (3, Parent, false),
            (1, Own, false),
            (pages - 4, Zero, false),
        ]);
        let grid = Grid::new(&map, 4096, 80);
        assert_eq!(grid.pages_per_cell(), 8);
        let drawn = grid.draw(false);
        assert_eq!(drawn.lines().count() as u64, ROWS);
        assert!(drawn.starts_with("0x0000000000  o....."), "{drawn}");
        assert!(drawn.contains("\n0x0000200000  ...."), "{drawn}");
        // One of its eight pages is its own: the dark colour.
        let coloured = grid.draw(true);
        assert!(
            coloured.contains("  \x1b[0;33mo\x1b[0;90m."),
            "{coloured:?}"
        );
    }

    #[test]
    fn the_longest_image_there_can_be_is_drawn_at_once() {
        let map = map(&[((16 << 40) / 4096, PageKind::Zero, false)]);
        let grid = Grid::new(&map, 4096, 4096);
        assert!(grid.cells.len() <= 4096 * 32);
    }
}
