//! Who may run: the vCPUs wait here, and whoever pauses them waits for them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::devices::virtio::Host;
use crate::ending::Ending;
use crate::machine::vcpu_signal::VcpuSignal;

/// What the vCPUs are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RunRequest {
    Pause,
    Run,
    End,
}

/// How long the vCPUs of a machine that ends are waited for. One that hangs in guest
/// memory whose server does not answer ends with the process.
const END_PATIENCE: Duration = Duration::from_millis(700);

/// What pausing came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pausing {
    /// Every vCPU is out of the guest.
    Paused {
        /// Whether they were let run.
        was_running: bool,
    },
    /// They are at their end.
    Ended,
    /// One did not leave the guest in time: nothing has changed.
    Late,
}

/// What a vCPU's thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    Run,
    End,
}

struct State {
    requested: RunRequest,
    /// Whether they were let run at any time.
    has_run: bool,
    /// When a vCPU last began to run.
    entered: Option<Instant>,
    /// How many pauses were long, and are over.
    long_pauses: u64,
    /// By vCPU: whether it is out of the guest and waits.
    waiting: Vec<bool>,
    /// Why the machine ended, and when that was said.
    ending: Option<(Ending, Instant)>,
    /// Whether the guest has said that it is ready.
    is_ready: bool,
    /// Whether it is to stop when it says so.
    stops_at_ready: bool,
    /// Whether it has stopped for that, and nobody has paused it or let it go on since.
    paused_at_ready: bool,
}

/// Which of them may run.
pub(crate) struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
    signals: Vec<VcpuSignal>,
    /// Told before the vCPUs are.
    host: Host,
}

impl RunControl {
    /// Paused.
    pub fn new(signals: Vec<VcpuSignal>, host: Host) -> Self {
        Self {
            state: Mutex::new(State {
                requested: RunRequest::Pause,
                has_run: false,
                entered: None,
                long_pauses: 0,
                waiting: vec![false; signals.len()],
                ending: None,
                is_ready: false,
                stops_at_ready: false,
                paused_at_ready: false,
            }),
            changed: Condvar::new(),
            signals,
            host,
        }
    }

    /// Called by a vCPU's thread outside the guest: waits until it may enter.
    pub fn wait_to_run(&self, cpu: usize) -> Next {
        let mut state = self.lock();
        self.signals[cpu].attach_thread();
        loop {
            match state.requested {
                RunRequest::Run => {
                    state.waiting[cpu] = false;
                    state.entered = Some(Instant::now());
                    // Under the lock: a later signal is not undone.
                    self.signals[cpu].disarm();
                    return Next::Run;
                }
                RunRequest::Pause | RunRequest::End => {
                    state.waiting[cpu] = true;
                    self.changed.notify_all();
                    if state.requested == RunRequest::End {
                        return Next::End;
                    }
                    state = self.wait(state);
                }
            }
        }
    }

    /// When a vCPU last began to run, if one did after this.
    pub fn entered_after(&self, after: Instant) -> Option<Instant> {
        self.lock().entered.filter(|at| *at >= after)
    }

    /// Lets the vCPUs run. Returns whether the machine has not ended.
    pub fn run(&self) -> bool {
        let mut state = self.lock();
        state.paused_at_ready = false;
        if state.requested == RunRequest::Pause {
            state.requested = RunRequest::Run;
            state.has_run = true;
        }
        let runs = state.requested == RunRequest::Run;
        // A vCPU that wakes needs the lock: it would wait for this thread's next slice of
        // time, should this one lose its processor now.
        drop(state);
        self.changed.notify_all();
        runs
    }

