//! What is read of a machine before it is frozen, so that its guest stands still for little.

use std::ops::Range;
use std::sync::Arc;

use anyhow::bail;
use snapstore_store::{Extent, ImageRole, Input, InputData, Precopy, Progress, Store};
use snapstore_vmm::control::Committer;
use snapstore_vmm::memory::HostSlot;

use super::{Base, CommitTarget};
use crate::runtime::VmDir;

/// The most often that a guest's memory is read before it is frozen. One that writes half
/// as fast as it is read leaves an eighth after four times.
const MAX_ROUNDS: u32 = 4;

/// What the rounds have stored.
pub struct Read<'a> {
    pub precopy: Precopy<'a>,
    pub bytes: u64,
}

/// Reads memory while the guest runs, as long as that leaves less for the pause. `None` if
/// there was nothing to be gained.
pub fn read<'a>(
    store: &'a Store,
    vm: &VmDir,
    wanted: &CommitTarget,
    committer: &mut Committer,
    progress: &dyn Progress,
) -> anyhow::Result<Option<Read<'a>>> {
    let mut read: Option<Read<'a>> = None;
    let mut before = u64::MAX;
    for _ in 0..MAX_ROUNDS {
        let Some(live) = committer.next_round()? else {
            break;
        };
        let base = Base::of(&live.origin)?;
        let so_far = match &mut read {
            Some(read) => read,
            None => {
                base.check(store, &vm.name)?;
                let precopy = store.precopy(&base.parent, &wanted.tag)?;
                read.insert(Read { precopy, bytes: 0 })
            }
        };
        let input = Input {
            name: "memory".to_owned(),
            role: ImageRole::Memory,
            data: InputData::Extents {
                files: vec![Arc::new(live.memory)],
                label: "the machine's memory".to_owned(),
                size_bytes: live.slots.iter().map(|slot| slot.length).sum(),
                extents: extents(&live.slots, &live.written)?,
            },
            kind: base.kind,
        };
        so_far.precopy.read(&input, progress)?;
        let bytes = live.written.iter().map(|r| r.end - r.start).sum::<u64>();
        so_far.bytes += bytes;
        // A guest that writes about as fast as it is read leaves no less the next time.
        if bytes > before / 2 {
            break;
        }
        before = bytes;
    }
    Ok(read)
}

/// Where in the memory's file these ranges are. A range lies in one slot or goes over from
/// one to the next.
pub fn extents(slots: &[HostSlot], written: &[Range<u64>]) -> anyhow::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    for range in written {
        let mut at = range.start;
        while at < range.end {
            let slot = slots
                .iter()
                .find(|slot| (slot.image_offset..slot.image_offset + slot.length).contains(&at));
            let Some(slot) = slot else {
                bail!("the machine changed memory that it does not have");
            };
            let end = range.end.min(slot.image_offset + slot.length);
            extents.push(Extent {
                image_offset: at,
                file: 0,
                file_offset: slot.host_address + (at - slot.image_offset),
                length: end - at,
            });
            at = end;
        }
    }
    Ok(extents)
}
