//! The device between a driver and real sockets.

mod guest;
mod hostile;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use tempfile::TempDir;

use super::packet::{Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use guest::{Guest, MOMENT, PATIENCE};

const BUFFER: usize = BUFFER_BYTES as usize;

/// A directory for a device's socket.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("vsock.sock")
    }

    fn device(&self) -> Vsock {
        Vsock::new(&self.path(), None).unwrap()
    }

    /// A program of the host asks for a port of the guest.
    fn ask(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    /// A program of the host listens for the guest.
    fn listen(&self, port: u32) -> UnixListener {
        let path = format!("{}_{port}", self.path().display());
        UnixListener::bind(path).unwrap()
    }

    /// A connection that the host asked for.
    fn connected(&self, guest: &mut Guest) -> (UnixStream, Ports) {
        let stream = self.ask(1024);
        let ports = requested(guest, 1024);
        guest.send(ports, Operation::Response);
        let mut answer = String::new();
        // No more than the line is there.
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {}\n", ports.host));
        (stream, ports)
    }
}

/// The guest hears of a host that asks for a port.
fn requested(guest: &mut Guest, port: u32) -> Ports {
    let (header, _) = guest.packet();
    assert_eq!(
        (header.operation, header.destination_port),
        (Operation::Request, port)
    );
    Ports {
        guest: port,
        host: header.source_port,
    }
}

fn read_exactly(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, ports) = place.connected(&mut guest);
    host.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.expect(ports, Operation::ReadWrite);
    assert_eq!(
        (&payload[..], header.buffer_bytes),
        (&b"to the guest"[..], BUFFER_BYTES)
    );
    guest.send_data(ports, b"to the host");
    assert_eq!(read_exactly(&mut host, 11), b"to the host");
    guest.send(ports, Operation::CreditRequest);
    let (header, _) = guest.expect(ports, Operation::CreditUpdate);
    assert_eq!(header.taken_bytes, 11);
    host.write_all(b"last words").unwrap();
    drop(host);
    assert_eq!(guest.expect(ports, Operation::ReadWrite).1, b"last words");
    assert_eq!(
        guest.expect(ports, Operation::Shutdown).0.flags,
        SHUTDOWN_BOTH
    );
    guest.send(ports, Operation::Reset);
    assert!(guest.packet_within(MOMENT).is_none());
}

#[test]
fn the_guest_connects_to_a_socket_named_by_the_port() {
    let place = Place::new();
    let listener = place.listen(52);
    let mut guest = Guest::new(place.device());
    let ports = Ports { guest: 7, host: 52 };
    guest.send(ports, Operation::Request);
    let (mut host, _) = listener.accept().unwrap();
    guest.expect(ports, Operation::Response);
    guest.send_data(ports, b"hello");
    assert_eq!(read_exactly(&mut host, 5), b"hello");
    guest.shut(ports, SHUTDOWN_BOTH);
    guest.expect(ports, Operation::Reset);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    let nobody = Ports { guest: 8, host: 53 };
    guest.send(nobody, Operation::Request);
    guest.expect(nobody, Operation::Reset);
}

#[test]
fn a_guest_that_refuses_closes_the_hosts_socket() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let mut host = place.ask(99);
    let ports = requested(&mut guest, 99);
    guest.send(ports, Operation::Reset);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    for line in [
        "HELLO\n",
        "CONNECT x\n",
        "CONNECT 4294967295\n",
        "CONNECT 1024             1024\n",
    ] {
        let mut host = UnixStream::connect(place.path()).unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)), "{line}");
    }
    assert!(guest.packet_within(MOMENT).is_none());
}

#[test]
fn a_host_that_gives_up_while_it_asks_is_told_to_the_guest() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let host = place.ask(99);
    let ports = requested(&mut guest, 99);
    drop(host);
    guest.expect(ports, Operation::Reset);
    guest.send(ports, Operation::Response);
    guest.expect(ports, Operation::Reset);
}

