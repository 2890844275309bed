//! The payloads `virtio-*`, one a device: how each kind is read and written, and its bytes.
//!
//! Another device is a row in [`KINDS`], a structure, an arm in [`payload`], and its bytes
//! in the tests, which stay as they are for ever.

use serde::{Deserialize, Serialize};

use super::parts::Kind;
use super::payload::Payload;
use super::wire::{exactly, wire};
use crate::state::{
    MAX_VIRTIO_QUEUES, StateError, VirtioDeviceState, VirtioQueueState, VirtioState, bounded,
};

/// The kinds of devices, in the order of their names.
pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "virtio-block",
        versions: &[|parts, number, bytes| {
            let block: Block1 = exactly(bytes, |block: &Block1| block.transport.check(number))?;
            let device = VirtioDeviceState::Block {
                capacity_sectors: block.capacity_sectors,
                read_only: block.read_only,
            };
            parts.virtio.push((number, block.transport.of(device)));
            Ok(())
        }],
    },
    Kind {
        name: "virtio-entropy",
        versions: &[|parts, number, bytes| {
            let transport: Transport1 =
                exactly(bytes, |transport: &Transport1| transport.check(number))?;
            let entropy = transport.of(VirtioDeviceState::Entropy);
            parts.virtio.push((number, entropy));
            Ok(())
        }],
    },
    Kind {
        name: "virtio-net",
        versions: &[|parts, number, bytes| {
            let net: Net1 = exactly(bytes, |net: &Net1| net.transport.check(number))?;
            let device = VirtioDeviceState::Net { mac: net.mac };
            parts.virtio.push((number, net.transport.of(device)));
            Ok(())
        }],
    },
    Kind {
        name: "virtio-vsock",
        versions: &[|parts, number, bytes| {
            let vsock: Vsock1 = exactly(bytes, |vsock: &Vsock1| vsock.transport.check(number))?;
            let device = VirtioDeviceState::Vsock {
                guest_cid: vsock.guest_cid,
            };
            parts.virtio.push((number, vsock.transport.of(device)));
            Ok(())
        }],
    },
];

/// The payload of a device, of the newest version of its kind.
pub(super) fn payload(window: u32, state: &VirtioState) -> Payload<'static> {
    let transport = Transport1::from(state);
    let (kind, bytes) = match state.device {
        VirtioDeviceState::Block {
            capacity_sectors,
            read_only,
        } => {
            let block = Block1 {
                transport,
                capacity_sectors,
                read_only,
            };
            ("virtio-block", wire(&block))
        }
        VirtioDeviceState::Entropy => ("virtio-entropy", wire(&transport)),
        VirtioDeviceState::Vsock { guest_cid } => {
            let vsock = Vsock1 {
                transport,
                guest_cid,
            };
            ("virtio-vsock", wire(&vsock))
        }
        VirtioDeviceState::Net { mac } => ("virtio-net", wire(&Net1 { transport, mac })),
    };
    Payload::needed(kind, 1, window, bytes)
}

/// The registers of a virtio device's transport.
#[derive(Serialize, Deserialize)]
struct Transport1 {
    status: u8,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u8,
    config_generation: u32,
    #[serde(deserialize_with = "bounded::list::<_, _, { MAX_VIRTIO_QUEUES }>")]
    queues: Vec<VirtioQueueState>,
}

#[derive(Serialize, Deserialize)]
struct Block1 {
    transport: Transport1,
    capacity_sectors: u64,
    read_only: bool,
}

#[derive(Serialize, Deserialize)]
struct Net1 {
    transport: Transport1,
    mac: [u8; 6],
}

#[derive(Serialize, Deserialize)]
struct Vsock1 {
    transport: Transport1,
    guest_cid: u64,
}

impl From<&VirtioState> for Transport1 {
    fn from(state: &VirtioState) -> Self {
        Self {
            status: state.status,
            driver_features: state.driver_features,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            queue_select: state.queue_select,
            interrupt_status: state.interrupt_status,
            config_generation: state.config_generation,
            queues: state.queues.clone(),
        }
    }
}

