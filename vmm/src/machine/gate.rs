//! Who may run: the vCPUs wait here, and whoever pauses them waits for them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::devices::virtio::Host;
use crate::ending::Ending;
use crate::machine::kick::Kick;

/// What the vCPUs are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Pause,
    Run,
    End,
}

/// How long the vCPUs of a machine that ends are waited for. One that hangs in guest
/// memory whose server does not answer ends with the process.
const END_PATIENCE: Duration = Duration::from_millis(700);

/// What closing the gate came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Closing {
    /// Every vCPU is out of the guest.
    Closed {
        /// Whether the gate was open.
        was_open: bool,
    },
    /// They are at their end.
    Ended,
    /// One did not leave the guest in time: the gate is as it was.
    Late,
}

/// What a vCPU's thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    Run,
    End,
}

struct State {
    wanted: Wanted,
    /// By vCPU: whether it is out of the guest and waits.
    waiting: Vec<bool>,
    /// Why the machine ended, and when that was said.
    ending: Option<(Ending, Instant)>,
    /// Whether the guest has said that it is ready.
    is_ready: bool,
    /// Whether it is to stop when it says so.
    stops_at_ready: bool,
    /// Whether it has stopped for that, and nobody has paused it or let it go on since.
    stands_at_ready: bool,
}

/// The gate before the guest.
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    kicks: Vec<Kick>,
    /// Told before the vCPUs are.
    host: Host,
}

impl Gate {
    /// A closed gate.
    pub fn new(kicks: Vec<Kick>, host: Host) -> Self {
        Self {
            state: Mutex::new(State {
                wanted: Wanted::Pause,
                waiting: vec![false; kicks.len()],
                ending: None,
                is_ready: false,
                stops_at_ready: false,
                stands_at_ready: false,
            }),
            changed: Condvar::new(),
            kicks,
            host,
        }
    }

    /// Called by a vCPU's thread outside the guest: waits until it may enter.
    pub fn wait_to_enter(&self, cpu: usize) -> Next {
        let mut state = self.lock();
        self.kicks[cpu].attach_thread();
        loop {
            match state.wanted {
                Wanted::Run => {
                    state.waiting[cpu] = false;
                    // Under the lock: a later kick is not undone.
                    self.kicks[cpu].disarm();
                    return Next::Run;
                }
                Wanted::Pause | Wanted::End => {
                    state.waiting[cpu] = true;
                    self.changed.notify_all();
                    if state.wanted == Wanted::End {
                        return Next::End;
                    }
                    state = self.wait(state);
                }
            }
        }
    }

    /// Lets the vCPUs run. Returns whether the machine has not ended.
    pub fn open(&self) -> bool {
        let mut state = self.lock();
        state.stands_at_ready = false;
        if state.wanted == Wanted::Pause {
            state.wanted = Wanted::Run;
        }
        self.changed.notify_all();
        state.wanted == Wanted::Run
    }

