//! Buffers that a thread uses again: the read path allocates nothing.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers kept per thread. A read nests at most three deep: a node, its stored
/// bytes, and those of its base.
const KEPT: usize = 8;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer, given back to its thread when dropped.
pub(crate) struct Scratch(Vec<u8>);

impl Scratch {
    /// Takes a buffer; nested calls get different ones.
    pub fn take() -> Self {
        Self(FREE.with_borrow_mut(Vec::pop).unwrap_or_default())
    }

    /// Takes a buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
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
        let mut buffer = std::mem::take(&mut self.0);
        buffer.clear();
        // A thread that ends has no list any more.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}
