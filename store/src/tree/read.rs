//! Finding pages, data and holes in a page tree.

use std::sync::Arc;

use crate::chunks::Chunks;
use crate::error::{Error, Result};
pub(crate) use crate::format::node::node_id;
use crate::format::node::{Child, FAN_OUT, Node};
use crate::manifest::Image;
use crate::tree::shape::{Shape, pages_per_child, pages_under, slot};

/// Where the nodes of trees are read from.
pub(crate) trait Nodes {
    /// Reads a node, whose bytes have been compared with its id.
    fn node(&self, child: Child, level: u8) -> Result<Arc<Node>>;
}

impl Nodes for Chunks {
    fn node(&self, child: Child, level: u8) -> Result<Arc<Node>> {
        Self::node(self, child, level)
    }
}

/// The page tree of one image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tree {
    shape: Shape,
    root: Option<Child>,
}

impl Image {
    pub(crate) fn tree(&self) -> Tree {
        Tree::new(Shape::of_pages(self.pages()), self.root)
    }
}

impl Tree {
    pub fn new(shape: Shape, root: Option<Child>) -> Self {
        Self { shape, root }
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn root(&self) -> Option<Child> {
        self.root
    }

    /// The page with this number; `None` if it is zero.
    pub fn page(&self, chunks: &Chunks, page: u64) -> Result<Option<Child>> {
        let leaf = self.node_over(chunks, 0, page)?;
        Ok(leaf.and_then(|(_, leaf)| leaf.child(slot(page, 0))))
    }

    /// The node of `level` that covers `page`, and the reference to it; `None`
    /// if all it covers is zero.
    pub fn node_over(
        &self,
        nodes: &impl Nodes,
        level: u8,
        page: u64,
    ) -> Result<Option<(Child, Arc<Node>)>> {
        debug_assert!(page < self.shape.pages() && level <= self.shape.root_level());
        let Some(mut child) = self.root else {
            return Ok(None);
        };
        let mut at_level = self.shape.root_level();
        loop {
            let node = nodes.node(child, at_level)?;
            if at_level == level {
                return Ok(Some((child, node)));
            }
            let Some(next) = node.child(slot(page, at_level)) else {
                return Ok(None);
            };
            child = next;
            at_level -= 1;
        }
    }

    /// The first page from `from` on that is data (`true`) or zero (`false`). What is under a node
    /// that is not at hand counts as data.
    pub fn next(&self, nodes: &impl Nodes, from: u64, data: bool) -> Result<Option<u64>> {
        let found = match self.root {
            _ if from >= self.shape.pages() => None,
            None => (!data).then_some(from),
            Some(root) => next_in(nodes, root, self.shape.root_level(), 0, from, data)?,
        };
        Ok(found.filter(|page| *page < self.shape.pages()))
    }
}

fn next_in(
    nodes: &impl Nodes,
    child: Child,
    level: u8,
    first_page: u64,
    from: u64,
    data: bool,
) -> Result<Option<u64>> {
    let node = match nodes.node(child, level) {
        Err(Error::NotAtHand) => return Ok(data.then_some(from.max(first_page))),
        node => node?,
    };
    let step = pages_per_child(level);
    let first_slot = if from > first_page {
        slot(from, level)
    } else {
        0
    };
    for at in first_slot..FAN_OUT {
        let start = first_page + at as u64 * step;
        match node.child(at) {
            Some(_) if data && level == 0 => return Ok(Some(start)),
            Some(below) if level > 0 => {
                let found = next_in(nodes, below, level - 1, start, from.max(start), data)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            None if !data => return Ok(Some(from.max(start))),
            _ => {}
        }
    }
    debug_assert!(from < first_page + pages_under(level));
    Ok(None)
}
