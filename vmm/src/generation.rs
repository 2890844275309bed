//! The VM generation identifier (Microsoft, "Virtual Machine Generation ID"): 16
//! bytes of guest memory that are others in every machine. A guest with a driver,
//! Linux 5.18 or newer, seeds its random generator anew when it is told of a change.

use kvm_ioctls::VmFd;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes as _, GuestAddress};

use crate::addresses::EVENT_GSI;
use crate::error::{Error, KvmContext as _, OsContext as _, Result};
use crate::memory::{GuestMemory, MemoryLayout};

type Identifier = [u8; 16];

/// Whether an identifier at this guest-physical address is all memory.
pub(crate) fn fits(address: u64, layout: &MemoryLayout) -> bool {
    let last = address.checked_add(size_of::<Identifier>() as u64 - 1);
    last.is_some_and(|last| layout.is_ram(address) && layout.is_ram(last))
}

/// Gives the machine an identifier that no other has.
///
/// # Errors
/// No memory at the address, or no random bytes.
pub(crate) fn renew(address: u64, memory: &GuestMemory) -> Result<()> {
    let mut identifier: Identifier = [0; 16];
    // The kernel gives up to 256 bytes whole.
    getrandom(&mut identifier, GetRandomFlags::empty()).os("get random bytes")?;
    memory
        .ram()
        .write_obj(identifier, GuestAddress(address))
        .map_err(|_| Error::NoMemoryAt { address })
}

/// Tells the guest that its identifier is another one: the interrupt of the generic
/// event device of its ACPI tables. It waits in the interrupt controllers, which must
/// have been restored, until the guest runs.
///
/// # Errors
/// What KVM refuses.
pub(crate) fn announce(vm: &VmFd) -> Result<()> {
    for level in [true, false] {
        vm.set_irq_line(EVENT_GSI, level)
            .kvm("raise the interrupt of the VM generation")?;
    }
    Ok(())
}
