//! Where guest memory is in the process that maps it.

/// A [`Slot`](super::layout::Slot) and where it is in the process that maps it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct HostSlot {
    /// Where it begins in the guest's physical address space, in bytes.
    pub guest_address: u64,
    /// Where it begins in the image, in bytes.
    pub image_offset: u64,
    /// How long it is in bytes, a multiple of the page size.
    pub length: u64,
    /// Where it begins in the address space of the process that maps it.
    pub host_address: u64,
}

impl HostSlot {
    /// The image offset of a host address that lies in this slot or at its end.
    pub(super) fn image_offset_of(&self, host_address: u64) -> u64 {
        self.image_offset
            .saturating_add(host_address.saturating_sub(self.host_address))
    }

    /// The host address after the slot's last byte.
    pub(super) fn host_end(&self) -> u64 {
        self.host_address.saturating_add(self.length)
    }
}
