//! What a server does beside answering, in threads of its own: opening tags and
//! letting go of snapshots, which wait for others who use the store; and looking
//! now and then for what is needed no more.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use snapstore_store::{Result, SnapshotId, Store};

use crate::table::Numbered;
use crate::view::View;
use crate::warm::Warm;

/// How often a server looks for what it can let go of.
const PERIOD: Duration = Duration::from_secs(5);
/// How long threads may take to end that have nothing to wait for, on a busy host.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// What is done with a tag that was opened: an answer to the kernel.
type Answer = Box<dyn FnOnce(Result<Option<Numbered>>) + Send>;

enum Chore {
    Open { tag: String, answer: Answer },
    LetGo(SnapshotId),
}

/// The thread that may wait.
#[derive(Clone)]
pub(crate) struct Chores {
    queue: Sender<Chore>,
}

impl Chores {
    /// The thread ends when nobody can give it anything any more.
    pub fn start(view: Arc<View>) -> io::Result<(Self, JoinHandle<()>)> {
        let (queue, chores) = channel();
        let thread = Builder::new().name("tags".to_owned()).spawn(move || {
            for chore in chores {
                do_chore(&view, chore);
            }
        })?;
        Ok((Self { queue }, thread))
    }

    /// Opens a tag, then answers.
    pub fn open_tag(&self, tag: &str, answer: Answer) {
        let tag = tag.to_owned();
        self.give(Chore::Open { tag, answer });
    }

    pub fn let_go(&self, id: SnapshotId) {
        self.give(Chore::LetGo(id));
    }

    fn give(&self, chore: Chore) {
        // It ends after all who could give it something.
        let _ = self.queue.send(chore);
    }
}

fn do_chore(view: &View, chore: Chore) {
    match chore {
        Chore::Open { tag, answer } => answer(view.open_tag(&tag)),
        Chore::LetGo(id) => {
            if let Err(error) = view.let_go(id) {
                // It stays pinned until this server ends, which loses nothing.
                tracing::warn!(%error, snapshot = %id, "cannot let go of a snapshot");
            }
        }
    }
}

/// Looks every few seconds for what can be let go of. Ends when the sender of
/// `end` is dropped.
pub(crate) fn keep_house(
    view: Arc<View>,
    chores: Chores,
    warm: Arc<Warm>,
    end: Receiver<()>,
) -> io::Result<JoinHandle<()>> {
    Builder::new()
        .name("housekeeping".to_owned())
        .spawn(move || {
            while end.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                for id in view.close_unused() {
                    chores.let_go(id);
                }
                let_go_of_files(view.store());
                warm.tick();
            }
        })
}

/// Waits for threads that have been told to end, and not for those that wait for somebody else.
pub(crate) fn wait_for(threads: &[JoinHandle<()>]) {
    let deadline = Instant::now() + END_PATIENCE;
    while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Of what a collection has deleted, the store keeps nothing open.
fn let_go_of_files(store: &Store) {
    store.let_go_of_deleted();
}
