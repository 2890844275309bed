//! What a guest is told through its agent: fresh entropy, the time and the addresses of its
//! network interfaces after it was restored, and the time after a long pause.
//!
//! A guest without an agent, or a machine without the device, is left as it is. One that is silent is not known to be
//! without: it is told once it answers, however long that takes.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use snapstore_vmm::agent::{AGENT_PORT, AgentClient, AgentError, ErrorKind};
use snapstore_vmm::confine::{self, Role};
use snapstore_vmm::control::Vm;

use crate::runtime::VSOCK;

/// How long an agent may take to be there, and to answer.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);
/// The same of one that was asked in vain before: its host is busy, or its memory comes from far.
const LATER_PATIENCE: Duration = Duration::from_secs(120);
/// How long after an attempt in vain there is another, twice as long each time: at most the second where the guest was
/// silent, which had its time before that, and the third where it turned the host away.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(60),
];
/// How often in a row a guest that answers may turn the host away, or break the connection: for some four minutes.
const REBUFFS: u32 = 10;

/// How long it may take to take entropy, where that is required.
const RESEED_PATIENCE: Duration = Duration::from_secs(10);

/// Starts the thread that does so, once the guest runs.
///
/// Where it is required that a restored guest takes entropy, the machine ends if it does not.
pub fn attend(vm: &Arc<Vm>, is_restored: bool, require_reseed: bool) -> anyhow::Result<()> {
    let vsock = Path::new(VSOCK);
    if !vsock.exists() {
        if require_reseed {
            bail!(
                "the snapshot's machine has no vsock device, so its guest cannot be reseeded; \
                 leave --require-reseed out if it need not be"
            );
        }
        return Ok(());
    }
    let vm = vm.clone();
    std::thread::Builder::new()
        .name("refresh".to_owned())
        .spawn(move || {
            confine::enter(Role::Agent);
            if !vm.machine().wait_until_running() {
                return;
            }
            if is_restored && require_reseed && !reseed_soon(&vm, vsock) {
                return;
            }
            let runs = || vm.machine().wait_until_running();
            let telling = Telling::new(vsock, &runs);
            if is_restored {
                refresh(&vm, &telling);
            }
            keep_time(&vm, &telling);
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Ends the machine unless its guest takes entropy soon; whether it did.
fn reseed_soon(vm: &Vm, vsock: &Path) -> bool {
    let deadline = Instant::now() + RESEED_PATIENCE;
    let reseeded = AgentClient::connect(vsock, AGENT_PORT, RESEED_PATIENCE).and_then(|agent| {
        let left = deadline.saturating_duration_since(Instant::now());
        agent.with_patience(left).reseed_afresh()
    });
    match reseeded {
        Ok(()) => {
            vm.set_reseeded();
            true
        }
        // It runs no further, whatever it did until now.
        Err(error) => {
            vm.machine().end_not_reseeded(error.to_string());
            false
        }
    }
}

/// After a restore.
fn refresh(vm: &Vm, telling: &Telling<'_>) {
    let networks = vm.machine().networks().into_iter();
    let macs: Vec<_> = networks
        .filter_map(|network| Some((network.saved_mac?, network.mac)))
        .collect();
    let mut took_entropy = false;
    let refreshed = telling.tell(|agent| {
        agent.reseed_afresh()?;
        took_entropy = true;
        vm.set_reseeded();
        agent.set_time_and_macs(&macs)
    });
    let refreshed = match refreshed {
        Err(error @ AgentError::Refused { .. }) if !took_entropy => {
            tracing::warn!(%error, "the guest's randomness is still the snapshot's");
            telling.tell(|agent| agent.set_time_and_macs(&macs))
        }
        other => other,
    };
    match refreshed {
        Ok(()) => {}
        // It was there, and its guest is not as it should be.
        Err(error @ AgentError::Refused { .. }) => {
            tracing::warn!(%error, "something of the guest is still the snapshot's");
        }
        Err(error) => {
            tracing::debug!(%error, "something of the guest is still the snapshot's");
        }
    }
}

/// After each long pause, until the machine ends.
fn keep_time(vm: &Vm, telling: &Telling<'_>) {
    let mut seen = 0;
    while let Some(pauses) = vm.machine().wait_for_long_pause(seen) {
        seen = pauses;
        if let Err(error) = telling.tell(AgentClient::set_time_now) {
            tracing::debug!(%error, "the guest's clock is late by a pause");
        }
    }
}

/// How a guest is told something.
struct Telling<'a> {
    vsock: &'a Path,
    /// Waits until the guest runs; whether it does, or its machine ends.
    runs: &'a dyn Fn() -> bool,
    /// For the first attempt, and for others.
    patience: (Duration, Duration),
    pauses: [Duration; 3],
}

impl<'a> Telling<'a> {
    fn new(vsock: &'a Path, runs: &'a dyn Fn() -> bool) -> Self {
        Self {
            vsock,
            runs,
            patience: (AGENT_PATIENCE, LATER_PATIENCE),
            pauses: PAUSES,
        }
    }

    /// Says it to the agent, again for as long as the guest is silent: silence does not tell a guest without an
    /// agent from one that has had no time yet. What a guest answers is taken at its word after a while.
    fn tell(
        &self,
        mut say: impl FnMut(&mut AgentClient) -> Result<(), AgentError>,
    ) -> Result<(), AgentError> {
        let (first, later) = self.patience;
        let [shortest, silent, rebuffed] = self.pauses;
        let mut pause = shortest;
        let (mut rebuffs, mut was_late) = (0, false);
        let mut agent = AgentClient::connect(self.vsock, AGENT_PORT, first)
            .map(|agent| agent.with_patience(first));
        loop {
            match agent.and_then(|mut agent| say(&mut agent)) {
                // What it was asked before it may do only now, and last.
                Ok(()) if was_late => {
                    (was_late, pause) = (false, shortest);
                    std::thread::sleep(pause);
                    if !(self.runs)() {
                        return Ok(());
                    }
                }
                Ok(()) => return Ok(()),
                Err(error) => {
                    let longest = match Answer::of(&error) {
                        Answer::Silence => {
                            tracing::debug!(%error, "the guest is told once it answers");
                            was_late |= matches!(error, AgentError::Late(_));
                            rebuffs = 0;
                            silent
                        }
                        Answer::Rebuff if rebuffs + 1 < REBUFFS => {
                            rebuffs += 1;
                            rebuffed
                        }
                        Answer::Rebuff | Answer::No => return Err(error),
                    };
                    pause = pause.min(longest);
                    std::thread::sleep(pause);
                    pause = pause.saturating_mul(2);
                    if !(self.runs)() {
                        return Err(error);
                    }
                }
            }
            agent = AgentClient::connect_while(self.vsock, AGENT_PORT, later, || false)
                .map(|agent| agent.with_patience(later));
        }
    }
}

/// What a failure to tell a guest something means.
enum Answer {
    /// It had no time, or has too much to do.
    Silence,
    /// There may be no agent, or it is just being started.
    Rebuff,
    /// Its agent will say the same again.
    No,
}

impl Answer {
    fn of(error: &AgentError) -> Self {
        match error {
            AgentError::Late(_) => Self::Silence,
            AgentError::Refused {
                kind: ErrorKind::Busy,
                ..
            } => Self::Silence,
            AgentError::NoAgent { source, .. } if is_silence(source) => Self::Silence,
            AgentError::NoAgent { .. } | AgentError::Connection(_) => Self::Rebuff,
            _ => Self::No,
        }
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// What a guest does with a connection from its host.
    #[derive(Clone, Copy, Debug)]
    enum Does {
        /// It has no time to take it.
        NotTaken,
        /// It turns it away.
        Refused,
        /// It takes it, and has no time for what is said.
        Unheard,
        /// It takes it, and breaks it.
        Broken,
        /// Its agent serves it.
        Served,
    }

    /// What telling comes to, in short times, if a guest answers like this, the last of them always; and how many connections there
    /// were.
    fn told(answers: &'static [Does], runs: &dyn Fn() -> bool) -> (Result<(), AgentError>, usize) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(VSOCK);
        let listener = UnixListener::bind(&path).unwrap();
        // On a busy host it may be late for any connection: then that is over already.
        let guest = std::thread::spawn(move || {
            let mut kept = Vec::new();
            let mut connections = 0;
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut greeting = [0; "CONNECT 1024\n".len()];
                if stream.read_exact(&mut greeting).is_err() {
                    return connections;
                }
                let answer = *answers.get(connections).or(answers.last()).unwrap();
                connections += 1;
                match answer {
                    Does::NotTaken => kept.push(stream),
                    Does::Refused => {}
                    Does::Unheard | Does::Broken => {
                        let _ = stream.write_all(b"OK 1073741824\n");
                        if matches!(answer, Does::Unheard) {
                            kept.push(stream);
                        }
                    }
                    Does::Served => {
                        let _ = stream.write_all(b"OK 1073741824\n");
                        let _ = snapstore_agent::serve(&mut stream);
                    }
                }
            }
            connections
        });
        let telling = Telling {
            patience: (Duration::from_millis(100), Duration::from_millis(300)),
            pauses: [1, 2, 4].map(Duration::from_millis),
            ..Telling::new(&path, runs)
        };
        let told = telling.tell(AgentClient::ping);
        // It greets with nothing, and so ends the guest.
        drop(UnixStream::connect(&path).unwrap());
        (told, guest.join().unwrap())
    }

    #[test]
    fn a_guest_that_is_silent_for_long_is_told_in_the_end() {
        use Does::{NotTaken, Served, Unheard};
        const SILENT: &[Does] = &[
            NotTaken, Unheard, NotTaken, Unheard, NotTaken, NotTaken, Unheard, Unheard, Served,
        ];
        let (told, connections) = told(SILENT, &|| true);
        told.unwrap();
        // Once more than that, since it was late.
        assert!(connections > SILENT.len(), "{connections}");
    }

    #[test]
    fn a_guest_that_turns_the_host_away_is_left_alone() {
        let (refused, _) = told(&[Does::Refused], &|| true);
        assert!(
            matches!(refused, Err(AgentError::NoAgent { .. })),
            "{refused:?}"
        );
        let (broken, connections) = told(&[Does::Broken], &|| true);
        assert!(
            matches!(broken, Err(AgentError::Connection(_))),
            "{broken:?}"
        );
        assert!(connections >= 10, "{connections}");
    }

    #[test]
    fn nobody_is_told_whose_machine_has_ended() {
        let (told, connections) = told(&[Does::Unheard], &|| false);
        assert!(told.is_err());
        assert!(connections <= 2, "{connections}");
    }

    #[test]
    fn an_agent_that_is_busy_is_asked_again() {
        let busy = AgentError::Refused {
            kind: ErrorKind::Busy,
            message: "too many connections".to_owned(),
        };
        assert!(matches!(Answer::of(&busy), Answer::Silence));
        let refused = AgentError::Refused {
            kind: ErrorKind::Invalid,
            message: "no such request".to_owned(),
        };
        assert!(matches!(Answer::of(&refused), Answer::No));
    }
}
