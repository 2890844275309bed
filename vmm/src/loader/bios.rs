//! What there is of a BIOS: its reset vector.
//!
//! Linux resets a machine with hardware-reduced ACPI, if there is no EFI, in the
//! oldest way: it goes back to real mode and jumps to FFFF:0000
//! (`arch/x86/kernel/reboot.c`, `arch/x86/realmode/rm/reboot.S`). The code there
//! writes to ACPI's reset register.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::addresses::{RESET_PORT, RESET_VALUE, RESET_VECTOR};

/// Writes the code to its place.
pub(super) fn write(ram: &GuestMemoryMmap<()>) -> Result<(), GuestMemoryError> {
    ram.write_obj(reset_code(), GuestAddress(RESET_VECTOR))
}

/// 16-bit code.
fn reset_code() -> [u8; 9] {
    let [port_low, port_high] = RESET_PORT.to_le_bytes();
    [
        0xb0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xba,
        port_low,
        port_high, // mov dx, RESET_PORT
        0xee,      // out dx, al
        0xf4,      // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::{BIOS, VM_GENERATION};

    #[test]
    fn the_code_fits_behind_the_vector() {
        let end = RESET_VECTOR + reset_code().len() as u64;
        assert!(BIOS.contains(&RESET_VECTOR) && end <= BIOS.end);
        const { assert!(VM_GENERATION + 16 <= RESET_VECTOR) };
    }
}
