//! What a disk does by itself: it loses files, and flips bytes.

use std::fs;
use std::path::PathBuf;

use super::plan::Damage;
use super::world::World;

/// Length of a pack's header.
const HEADER: usize = 32;

/// Damages one of the packs, if there is one.
pub fn inflict(world: &World, kind: Damage, which: u32) {
    let mut packs: Vec<PathBuf> = fs::read_dir(world.root.join("packs"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|it| it == "pack"))
        .collect();
    packs.sort();
    let mut shared = world.lock();
    if packs.is_empty() {
        return;
    }
    let which = which as usize;
    let path = &packs[which % packs.len()];
    let done = match kind {
        Damage::LosePack => fs::remove_file(path),
        Damage::FlipByte => flip(path, which / packs.len()),
    };
    if let Err(error) = done {
        drop(shared);
        return world.fail("the simulator cannot damage a pack", error.to_string());
    }
    if kind == Damage::FlipByte {
        shared.flipped = true;
    }
    shared.damaged = true;
    shared.damage_count += 1;
    shared.changes += 1;
    shared.firm.clear();
    shared.disk.forgets(path);
}

/// A new file, since processes may have the old one mapped.
fn flip(path: &PathBuf, at: usize) -> std::io::Result<()> {
    let mut bytes = fs::read(path)?;
    let at = HEADER + at % (bytes.len() - HEADER);
    bytes[at] ^= 0x10;
    fs::remove_file(path)?;
    fs::write(path, bytes)
}
