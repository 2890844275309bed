//! The device's thread: it hears from the host, and has the guest told.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::poll::{EventFlags, Poll, Source};
use super::shared::{News, RECEIVE, Shared, lock};
use crate::confine::{self, Role};
use crate::devices::virtio::{Transport, Wake};
use crate::rate::Rate;

const STACK_BYTES: usize = 256 << 10;
/// How long it waits when it has no descriptor for one who connects.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// Starts the thread. It ends with the device.
pub(super) fn spawn(
    poll: Poll,
    shared: Arc<Mutex<Shared>>,
    wake: Wake,
    transport: Weak<Mutex<Transport>>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("vsock".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || run(&poll, &shared, &wake, &transport))
}

fn run(poll: &Poll, shared: &Mutex<Shared>, wake: &Wake, transport: &Weak<Mutex<Transport>>) {
    confine::enter(Role::Vsock);
    let mut deadline: Option<Instant> = None;
    loop {
        let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let events = match poll.wait(timeout) {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(%error, "the guest's sockets are no longer served");
                return;
            }
        };
        let mut held = lock(shared);
        if held.ended {
            return;
        }
        let mut exhausted = false;
        for (source, flags) in events {
            exhausted |= hear(&mut held, wake, source, flags).is_err();
        }
        deadline = expire(&mut held);
        let has_output = held.has_output();
        drop(held);
        if has_output {
            let Some(transport) = transport.upgrade() else {
                return;
            };
            let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            transport.serve(RECEIVE);
        }
        if exhausted {
            std::thread::sleep(EXHAUSTED);
        }
    }
}

fn hear(shared: &mut Shared, wake: &Wake, source: Source, flags: EventFlags) -> io::Result<()> {
    match source {
        Source::Wake => wake.heard(),
        Source::Listener => {
            return shared.table.accept().inspect_err(|error| {
                static RATE: Rate = Rate::new();
                RATE.log(|more| {
                    tracing::warn!(%error, more, "cannot accept a connection to the guest");
                });
            });
        }
        Source::Greeting(number) => shared.table.on_greeting(number),
        Source::Connection(ports) => shared.table.on_socket(ports, flags),
    }
    Ok(())
}

/// Ends what waited long enough; returns when to look again.
fn expire(shared: &mut Shared) -> Option<Instant> {
    let now = Instant::now();
    if matches!(shared.news, News::Told(until) if until <= now) {
        shared.news = News::None;
    }
    let table = shared.table.expire(now);
    match shared.news {
        News::Told(until) => Some(table.map_or(until, |table| table.min(until))),
        News::None | News::Due => table,
    }
}
