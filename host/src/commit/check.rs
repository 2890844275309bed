//! A check of commits, for tests: the snapshot against the memory that was frozen, whole.
//!
//! What a commit reads is what the kernel said was written. Here all of the memory is
//! read, whatever the kernel said, so that a page that it left out is found.

use anyhow::bail;
use snapstore_store::{Manifest, Store};
use snapstore_vmm::control::FrozenMachine;

/// Set to 1, every commit of a machine is checked, which takes as long as reading all of
/// its memory.
const VARIABLE: &str = "SNAPSTORE_CHECK_COMMITS";

/// Read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Whether commits are to be checked.
pub fn is_wanted() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// Compares the committed memory with what was frozen, all of which must be there.
pub fn check(store: &Store, manifest: &Manifest, frozen: &FrozenMachine) -> anyhow::Result<()> {
    let Some(image) = manifest.image("memory") else {
        bail!("the snapshot has no memory");
    };
    let reader = store.image_reader(image);
    let (mut stored, mut was) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut wrong = Vec::new();
    for slot in frozen.slots() {
        let mut at = slot.image_offset;
        let end = slot.image_offset + slot.length;
        while at < end {
            let length = usize::try_from(end - at).map_or(PIECE_BYTES, |n| n.min(PIECE_BYTES));
            reader.read_at(&mut stored[..length], at)?;
            frozen.read_exact_at(&mut was[..length], at)?;
            let pages = stored[..length]
                .chunks(4096)
                .zip(was[..length].chunks(4096));
            let differ = (at / 4096..).zip(pages).filter(|(_, (a, b))| a != b);
            wrong.extend(differ.map(|(page, _)| page));
            at += length as u64;
        }
    }
    if !wrong.is_empty() {
        bail!(
            "{} pages of the snapshot are not what the machine's memory was, the first of them \
             page {}: this is a fault of snapstore or of the kernel",
            wrong.len(),
            wrong[0]
        );
    }
    Ok(())
}
