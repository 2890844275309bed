//! A bzImage: the form in which distributions ship Linux.
//!
//! ```text
//! 0x000            code that is not used here
//! 0x1f1            setup header
//! (sectors + 1) * 512   the kernel: loaded as it is; 64-bit entry at its 0x200
//! ```
//!
//! The kernel unpacks itself to its preferred address or, randomised, elsewhere.
//! Kernel documentation, `arch/x86/boot.rst`.

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader as _};
use vm_memory::{ByteValued as _, GuestAddress};

use super::Entry;
use super::image::{Image, Source, low_memory_end};
use super::zero_page::PROTOCOL_2_12;
use crate::addresses::HIGH_MEMORY;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// Where the setup header is in the file.
const HEADER_AT: u64 = 0x1f1;
/// Where the 64-bit entry is in the loaded kernel.
const ENTRY_64: u64 = 0x200;

/// Loads the kernel of a bzImage.
pub(super) fn load(source: &mut Source<'_>, memory: &GuestMemory) -> Result<Image> {
    let header = read_header(source)?;
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (sectors + 1) * 512;
    let kernel_bytes = u64::from(header.syssize) * 16;
    source.needs(setup_bytes + kernel_bytes.max(ENTRY_64 + 1))?;

    let address = if header.relocatable_kernel == 0 {
        header.pref_address
    } else {
        HIGH_MEMORY
    };
    if address < HIGH_MEMORY {
        return Err(source.unsupported("it wants to be loaded below 1 MiB"));
    }
    // From here to there the kernel unpacks itself, if it stays where it prefers.
    let unpacked = address.max(header.pref_address);
    let end = address
        .saturating_add(source.length - setup_bytes)
        .max(unpacked.saturating_add(header.init_size.into()));
    source.fits(end, low_memory_end(memory))?;

    let at = GuestAddress(address);
    let loaded = BzImage::load(memory.ram(), Some(at), &mut source.file, None)
        .map_err(|error| source.malformed(error))?;
    let mut header = loaded.setup_header.unwrap_or(header);
    forget_beyond_end(&mut header);
    Ok(Image {
        entry: Entry::linux64(address + ENTRY_64),
        end,
        header,
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
        cmdline_limit: header.cmdline_size.into(),
    })
}

fn read_header(source: &Source<'_>) -> Result<setup_header, Error> {
    let mut header = setup_header::default();
    source.read_at(header.as_mut_slice(), HEADER_AT)?;
    if header.version < PROTOCOL_2_12 {
        return Err(source.unsupported("its boot protocol is older than 2.12 (Linux 3.8)"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(source.unsupported("it is a zImage, not a bzImage"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(source.unsupported("it is not a 64-bit kernel"));
    }
    Ok(header)
}

/// Clears what is behind the end of the header that this kernel has: the jump at
/// its begin goes over it.
fn forget_beyond_end(header: &mut setup_header) {
    let [_, distance] = header.jump.to_le_bytes();
    let end = 0x202 + usize::from(distance);
    let begin = 0x1f1;
    let bytes = header.as_mut_slice();
    if let Some(beyond) = bytes.get_mut(end - begin..) {
        beyond.fill(0);
    }
}
