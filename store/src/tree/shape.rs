//! The arithmetic of a page tree: which node covers which pages.

use crate::format::node::FAN_OUT;

const FAN_OUT_U64: u64 = FAN_OUT as u64;

/// The shape of the tree of an image with a given number of pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    pages: u64,
    root_level: u8,
}

impl Shape {
    /// The lowest tree that holds `pages` pages.
    pub fn of_pages(pages: u64) -> Self {
        let mut root_level = 0;
        while pages_under(root_level) < pages {
            root_level += 1;
        }
        Self { pages, root_level }
    }

    pub fn pages(self) -> u64 {
        self.pages
    }

    pub fn root_level(self) -> u8 {
        self.root_level
    }
}

/// How many pages a node of this level covers.
pub(crate) fn pages_under(level: u8) -> u64 {
    FAN_OUT_U64.pow(u32::from(level) + 1)
}

/// How many pages one child of a node of this level covers.
pub(crate) fn pages_per_child(level: u8) -> u64 {
    FAN_OUT_U64.pow(u32::from(level))
}

/// In which slot of a node of this level a page lies.
pub(crate) fn slot(page: u64, level: u8) -> usize {
    usize::try_from(page / pages_per_child(level) % FAN_OUT_U64).expect("a slot is below 512")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_the_page_count() {
        for (pages, level) in [
            (1, 0),
            (512, 0),
            (513, 1),
            (512 * 512, 1),
            (512 * 512 + 1, 2),
            (1 << 32, 3),
        ] {
            assert_eq!(Shape::of_pages(pages).root_level(), level, "{pages} pages");
        }
    }

    #[test]
    fn slots_of_a_page_at_each_level() {
        let page = 3 * 512 * 512 + 5 * 512 + 7;
        assert_eq!([0, 1, 2].map(|level| slot(page, level)), [7, 5, 3]);
    }
}
