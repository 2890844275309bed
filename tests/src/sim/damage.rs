//! What a disk does by itself: it loses files, and flips bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::plan::Damage;
use super::world::{Shared, World};

/// Length of a pack's header.
const HEADER: usize = 32;
/// Length of a part that cannot be read.
const SECTOR: u64 = 512;

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
    let at = which / packs.len();
    let done = match kind {
        Damage::LosePack => fs::remove_file(path),
        Damage::FlipByte => flip(path, at),
        Damage::BadSector => spoil(world, path, at),
        Damage::LoseIndex => return lose_index(world, &mut shared),
    };
    if let Err(error) = done {
        drop(shared);
        return world.fail("the simulator cannot damage a pack", error.to_string());
    }
    if matches!(kind, Damage::FlipByte | Damage::BadSector) {
        shared.flipped = true;
    }
    shared.damaged = true;
    shared.damage_count += 1;
    shared.changes += 1;
    shared.firm.clear();
    shared.disk.forgets(path);
}

/// Some bytes cannot be read from now on.
fn spoil(world: &World, path: &Path, at: usize) -> std::io::Result<()> {
    let len = usize::try_from(fs::metadata(path)?.len()).unwrap_or(usize::MAX);
    let start = (HEADER + at % (len - HEADER)) as u64;
    let mut bad = world.bad.lock().unwrap_or_else(PoisonError::into_inner);
    bad.push((path.to_owned(), start..start + SECTOR));
    Ok(())
}

/// Until it is repaired nothing can be found, and then all of it.
fn lose_index(world: &World, shared: &mut Shared) {
    let index = world.root.join("index");
    if fs::remove_dir_all(&index).is_ok() {
        shared.index_lost = true;
        shared.damage_count += 1;
        shared.changes += 1;
        shared.disk.forgets(&index);
    }
}

/// A new file, since processes may have the old one mapped.
fn flip(path: &PathBuf, at: usize) -> std::io::Result<()> {
    let mut bytes = fs::read(path)?;
    let at = HEADER + at % (bytes.len() - HEADER);
    bytes[at] ^= 0x10;
    fs::remove_file(path)?;
    fs::write(path, bytes)
}
