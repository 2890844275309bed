//! Flat programs: loaded as they are, all vCPUs begin at once.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use vm_memory::{Bytes as _, GuestAddress};

use super::Entry;
use crate::error::{Error, Result};
use crate::memory::{DEVICE_HOLE_START, GuestMemory};

/// Where a flat program is loaded and begins, a guest-physical address.
pub const FLAT_ADDRESS: u64 = 1 << 20;

pub(super) fn load(path: &Path, memory: &GuestMemory) -> Result<Entry> {
    let file_error = |action| {
        move |source| Error::File {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let room = memory.layout().size_bytes().min(DEVICE_HOLE_START) - FLAT_ADDRESS;
    let mut program = Vec::new();
    let file = File::open(path).map_err(file_error("open"))?;
    file.take(room + 1)
        .read_to_end(&mut program)
        .map_err(file_error("read"))?;
    if program.is_empty() || program.len() as u64 > room {
        return Err(Error::KernelSize {
            path: path.to_owned(),
            room_bytes: room,
        });
    }
    memory
        .ram()
        .write_slice(&program, GuestAddress(FLAT_ADDRESS))
        .map_err(|_| Error::KernelSize {
            path: path.to_owned(),
            room_bytes: room,
        })?;
    Ok(Entry::flat(FLAT_ADDRESS))
}