    /// Closes the gate and waits until every vCPU is out of the guest, or the deadline
    /// is over.
    pub fn close(&self, deadline: Instant) -> Closing {
        let mut state = self.lock();
        let was_open = state.wanted == Wanted::Run;
        if was_open {
            self.host.set_closing(true);
            state.wanted = Wanted::Pause;
        }
        self.kick_all(&state);
        while state.waiting.contains(&false) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return match state.wanted {
                    Wanted::End => Closing::Ended,
                    Wanted::Run | Wanted::Pause => {
                        if was_open && !state.stands_at_ready && !self.host.has_fault() {
                            self.host.set_closing(false);
                            state.wanted = Wanted::Run;
                            self.changed.notify_all();
                        }
                        Closing::Late
                    }
                };
            }
            state = self.wait_for(state, left);
        }
        match state.wanted {
            Wanted::End => Closing::Ended,
            Wanted::Run | Wanted::Pause => Closing::Closed { was_open },
        }
    }

    /// Called by a vCPU's thread when the host has failed a device: the guest stops.
    pub fn stop_for_fault(&self) {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            self.host.set_closing(true);
            state.wanted = Wanted::Pause;
            self.kick_all(&state);
        }
    }

    /// Ends the machine; the first reason counts.
    pub fn end(&self, ending: Ending) {
        let mut state = self.lock();
        state.wanted = Wanted::End;
        self.host.set_closing(true);
        state.ending.get_or_insert((ending, Instant::now()));
        self.kick_all(&state);
        self.changed.notify_all();
    }

    /// Called by a vCPU's thread when the guest says that it is ready.
    pub fn guest_is_ready(&self) {
        let mut state = self.lock();
        let first = !std::mem::replace(&mut state.is_ready, true);
        if first && state.stops_at_ready {
            // Also during a pause that is under way: its end must not let the guest run.
            state.stands_at_ready = true;
            if state.wanted == Wanted::Run {
                self.host.set_closing(true);
                state.wanted = Wanted::Pause;
                self.kick_all(&state);
            }
        }
        self.changed.notify_all();
    }

    /// From here on the guest stops when it says that it is ready.
    pub fn stop_at_ready(&self) {
        self.lock().stops_at_ready = true;
    }

    /// From here on it does not. Returns whether it stands there already.
    pub fn pass_ready(&self) -> bool {
        let mut state = self.lock();
        state.stops_at_ready = false;
        state.stands_at_ready
    }

    /// A guest that stands at ready is paused from here on, as its owner wants.
    pub fn stay_closed(&self) {
        self.lock().stands_at_ready = false;
    }

    /// Whether the guest has stopped because it is ready, and nobody has paused it or
    /// let it go on since.
    pub fn stands_at_ready(&self) -> bool {
        self.lock().stands_at_ready
    }

    /// Waits until the guest has said that it is ready. Returns whether it did,
    /// and not end.
    pub fn wait_until_ready(&self) -> bool {
        let mut state = self.lock();
        while !state.is_ready && state.ending.is_none() {
            state = self.wait(state);
        }
        state.ending.is_none()
    }

    /// Waits until the vCPUs are let run. Returns whether they are, and not at their end.
    pub fn wait_until_open(&self) -> bool {
        let mut state = self.lock();
        while state.wanted == Wanted::Pause {
            state = self.wait(state);
        }
        state.wanted == Wanted::Run
    }

    /// Waits for the end: until every vCPU is out of the guest, but not for long for
    /// one that hangs there.
    pub fn wait_for_end(&self) -> Ending {
        let mut state = self.lock();
        loop {
            let Some((ending, since)) = &state.ending else {
                state = self.wait(state);
                continue;
            };
            let left = END_PATIENCE.saturating_sub(since.elapsed());
            if left.is_zero() || !state.waiting.contains(&false) {
                return ending.clone();
            }
            state = self.wait_for(state, left);
        }
    }

    /// Why the machine ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        let state = self.lock();
        state.ending.as_ref().map(|(ending, _)| ending.clone())
    }

    /// Whether every vCPU is out of the guest.
    pub fn all_wait(&self) -> bool {
        !self.lock().waiting.contains(&false)
    }

    /// Whether the vCPUs are let run.
    pub fn is_open(&self) -> bool {
        self.lock().wanted == Wanted::Run
    }

    /// If every vCPU's thread sleeps, how often each has gone to sleep. Does not
    /// disturb the guest.
    pub fn sleeps(&self) -> Option<Vec<u64>> {
        self.kicks.iter().map(Kick::sleeps).collect()
    }

    fn kick_all(&self, state: &State) {
        for (kick, waiting) in self.kicks.iter().zip(&state.waiting) {
            if !waiting {
                kick.fire();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(
        &self,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, at_most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// An open gate of no vCPUs, whose guest is to stop when it is ready.
    fn open_gate() -> Gate {
        let gate = Gate::new(Vec::new(), Host::default());
        gate.stop_at_ready();
        assert!(gate.open());
        gate
    }

    #[test]
    fn closing_tells_whether_it_was_open() {
        let gate = open_gate();
        assert_eq!(gate.close(soon()), Closing::Closed { was_open: true });
        assert_eq!(gate.close(soon()), Closing::Closed { was_open: false });
        gate.end(Ending::Stopped);
        assert_eq!(gate.close(soon()), Closing::Ended);
        assert!(!gate.open());
    }

    #[test]
    fn a_guest_that_is_ready_stands_until_it_is_let_go() {
        let gate = open_gate();
        gate.guest_is_ready();
        assert!(gate.stands_at_ready() && !gate.is_open());
        assert_eq!(gate.close(soon()), Closing::Closed { was_open: false });
        assert!(gate.open() && !gate.stands_at_ready());
        gate.guest_is_ready();
        assert!(gate.is_open(), "only the first time counts");
    }

    #[test]
    fn a_guest_that_is_ready_while_the_gate_closes_stands_there() {
        let gate = open_gate();
        assert_eq!(gate.close(soon()), Closing::Closed { was_open: true });
        gate.guest_is_ready();
        assert!(gate.stands_at_ready());
    }

    #[test]
    fn a_guest_that_may_pass_does_not_stop() {
        let gate = open_gate();
        assert!(!gate.pass_ready(), "it does not stand there yet");
        gate.guest_is_ready();
        assert!(gate.is_open() && !gate.stands_at_ready());
    }

    #[test]
    fn a_guest_paused_at_ready_does_not_go_on_by_itself() {
        let gate = open_gate();
        gate.guest_is_ready();
        gate.stay_closed();
        assert!(!gate.pass_ready());
        assert!(!gate.is_open());
    }
}