    /// Pauses them and waits until every vCPU is out of the guest, or the deadline
    /// is over.
    pub fn pause(&self, deadline: Instant) -> Pausing {
        let mut state = self.lock();
        let was_running = state.requested == RunRequest::Run;
        if was_running {
            self.host.set_pausing(true);
            state.requested = RunRequest::Pause;
        }
        self.signal_all(&state);
        while state.waiting.contains(&false) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return match state.requested {
                    RunRequest::End => Pausing::Ended,
                    RunRequest::Run | RunRequest::Pause => {
                        if was_running && !state.paused_at_ready && !self.host.has_fault() {
                            self.host.set_pausing(false);
                            state.requested = RunRequest::Run;
                            self.changed.notify_all();
                        }
                        Pausing::Late
                    }
                };
            }
            state = self.wait_for(state, left);
        }
        match state.requested {
            RunRequest::End => Pausing::Ended,
            RunRequest::Run | RunRequest::Pause => Pausing::Paused { was_running },
        }
    }

    /// Called by a vCPU's thread when the host has failed a device: the guest stops.
    pub fn stop_for_fault(&self) {
        let mut state = self.lock();
        if state.requested == RunRequest::Run {
            self.host.set_pausing(true);
            state.requested = RunRequest::Pause;
            self.signal_all(&state);
        }
    }

    /// Ends the machine; the first reason counts.
    pub fn end(&self, ending: Ending) {
        let mut state = self.lock();
        state.requested = RunRequest::End;
        self.host.set_pausing(true);
        state.ending.get_or_insert((ending, Instant::now()));
        self.signal_all(&state);
        self.changed.notify_all();
    }

    /// Called by a vCPU's thread when the guest says that it is ready.
    pub fn guest_is_ready(&self) {
        let mut state = self.lock();
        let first = !std::mem::replace(&mut state.is_ready, true);
        if first && state.stops_at_ready {
            // Also during a pause that is under way: its end must not let the guest run.
            state.paused_at_ready = true;
            if state.requested == RunRequest::Run {
                self.host.set_pausing(true);
                state.requested = RunRequest::Pause;
                self.signal_all(&state);
            }
        }
        self.changed.notify_all();
    }

    /// From here on the guest stops when it says that it is ready.
    pub fn stop_at_ready(&self) {
        self.lock().stops_at_ready = true;
    }

    /// From here on it does not. Returns whether it stands there already.
    pub fn skip_ready(&self) -> bool {
        let mut state = self.lock();
        state.stops_at_ready = false;
        state.paused_at_ready
    }

    /// A guest that stands at ready is paused from here on, as its owner wants.
    pub fn stay_paused(&self) {
        self.lock().paused_at_ready = false;
    }

    /// Whether the guest has stopped because it is ready, and nobody has paused it or
    /// let it go on since.
    pub fn paused_at_ready(&self) -> bool {
        self.lock().paused_at_ready
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
    pub fn wait_until_running(&self) -> bool {
        let mut state = self.lock();
        while state.requested == RunRequest::Pause {
            state = self.wait(state);
        }
        state.requested == RunRequest::Run
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
    pub fn is_running(&self) -> bool {
        self.lock().requested == RunRequest::Run
    }

    /// Whether the vCPUs were let run at any time.
    pub fn has_run(&self) -> bool {
        self.lock().has_run
    }

    /// The vCPUs run again after a pause that their guest's clock has to be told of.
    pub fn long_pause_is_over(&self) {
        self.lock().long_pauses += 1;
        self.changed.notify_all();
    }

    /// Waits until more pauses were long than these. Returns how many were; `None` once the
    /// machine ends.
    pub fn wait_for_long_pause(&self, seen: u64) -> Option<u64> {
        let mut state = self.lock();
        while state.long_pauses == seen && state.ending.is_none() {
            state = self.wait(state);
        }
        state.ending.is_none().then_some(state.long_pauses)
    }

    /// If every vCPU's thread sleeps, how often each has gone to sleep. Does not
    /// disturb the guest.
    pub fn sleeps(&self) -> Option<Vec<u64>> {
        self.signals.iter().map(VcpuSignal::sleeps).collect()
    }

    fn signal_all(&self, state: &State) {
        for (signal, waiting) in self.signals.iter().zip(&state.waiting) {
            if !waiting {
                signal.fire();
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

    /// Lets run a machine of no vCPUs, whose guest is to stop when it is ready.
    fn running() -> RunControl {
        let run_control = RunControl::new(Vec::new(), Host::default());
        run_control.stop_at_ready();
        assert!(run_control.run());
        run_control
    }

    #[test]
    fn pausing_tells_whether_they_ran() {
        let run_control = running();
        assert_eq!(
            run_control.pause(soon()),
            Pausing::Paused { was_running: true }
        );
        assert_eq!(
            run_control.pause(soon()),
            Pausing::Paused { was_running: false }
        );
        run_control.end(Ending::Stopped);
        assert_eq!(run_control.pause(soon()), Pausing::Ended);
        assert!(!run_control.run());
    }

    #[test]
    fn a_guest_that_is_ready_stands_until_it_is_let_go() {
        let run_control = running();
        run_control.guest_is_ready();
        assert!(run_control.paused_at_ready() && !run_control.is_running());
        assert_eq!(
            run_control.pause(soon()),
            Pausing::Paused { was_running: false }
        );
        assert!(run_control.run() && !run_control.paused_at_ready());
        run_control.guest_is_ready();
        assert!(run_control.is_running(), "only the first time counts");
    }

    #[test]
    fn a_guest_that_is_ready_while_the_gate_closes_stands_there() {
        let run_control = running();
        assert_eq!(
            run_control.pause(soon()),
            Pausing::Paused { was_running: true }
        );
        run_control.guest_is_ready();
        assert!(run_control.paused_at_ready());
    }

    #[test]
    fn a_guest_that_may_pass_does_not_stop() {
        let run_control = running();
        assert!(!run_control.skip_ready(), "it does not stand there yet");
        run_control.guest_is_ready();
        assert!(run_control.is_running() && !run_control.paused_at_ready());
    }

    #[test]
    fn a_guest_paused_at_ready_does_not_go_on_by_itself() {
        let run_control = running();
        run_control.guest_is_ready();
        run_control.stay_paused();
        assert!(!run_control.skip_ready());
        assert!(!run_control.is_running());
    }

    #[test]
    fn long_pauses_are_counted_and_waited_for_until_the_end() {
        let run_control = running();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| run_control.wait_for_long_pause(0));
            run_control.long_pause_is_over();
            assert_eq!(waits.join().unwrap(), Some(1));
            let waits = scope.spawn(|| run_control.wait_for_long_pause(1));
            run_control.end(Ending::Stopped);
            assert_eq!(waits.join().unwrap(), None);
        });
    }
}
