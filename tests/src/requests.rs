//! What stands between clients and a server that speaks HTTP, and does to single requests what
//! networks and servers do at their worst: one is lost, or its answer is; one is done twice;
//! an answer ends early; one reaches the server after another that came later.

use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

mod message;

use message::{Answer, Request};

/// How long a request waits for a later one.
const OVERTAKEN_WITHIN: Duration = Duration::from_millis(300);
/// When a request that is done twice comes for the second time, at the latest.
const LATEST: Duration = Duration::from_secs(1);

/// Of a thousand requests, how many meet with what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Chances {
    /// The connection is closed before anything is answered. Half of them reach the server.
    pub dropped: u32,
    /// What changes something is sent twice, half of it a while later. The client has the first
    /// answer.
    pub doubled: u32,
    /// The answer ends early, and with it the connection.
    pub cut_short: u32,
    /// Reaches the server after one that came later on another connection.
    pub overtaken: u32,
}

/// How often that was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Done {
    /// Requests that came.
    pub requests: u64,
    /// Of these, those whose connection was closed.
    pub dropped: u64,
    /// Those that were sent twice.
    pub doubled: u64,
    /// Those whose answers ended early.
    pub cut_short: u64,
    /// Those that a later one did overtake.
    pub overtaken: u64,
}

/// A proxy, for as long as it lives.
#[derive(Debug)]
pub struct RequestProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Debug)]
struct State {
    rng: fastrand::Rng,
    chances: Chances,
    done: Done,
    /// The latest request that the server has answered, by its number.
    answered: u64,
    /// Requests that are sent once more, later.
    late: usize,
    stop: Option<Stop>,
    is_stopped: bool,
}

/// Requests until nothing goes on.
#[derive(Debug)]
struct Stop {
    left: u64,
    is_done: bool,
    tell: Sender<()>,
}

enum Fate {
    Passed,
    Dropped { is_done: bool },
    Doubled { after: Duration },
    CutShort { draw: f64 },
    Overtaken,
    Stopped { is_done: bool },
}

