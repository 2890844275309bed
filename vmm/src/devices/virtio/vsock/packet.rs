//! The header of a packet, virtio 1.2, section 5.10.6: 44 bytes, little-endian.
//!
//! | offset | field                             |
//! |-------:|-----------------------------------|
//! |      0 | source context id                 |
//! |      8 | destination context id            |
//! |     16 | source port                       |
//! |     20 | destination port                  |
//! |     24 | bytes of payload after the header |
//! |     28 | socket type                       |
//! |     30 | operation                         |
//! |     32 | flags of the operation            |
//! |     36 | the sender's buffer, in bytes     |
//! |     40 | bytes taken out of that buffer    |

/// The length of a header in bytes.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// A stream socket's type.
pub(super) const TYPE_STREAM: u16 = 1;
/// Flag of a shutdown: the sender will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a shutdown: the sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
/// The port that stands for any port.
pub(super) const ANY_PORT: u32 = u32::MAX;

/// What a packet is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// Asks for a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// There is no such connection, or no more.
    Reset,
    /// The sender will send no more, or receive no more.
    Shutdown,
    /// Payload.
    ReadWrite,
    /// Tells how much the sender's buffer has room for.
    CreditUpdate,
    /// Asks for a credit update.
    CreditRequest,
    /// None of these.
    Unknown(u16),
}

impl Operation {
    fn from_wire(value: u16) -> Self {
        match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// The ports of a connection, which name it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// A packet's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub socket_type: u16,
    pub operation: Operation,
    pub flags: u32,
    pub buffer_bytes: u32,
    pub taken_bytes: u32,
}

impl Header {
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            source_cid: u64::from_le_bytes(field(bytes, 0)),
            destination_cid: u64::from_le_bytes(field(bytes, 8)),
            source_port: u32::from_le_bytes(field(bytes, 16)),
            destination_port: u32::from_le_bytes(field(bytes, 20)),
            length: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            operation: Operation::from_wire(u16::from_le_bytes(field(bytes, 30))),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buffer_bytes: u32::from_le_bytes(field(bytes, 36)),
            taken_bytes: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_wire().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_bytes.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.taken_bytes.to_le_bytes());
        bytes
    }

    /// The ports of a packet that the guest sent.
    pub fn ports_from_guest(&self) -> Ports {
        Ports {
            guest: self.source_port,
            host: self.destination_port,
        }
    }
}

/// `N` bytes at an offset that is in the header.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_the_wire(bytes in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform12(any::<u8>())) {
            let mut whole = [0; HEADER_BYTES];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&whole).encode(), whole);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let header = Header {
            source_cid: 3,
            destination_cid: HOST_CID,
            source_port: 0x1122_3344,
            destination_port: 1024,
            length: 5,
            socket_type: TYPE_STREAM,
            operation: Operation::Shutdown,
            flags: SHUTDOWN_BOTH,
            buffer_bytes: 0x1_0000,
            taken_bytes: 7,
        };
        let bytes = header.encode();
        assert_eq!(
            bytes[..16],
            [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(bytes[16..24], [0x44, 0x33, 0x22, 0x11, 0, 4, 0, 0]);
        assert_eq!(bytes[24..36], [5, 0, 0, 0, 1, 0, 4, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[36..], [0, 0, 1, 0, 7, 0, 0, 0]);
    }
}
