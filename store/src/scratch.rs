//! Buffers that a thread uses again: reading a page allocates nothing.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers kept per thread. A read nests at most three deep: a node, its stored
/// bytes, and those of its base.
const KEPT: usize = 8;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer with whatever it was last used for, given back to its thread when dropped. Nobody
/// reads more of it than was written: to clear it takes as long as a short read.
pub(crate) struct Scratch(Vec<u8>);

impl Scratch {
    /// Takes a buffer; nested calls get different ones.
    pub fn take() -> Self {
        Self(FREE.with_borrow_mut(Vec::pop).unwrap_or_default())
    }

    /// Takes a buffer of `len` bytes to be written over.
    pub fn of_len(len: usize) -> Self {
        let mut buffer = Self::take();
        buffer.resize(len, 0);
        buffer
    }
}

impl Deref for Scratch {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // A thread that ends has no list any more.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}