impl Transport1 {
    /// The transport of this device.
    fn of(self, device: VirtioDeviceState) -> VirtioState {
        VirtioState {
            device,
            status: self.status,
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self.queues,
        }
    }

    /// A list that is too long is not kept whole.
    fn check(&self, window: u32) -> Result<(), StateError> {
        if self.queues.len() > MAX_VIRTIO_QUEUES {
            return Err(StateError::Virtio {
                device: window as usize,
                what: "an impossible number of queues",
            });
        }
        Ok(())
    }
}

/// The state that is read of what is written of one: who restores a device in a test sees
/// that its kind can be read.
#[cfg(test)]
pub(crate) fn through_its_bytes(state: &VirtioState) -> VirtioState {
    let read = super::parts::parts(vec![payload(0, state)], &[KINDS]);
    let mut devices = read.expect("it can be read: its kind is in `KINDS`").virtio;
    devices.remove(0).1
}

#[cfg(test)]
mod tests {
    use super::super::parts::parts;
    use super::super::payload::KIND_BYTES;
    use super::super::tests::virtio;
    use super::*;

    /// What the payload of each kind and version holds, behind the transport's
    /// [`TRANSPORT`]. A row stays for ever: snapshots have these bytes.
    fn frozen() -> Vec<(&'static str, u32, VirtioDeviceState, &'static [u8])> {
        vec![
            (
                "virtio-block",
                1,
                VirtioDeviceState::Block {
                    capacity_sectors: 1_228_800,
                    read_only: true,
                },
                &[0x80, 0x80, 0x4b, 1],
            ),
            ("virtio-entropy", 1, VirtioDeviceState::Entropy, &[]),
            (
                "virtio-net",
                1,
                VirtioDeviceState::Net {
                    mac: [2, 0x11, 0x22, 0x33, 0x44, 0x55],
                },
                &[2, 0x11, 0x22, 0x33, 0x44, 0x55],
            ),
            (
                "virtio-vsock",
                1,
                VirtioDeviceState::Vsock { guest_cid: 300 },
                &[0xac, 0x02],
            ),
        ]
    }

    /// The registers of [`virtio`]'s transport in version 1.
    const TRANSPORT: &[u8] = &[
        0x0f, 0xf6, 0xcc, 0x80, 0x80, 0x10, 0x01, 0x01, 0x00, 0x01, 0x03, 0x01, 0x80, 0x01, 0x40,
        0x01, 0xd0, 0xe8, 0x48, 0x82, 0x80, 0x80, 0x80, 0x10, 0xe4, 0x8a, 0x8d, 0x01, 0xfe, 0xff,
        0x03, 0xfd, 0xff, 0x03,
    ];

    #[test]
    fn the_bytes_of_each_kind_and_version_are_read_for_ever() {
        for (kind, version, device, own) in frozen() {
            let mut payload = payload(3, &virtio(device.clone()));
            if (payload.kind, payload.version) == (kind, version) {
                let wanted = [TRANSPORT, own].concat();
                assert_eq!(
                    *payload.bytes, wanted,
                    "what {kind} {version} is written as"
                );
            }
            (payload.kind, payload.version) = (kind, version);
            payload.bytes = [TRANSPORT, own].concat().into();
            let read = parts(vec![payload], &[KINDS]).unwrap();
            assert_eq!(read.virtio, [(3, virtio(device))], "{kind} {version}");
        }
    }

    #[test]
    fn each_kind_and_version_has_its_bytes_in_this_file() {
        for kind in KINDS {
            assert!(kind.name.len() <= KIND_BYTES, "{} is too long", kind.name);
            for version in (1..).take(kind.versions.len()) {
                assert!(
                    frozen()
                        .iter()
                        .any(|row| (row.0, row.1) == (kind.name, version)),
                    "{} {version}: add a row to `frozen`",
                    kind.name
                );
            }
        }
    }
}
