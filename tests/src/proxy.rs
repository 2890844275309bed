//! What stands between a program and a server: a line with a delay and a limit, which may
//! be cut, and on which nothing may come through for a while.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What is read at once.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces on their way in one direction of a connection: 16 MiB.
const PIECES: usize = 1024;

/// What a line is like.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Line {
    /// From a request to its answer's first byte, beside what the server takes.
    pub round_trip: Duration,
    /// In either direction, for all connections; none without it.
    pub bytes_per_second: Option<f64>,
}

/// A proxy, for as long as it lives.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    line: Mutex<Line>,
    /// When the line has nothing to send any more: to the server, and from it.
    free: [Mutex<Instant>; 2],
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
    /// Bytes that went each way.
    moved: [AtomicU64; 2],
}

#[derive(Debug, Default)]
struct State {
    is_cut: bool,
    is_held: bool,
    /// Connections that are held on their own, by their numbers: all up to this one.
    held_up_to: u64,
    connections: u64,
    open: Vec<TcpStream>,
}

impl Proxy {
    /// A proxy before this server.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(server: SocketAddr, line: Line) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let now = Instant::now();
        let shared = Arc::new(Shared {
            server,
            line: Mutex::new(line),
            free: [Mutex::new(now), Mutex::new(now)],
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
            moved: Default::default(),
        });
        let serving = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.ended.load(Ordering::Relaxed) {
                    return;
                }
                // Who cannot be served is hung up on.
                let _ = serving.serve(stream);
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on the line is another one.
    pub fn set_line(&self, line: Line) {
        *lock(&self.shared.line) = line;
    }

    /// Ends all connections, and each that is made from now on, as a server that is killed.
    pub fn cut(&self) {
        let mut state = lock(&self.shared.state);
        state.is_cut = true;
        for stream in state.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Lets nothing through from now on, as a server that hangs: connections are made, and
    /// stay.
    pub fn hold(&self) {
        lock(&self.shared.state).is_held = true;
    }

    /// Lets nothing through on the connections that there are, as a path that has gone:
    /// those that are made from now on are as they should be.
    pub fn hold_open(&self) {
        let mut state = lock(&self.shared.state);
        state.held_up_to = state.connections;
    }

    /// All is well again.
    pub fn mend(&self) {
        let mut state = lock(&self.shared.state);
        (state.is_cut, state.is_held, state.held_up_to) = (false, false, 0);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Bytes that came from the server so far.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.shared.moved[1].load(Ordering::Relaxed)
    }

    /// Bytes that went to the server, and came from it, so far.
    #[must_use]
    pub fn moved_bytes(&self) -> u64 {
        self.shared.moved[0].load(Ordering::Relaxed) + self.received_bytes()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.mend();
        self.cut();
        // Wakes the thread that listens.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(self: &Arc<Self>, client: TcpStream) -> io::Result<()> {
        if lock(&self.state).is_cut {
            return client.shutdown(Shutdown::Both);
        }
        let server = TcpStream::connect(self.server)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            lock(&self.state).open.push(stream.try_clone()?);
        }
        let number = {
            let mut state = lock(&self.state);
            state.connections += 1;
            state.connections
        };
        let (to, from) = (client.try_clone()?, server.try_clone()?);
        self.carry(0, number, to, server);
        self.carry(1, number, from, client);
        Ok(())
    }

    /// Carries what one end sends to the other, in threads of their own.
    fn carry(self: &Arc<Self>, way: usize, number: u64, mut from: TcpStream, mut to: TcpStream) {
        let (send, receive) = sync_channel::<(Instant, Vec<u8>)>(PIECES);
        let shared = self.clone();
        thread::spawn(move || {
            let mut piece = vec![0; PIECE_BYTES];
            while let Ok(len @ 1..) = from.read(&mut piece) {
                let at = shared.arrival(way, len);
                shared.moved[way].fetch_add(len as u64, Ordering::Relaxed);
                if send.send((at, piece[..len].to_vec())).is_err() {
                    break;
                }
            }
        });
        let shared = self.clone();
        thread::spawn(move || {
            for (at, bytes) in receive {
                thread::sleep(at.saturating_duration_since(Instant::now()));
                shared.wait(number);
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }

    /// When the last of so many bytes is through, if they are sent now.
    fn arrival(&self, way: usize, len: usize) -> Instant {
        let line = *lock(&self.line);
        let mut free = lock(&self.free[way]);
        let start = (*free).max(Instant::now());
        let rate = line.bytes_per_second;
        let takes = rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(len as f64 / rate)
        });
        *free = start + takes;
        *free + line.round_trip / 2
    }

    fn wait(&self, number: u64) {
        let mut state = lock(&self.state);
        while state.is_held || number <= state.held_up_to {
            let woken = self.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