#[test]
fn a_slow_host_holds_the_guest_back() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, ports) = place.connected(&mut guest);
    let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let copy = sent.clone();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(MOMENT);
        assert!(read_exactly(&mut host, copy.len()) == copy);
        host
    });
    let mut taken = 0;
    for (number, piece) in sent.chunks(32 << 10).enumerate() {
        let before = number * (32 << 10);
        while before + piece.len() - taken > BUFFER {
            taken = guest.expect(ports, Operation::CreditUpdate).0.taken_bytes as usize;
        }
        guest.send_data(ports, piece);
    }
    drop(reader.join().unwrap());
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_the_connection() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (_host, ports) = place.connected(&mut guest);
    let piece = vec![1; BUFFER];
    let ended = (0..64).any(|_| {
        guest.send_data(ports, &piece);
        // Updates of the credit come as long as the host's socket takes bytes.
        std::iter::from_fn(|| guest.packet_within(MOMENT / 10))
            .any(|(header, _)| header.operation == Operation::Reset)
    });
    assert!(ended);
}

#[test]
fn the_hosts_bytes_wait_for_the_guests_credit() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    guest.buffer_bytes = 1000;
    let (mut host, ports) = place.connected(&mut guest);
    host.write_all(&[5; 1700]).unwrap();
    let (_, payload) = guest.expect(ports, Operation::ReadWrite);
    assert_eq!(payload, [5; 1000]);
    guest.expect(ports, Operation::CreditRequest);
    assert!(guest.packet_within(MOMENT).is_none());
    guest.taken_bytes = 300;
    guest.send(ports, Operation::CreditUpdate);
    assert_eq!(guest.expect(ports, Operation::ReadWrite).1.len(), 300);
    guest.expect(ports, Operation::CreditRequest);
    // More taken than was ever sent: no credit at all.
    guest.taken_bytes = 5000;
    guest.send(ports, Operation::CreditUpdate);
    assert!(guest.packet_within(MOMENT).is_none());
    guest.taken_bytes = 1300;
    guest.send(ports, Operation::CreditUpdate);
    assert_eq!(guest.expect(ports, Operation::ReadWrite).1.len(), 400);
}

#[test]
fn each_direction_ends_by_itself() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, ports) = place.connected(&mut guest);
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(
        guest.expect(ports, Operation::Shutdown).0.flags,
        SHUTDOWN_SEND
    );
    guest.send_data(ports, b"still");
    assert_eq!(read_exactly(&mut host, 5), b"still");
    guest.shut(ports, SHUTDOWN_SEND);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // Neither direction is left.
    assert_eq!(
        guest.expect(ports, Operation::Shutdown).0.flags,
        SHUTDOWN_BOTH
    );
    guest.send(ports, Operation::Reset);

    let (mut host, ports) = place.connected(&mut guest);
    guest.shut(ports, SHUTDOWN_RECEIVE);
    guest.send_data(ports, b"deaf");
    assert_eq!(read_exactly(&mut host, 4), b"deaf");
    guest.shut(ports, SHUTDOWN_SEND);
    loop {
        let (header, _) = guest.packet();
        if header.operation == Operation::Reset && header.source_port == ports.host {
            break;
        }
    }
}

#[test]
fn what_the_guest_sent_before_it_left_reaches_the_host() {
    for operation in [Operation::Shutdown, Operation::Reset] {
        let place = Place::new();
        let mut guest = Guest::new(place.device());
        let (mut host, ports) = place.connected(&mut guest);
        let mut sent = 0;
        // Until the host's socket takes no more and some of it is kept.
        for _ in 0..256 {
            guest.send_data(ports, &[9; 32 << 10]);
            sent += 32 << 10;
            if guest.packet_within(MOMENT / 2).is_none() {
                break;
            }
        }
        let header = Header {
            flags: SHUTDOWN_BOTH,
            ..guest.header(ports, operation)
        };
        guest.send_raw(&header.encode(), &[]);
        if operation == Operation::Shutdown {
            guest.expect(ports, Operation::Reset);
        }
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), sent);
    }
}

