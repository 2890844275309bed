//! Building a page tree from leaves, bottom up, with one open node per level.

use crate::chunks::Chunks;
use crate::error::Result;
use crate::format::node::{Child, FAN_OUT, Node};
use crate::tree::read::Tree;
use crate::tree::shape::{Shape, pages_under};

/// Where finished nodes go.
pub(crate) trait NodeSink {
    /// Stores a node that has children; `previous` is what stood in its place.
    fn put_node(&mut self, node: &Node, previous: Option<Child>) -> Result<Child>;
}

/// What leaves that are not given are taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HolePolicy {
    /// They are zero.
    Zero,
    /// They are the parent's.
    Inherited,
}

/// Builds one tree. Memory: one node per level.
pub(crate) struct TreeBuilder<'a> {
    shape: Shape,
    chunks: &'a Chunks,
    /// A tree of the same shape whose nodes are predecessors of the new ones.
    parent: Option<Tree>,
    holes: HolePolicy,
    /// The open node of level i + 1 at position i.
    open: Vec<Option<OpenNode>>,
    root: Option<Option<Child>>,
}

struct OpenNode {
    index: u64,
    node: Node,
    previous: Option<Child>,
}

impl<'a> TreeBuilder<'a> {
    pub fn new(shape: Shape, chunks: &'a Chunks, parent: Option<Tree>, holes: HolePolicy) -> Self {
        Self {
            shape,
            chunks,
            parent: parent.filter(|tree| tree.shape() == shape),
            holes,
            open: (0..shape.root_level()).map(|_| None).collect(),
            root: None,
        }
    }

    /// Sets the leaf with this index. Indexes must rise.
    pub fn put_leaf(
        &mut self,
        index: u64,
        leaf: Option<Child>,
        sink: &mut dyn NodeSink,
    ) -> Result<()> {
        self.put(0, index, leaf, sink)
    }

    /// Closes what is open; returns the finished tree.
    pub fn finish(mut self, sink: &mut dyn NodeSink) -> Result<Tree> {
        for level in 1..=self.shape.root_level() {
            self.close(level, sink)?;
        }
        let root = match (self.root, self.holes) {
            (Some(root), _) => root,
            (None, HolePolicy::Zero) => None,
            (None, HolePolicy::Inherited) => self.parent.and_then(|tree| tree.root()),
        };
        Ok(Tree::new(self.shape, root))
    }

    fn put(
        &mut self,
        level: u8,
        index: u64,
        child: Option<Child>,
        sink: &mut dyn NodeSink,
    ) -> Result<()> {
        if level == self.shape.root_level() {
            debug_assert_eq!(index, 0);
            self.root = Some(child);
            return Ok(());
        }
        let above = index / FAN_OUT as u64;
        let position = usize::from(level);
        if self.open[position]
            .as_ref()
            .is_some_and(|open| open.index != above)
        {
            self.close(level + 1, sink)?;
        }
        if self.open[position].is_none() {
            self.open[position] = Some(self.open_node(level + 1, above)?);
        }
        let open = self.open[position].as_mut().expect("just opened");
        let slot = usize::try_from(index % FAN_OUT as u64).expect("a slot is below 512");
        open.node.set_child(slot, child);
        Ok(())
    }

    fn open_node(&self, level: u8, index: u64) -> Result<OpenNode> {
        let old = match self.parent {
            Some(tree) => {
                let found = tree.node_over(self.chunks, level, index * pages_under(level));
                match (found, self.holes) {
                    // Only to make the new node small: without, it is stored standalone.
                    (Err(error), HolePolicy::Zero) if error.is_lost() => None,
                    (found, _) => found?,
                }
            }
            None => None,
        };
        let previous = old.as_ref().map(|(child, _)| *child);
        let node = match (old, self.holes) {
            (Some((_, node)), HolePolicy::Inherited) => (*node).clone(),
            _ => Node::empty(level),
        };
        Ok(OpenNode {
            index,
            node,
            previous,
        })
    }

    fn close(&mut self, level: u8, sink: &mut dyn NodeSink) -> Result<()> {
        let Some(open) = self.open[usize::from(level) - 1].take() else {
            return Ok(());
        };
        let child = if open.node.is_zero() {
            None
        } else {
            Some(sink.put_node(&open.node, open.previous)?)
        };
        self.put(level, open.index, child, sink)
    }
}