impl RequestProxy {
    /// A proxy before this server. What happens to the requests is drawn, in the order in which
    /// they come.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(server: SocketAddr, chances: Chances, seed: u64) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server,
            state: Mutex::new(State {
                rng: fastrand::Rng::with_seed(seed),
                chances,
                done: Done::default(),
                answered: 0,
                late: 0,
                stop: None,
                is_stopped: false,
            }),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let serving = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.ended.load(Ordering::Relaxed) {
                    return;
                }
                let serving = serving.clone();
                thread::spawn(move || {
                    // Whoever hangs up is done.
                    let _ = serving.serve(&stream);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often what was done.
    #[must_use]
    pub fn done(&self) -> Done {
        self.shared.state().done
    }

    /// From now on all is passed on as it is. Returns once nothing is under way that is sent
    /// for the second time.
    pub fn calm(&self) {
        let mut state = self.shared.state();
        state.chances = Chances::default();
        while state.late > 0 {
            state = self.shared.wait(state, LATEST);
        }
    }

    /// The request after so many others stops there, and all that come after it, until
    /// [`RequestProxy::go_on`]. The server has done it by then, or it never comes there.
    /// Whoever receives is told once it has come.
    pub fn stop_after(&self, requests: u64, is_done: bool) -> Receiver<()> {
        let (tell, told) = channel();
        self.shared.state().stop = Some(Stop {
            left: requests,
            is_done,
            tell,
        });
        told
    }

    /// The connections whose requests have stopped are closed. Those that come are passed on.
    pub fn go_on(&self) {
        let mut state = self.shared.state();
        (state.stop, state.is_stopped) = (None, false);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for RequestProxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.go_on();
        // Wakes the thread that listens.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn serve(self: &Arc<Self>, client: &TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut reader = BufReader::new(client);
        while let Some(request) = Request::read(&mut reader)? {
            if self.ended.load(Ordering::Relaxed) {
                return Ok(());
            }
            let (number, fate) = self.draw(&request);
            match fate {
                Fate::Passed => self.pass(client, number, &request)?,
                Fate::Dropped { is_done } => {
                    if is_done {
                        self.ask(number, &request)?;
                    }
                    return Ok(());
                }
                Fate::Doubled { after } => {
                    let answer = self.ask(number, &request)?;
                    self.ask_again(number, request, after);
                    Self::answer(client, &answer.bytes)?;
                }
                Fate::CutShort { draw } => {
                    let answer = self.ask(number, &request)?;
                    return Self::answer(client, answer.cut(draw));
                }
                Fate::Overtaken => {
                    self.let_pass(number);
                    self.pass(client, number, &request)?;
                }
                Fate::Stopped { is_done } => {
                    if is_done {
                        self.ask(number, &request)?;
                    }
                    self.stay();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn pass(&self, client: &TcpStream, number: u64, request: &Request) -> io::Result<()> {
        Self::answer(client, &self.ask(number, request)?.bytes)
    }

    fn answer(mut client: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        client.write_all(bytes)
    }

    /// A connection of its own for each request: the server may close those that have nothing
    /// to do.
    fn ask(&self, number: u64, request: &Request) -> io::Result<Answer> {
        let mut server = TcpStream::connect(self.server)?;
        server.set_nodelay(true)?;
        server.write_all(&request.bytes)?;
        let answer = Answer::read(&mut BufReader::new(server), request)?;
        let mut state = self.state();
        state.answered = state.answered.max(number);
        drop(state);
        self.changed.notify_all();
        Ok(answer)
    }

    fn ask_again(self: &Arc<Self>, number: u64, request: Request, after: Duration) {
        if after.is_zero() {
            let _ = self.ask(number, &request);
            return;
        }
        self.state().late += 1;
        let shared = self.clone();
        thread::spawn(move || {
            thread::sleep(after);
            // Nobody waits for what it is told.
            let _ = shared.ask(number, &request);
            shared.state().late -= 1;
            shared.changed.notify_all();
        });
    }

    /// Waits for a request that came later to be answered. There may be none.
    fn let_pass(&self, number: u64) {
        let end = Instant::now() + OVERTAKEN_WITHIN;
        let mut state = self.state();
        while state.answered < number {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.wait(state, left);
        }
        state.done.overtaken += 1;
    }

    fn stay(&self) {
        let mut state = self.state();
        while state.is_stopped {
            state = self.wait(state, LATEST);
        }
    }

    /// The request's number, and what happens to it.
    fn draw(&self, request: &Request) -> (u64, Fate) {
        let mut state = self.state();
        state.done.requests += 1;
        let number = state.done.requests;
        let fate = state.fate(request);
        match fate {
            Fate::Dropped { .. } => state.done.dropped += 1,
            Fate::Doubled { .. } => state.done.doubled += 1,
            Fate::CutShort { .. } => state.done.cut_short += 1,
            _ => {}
        }
        (number, fate)
    }
}

impl State {
    fn fate(&mut self, request: &Request) -> Fate {
        if self.is_stopped {
            return Fate::Stopped { is_done: false };
        }
        if let Some(stop) = &mut self.stop {
            if stop.left == 0 {
                self.is_stopped = true;
                // It may be waited for no more.
                let _ = stop.tell.send(());
                return Fate::Stopped {
                    is_done: stop.is_done,
                };
            }
            stop.left -= 1;
        }
        let mut draw = self.rng.u32(..1000);
        let mut is_drawn = |chance: u32| {
            let is_it = draw < chance;
            draw = draw.saturating_sub(chance);
            is_it
        };
        let Chances {
            dropped,
            doubled,
            cut_short,
            overtaken,
        } = self.chances;
        if is_drawn(dropped) {
            return Fate::Dropped {
                is_done: self.rng.bool(),
            };
        }
        if is_drawn(doubled) {
            if !request.changes_something() {
                return Fate::Passed;
            }
            // A sign of life that comes after its session's end hides what that has acknowledged,
            // until a collection gives the session up (docs/REMOTE.md, races).
            let after = match request.is_of_lease() || self.rng.bool() {
                true => Duration::ZERO,
                false => LATEST.mul_f64(self.rng.f64()),
            };
            return Fate::Doubled { after };
        }
        if is_drawn(cut_short) {
            return Fate::CutShort {
                draw: self.rng.f64(),
            };
        }
        match is_drawn(overtaken) {
            true => Fate::Overtaken,
            false => Fate::Passed,
        }
    }
}
