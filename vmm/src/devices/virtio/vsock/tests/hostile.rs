//! Guests that break the rules.

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;

use super::*;
use crate::devices::virtio::vsock::packet::{ANY_PORT, HOST_CID, TYPE_STREAM};

fn needs_reset(guest: &Guest) -> bool {
    guest.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
}

#[test]
fn packets_that_do_not_fit_are_answered_by_a_reset() {
    let place = Place::new();
    let _listener = place.listen(52);
    let mut guest = Guest::new(place.device());
    let ports = Ports { guest: 9, host: 52 };
    let plain = guest.header(ports, Operation::ReadWrite);
    let misfits = [
        (plain, b"".as_slice()),
        (Header { length: 5, ..plain }, b"1234"),
        (
            Header {
                length: u32::MAX,
                ..plain
            },
            b"1234",
        ),
        (
            Header {
                length: BUFFER_BYTES + 1,
                ..plain
            },
            &[0; BUFFER + 1],
        ),
        (
            Header {
                operation: Operation::Response,
                ..plain
            },
            b"",
        ),
        (
            Header {
                operation: Operation::Request,
                ..plain
            },
            b"",
        ),
        (
            Header {
                operation: Operation::Unknown(0),
                ..plain
            },
            b"",
        ),
        (
            Header {
                operation: Operation::Unknown(8),
                ..plain
            },
            b"",
        ),
        (
            Header {
                operation: Operation::CreditUpdate,
                length: 1,
                ..plain
            },
            b"1",
        ),
        (
            Header {
                socket_type: 2,
                ..plain
            },
            b"",
        ),
    ];
    for (number, (header, payload)) in misfits.into_iter().enumerate() {
        let fits = number == 0;
        guest.send(ports, Operation::Request);
        guest.expect(ports, Operation::Response);
        guest.send_raw(&header.encode(), payload);
        if fits {
            assert!(guest.packet_within(MOMENT).is_none());
            guest.send(ports, Operation::Reset);
            continue;
        }
        let (reset, _) = guest.expect(ports, Operation::Reset);
        assert_eq!(reset.socket_type, header.socket_type);
        assert!(guest.packet_within(MOMENT / 10).is_none());
    }
    let nobody = Ports {
        guest: ANY_PORT,
        host: 52,
    };
    guest.send(nobody, Operation::Request);
    guest.expect(nobody, Operation::Reset);
    assert!(!needs_reset(&guest));
}

#[test]
fn strangers_and_resets_are_not_answered() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let ports = Ports { guest: 9, host: 52 };
    let plain = guest.header(ports, Operation::ReadWrite);
    for header in [
        Header {
            source_cid: 4,
            ..plain
        },
        Header {
            destination_cid: 3,
            ..plain
        },
        Header {
            destination_cid: HOST_CID | 1 << 32,
            ..plain
        },
        Header {
            operation: Operation::Reset,
            ..plain
        },
    ] {
        guest.send_raw(&header.encode(), &[]);
    }
    assert!(guest.packet_within(MOMENT).is_none());
}

#[test]
fn a_packet_without_a_whole_header_breaks_the_device() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    guest.send_raw(&[0; HEADER_BYTES - 1], &[]);
    assert!(needs_reset(&guest));
    guest.start();
    guest.post(RECEIVE, 8);
    place.connected(&mut guest);
}

#[test]
fn resets_and_requests_without_end_are_bounded() {
    let place = Place::new();
    let _listener = place.listen(52);
    let device = place.device();
    let shared = device.shared.clone();
    // No buffers to receive in.
    let mut guest = Guest::new(device);
    guest.start();
    for round in 0..3000 {
        let ports = Ports {
            guest: round % 3,
            host: 52,
        };
        guest.send(ports, Operation::Request);
        guest.send(
            Ports {
                guest: round,
                host: 1,
            },
            Operation::ReadWrite,
        );
        guest.send(ports, Operation::Reset);
    }
    let shared = lock(&shared);
    let (connections, waiting) = shared.table.sizes();
    assert!(
        connections <= 3 && waiting <= 1030,
        "{connections} {waiting}"
    );
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0_u32..4,
        2 => Just(52),
        1 => Just(BUFFER_BYTES),
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ]
}

prop_compose! {
    fn header()(
        cids in (prop_oneof![9 => Just(3_u64), 1 => any::<u64>()], prop_oneof![9 => Just(2_u64), 1 => any::<u64>()]),
        source_port in 0_u32..3,
        destination_port in prop_oneof![5 => Just(52_u32), 1 => number()],
        length in number(),
        socket_type in prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()],
        operation in 0_u16..9,
        flags in number(),
        credit in (number(), number()),
    ) -> Header {
        let bytes = Header {
            source_cid: cids.0,
            destination_cid: cids.1,
            source_port,
            destination_port,
            length,
            socket_type,
            operation: Operation::Unknown(operation),
            flags,
            buffer_bytes: credit.0,
            taken_bytes: credit.1,
        }
        .encode();
        Header::decode(&bytes)
    }
}

/// What a hostile guest does, and the host meanwhile.
#[derive(Clone, Debug)]
enum Step {
    Packet(Header, u16),
    Fitting(Header),
    Take,
    HostSends(u16),
    HostReads,
    HostLeaves,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (header(), 0_u16..300).prop_map(|(header, length)| Step::Packet(header, length)),
        5 => (header(), 0_u32..300).prop_map(|(header, length)| {
            let data = header.operation == Operation::ReadWrite;
            Step::Fitting(Header { length: if data { length } else { 0 }, ..header })
        }),
        3 => Just(Step::Take),
        2 => (0_u16..9000).prop_map(Step::HostSends),
        1 => Just(Step::HostReads),
        1 => Just(Step::HostLeaves),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_packet_harms_the_device(steps in prop::collection::vec(step(), 1..80)) {
        let place = Place::new();
        let listener = place.listen(52);
        listener.set_nonblocking(true).unwrap();
        let mut guest = Guest::new(place.device());
        let mut hosts = Vec::new();
        for step in steps {
            if let Ok((host, _)) = listener.accept() {
                host.set_nonblocking(true).unwrap();
                hosts.push(host);
            }
            match step {
                Step::Packet(header, length) => {
                    guest.send_raw(&header.encode(), &vec![7; length.into()]);
                }
                Step::Fitting(header) => {
                    guest.send_raw(&header.encode(), &vec![8; header.length as usize]);
                }
                Step::Take => {
                    guest.packet_within(Duration::ZERO);
                }
                Step::HostSends(length) => {
                    for host in &mut hosts {
                        let _ = host.write(&vec![1; length.into()]);
                    }
                }
                Step::HostReads => {
                    for host in &mut hosts {
                        let _ = host.read(&mut [0; 4096]);
                    }
                }
                Step::HostLeaves => {
                    hosts.pop();
                }
            }
            prop_assert!(!needs_reset(&guest));
        }
        // One that keeps to the rules is served.
        let ports = Ports { guest: 500, host: 52 };
        drop(hosts);
        guest.send(ports, Operation::Request);
        loop {
            let (header, _) = guest.packet();
            if header.destination_port == 500 {
                prop_assert_eq!(header.operation, Operation::Response);
                break;
            }
        }
    }
}