#[test]
fn an_end_that_is_not_confirmed_is_a_reset_after_a_while() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (host, ports) = place.connected(&mut guest);
    drop(host);
    guest.expect(ports, Operation::Shutdown);
    guest.expect(ports, Operation::Reset);
}

#[test]
fn a_stopped_machine_is_not_touched() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, ports) = place.connected(&mut guest);
    guest.lock().quiesce();
    host.write_all(b"meanwhile").unwrap();
    let other = place.ask(1025);
    assert!(guest.take_used(RECEIVE, MOMENT).is_none());
    guest.lock().resume();
    let packets = [guest.packet().0.operation, guest.packet().0.operation];
    assert!(packets.contains(&Operation::ReadWrite), "{packets:?}");
    assert!(packets.contains(&Operation::Request), "{packets:?}");
    guest.send_data(ports, b"ok");
    assert_eq!(read_exactly(&mut host, 2), b"ok");
    drop(other);
}

#[test]
fn a_restored_guest_is_told_before_anyone_is_let_in() {
    let (place, elsewhere) = (Place::new(), Place::new());
    let mut guest = Guest::new(place.device());
    let (_host, old) = place.connected(&mut guest);
    guest.lock().quiesce();
    let state = guest.lock().save();
    let cid = GuestCid::new(77);
    let device = Vsock::new(&elsewhere.path(), cid).unwrap();
    let mut guest = guest.restored(device, &state);
    let _host = elsewhere.ask(1024);
    let mut config = [0; 8];
    guest.lock().read(0x100, &mut config);
    assert_eq!(u64::from_le_bytes(config), 77);
    guest.lock().resume();
    let (head, event) = guest.take_used(EVENTS, PATIENCE).unwrap();
    assert_eq!(event, [0; 4]);
    // Of the old connection, with the old context id.
    guest.send_data(old, b"late");
    assert!(guest.take_used(RECEIVE, MOMENT).is_none());
    guest.cid = 77;
    guest.recycle(EVENTS, head);
    let ports = requested(&mut guest, 1024);
    guest.send(ports, Operation::Response);
    guest.send_data(old, b"late");
    guest.expect(old, Operation::Reset);
    assert!(guest.take_used(EVENTS, MOMENT).is_none());
}

#[test]
fn a_restored_guest_keeps_its_context_id_unless_it_is_given_one() {
    let (place, elsewhere) = (Place::new(), Place::new());
    let device = Vsock::new(&place.path(), GuestCid::new(9)).unwrap();
    let mut state = device.save();
    assert_eq!(state, VirtioDeviceState::Vsock { guest_cid: 9 });
    let mut device = elsewhere.device();
    device.restore(&state).unwrap();
    assert_eq!(device.save(), state);
    for guest_cid in [0, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        state = VirtioDeviceState::Vsock { guest_cid };
        assert_eq!(device.restore(&state), Err("context id"));
    }
    assert_eq!(device.restore(&VirtioDeviceState::Entropy), Err("kind"));
}

#[test]
fn a_guest_that_starts_anew_has_no_connections() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, ports) = place.connected(&mut guest);
    guest.start();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    guest.post(RECEIVE, 8);
    guest.send_data(ports, b"x");
    guest.expect(ports, Operation::Reset);
    place.connected(&mut guest);
}

#[test]
fn a_device_leaves_nothing_behind() {
    let place = Place::new();
    let mut guest = Guest::new(place.device());
    let (mut host, _) = place.connected(&mut guest);
    drop(guest);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // The supervisor of a confined machine removes its directory.
    assert_eq!(place.path().exists(), crate::confine::is_confined());
}
