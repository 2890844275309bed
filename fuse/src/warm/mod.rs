//! The working set of an image: recorded from what the kernel asks for, and pushed in the
//! next mount before it does.
//!
//! A [`Session`] is what one mount knows of one image, from the first time that it is
//! opened. On the path of a fault it costs a few bits and a number in a list. All else is
//! done by the thread `warm`, and by others for as long as pages are pushed. They run
//! at the lowest priority, and never between a fault and its answer.
//!
//! What is pushed was checked against its id, as what is read is. What the kernel was
//! given already is not pushed again. A push is a copy into the kernel's page cache
//! (`FUSE_NOTIFY_STORE`); one of a page that is just being read waits for that reading's
//! answer, which the pushing threads never give.

mod bits;
mod part;
mod push;
mod session;
mod touch;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Builder;
use std::time::SystemTime;

use fuser::Notifier;
use snapstore_store::{ErrorClass, ForeignSnapshot, ImageReader, Store, WorkingSet};

use crate::counters::Counters;
pub use part::Part;
use push::push;
use session::Plan;
pub(crate) use session::{Session, Subject};

enum Chore {
    /// The image is opened: push its set.
    Begin(Arc<Session>),
    /// Nobody has it open any more, or its time is over: write what was seen.
    Write(Arc<Session>),
    /// All is over: write what was seen, and answer.
    End(Sender<()>),
}

/// What a mount does with working sets.
pub(crate) struct Warm {
    store: Store,
    /// Whose images they are, if they are elsewhere: what is recorded is kept by their source.
    elsewhere: Option<ForeignSnapshot>,
    counters: Arc<Counters>,
    /// Whether anything is given to the kernel, or read, before it is asked for.
    prefetch: bool,
    /// Whether what is recorded can be kept.
    keeps: bool,
    part: Option<Part>,
    read_ahead_bytes: u64,
    chores: Mutex<Option<Sender<Chore>>>,
    sessions: Mutex<Vec<Arc<Session>>>,
    notifier: OnceLock<Notifier>,
    ended: AtomicBool,
}

impl Warm {
    /// The thread ends after [`Warm::end`].
    pub fn start(
        (store, elsewhere): (Store, Option<ForeignSnapshot>),
        counters: Arc<Counters>,
        prefetch: bool,
        keeps: bool,
        part: Option<Part>,
        read_ahead_bytes: u32,
    ) -> io::Result<Arc<Self>> {
        let (queue, chores) = channel();
        let warm = Arc::new(Self {
            store,
            elsewhere,
            counters,
            prefetch,
            keeps,
            part,
            read_ahead_bytes: read_ahead_bytes.into(),
            chores: Mutex::new(Some(queue)),
            sessions: Mutex::default(),
            notifier: OnceLock::new(),
            ended: AtomicBool::new(false),
        });
        let worker = warm.clone();
        Builder::new()
            .name("warm".to_owned())
            .spawn(move || worker.work(&chores))?;
        Ok(warm)
    }

    /// By what the kernel is given pages.
    pub fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// The session of an image, which has the inode number `ino`.
    pub fn session(&self, subject: Subject, ino: u64) -> Option<Arc<Session>> {
        let part = self.part.as_ref();
        let part = part.filter(|part| part.image == subject.image);
        let part = part.map(|part| &part.ranges[..]);
        let counters = self.counters.clone();
        let session = Session::new(subject, ino, self.read_ahead_bytes, part, counters)?;
        let session = Arc::new(session);
        lock(&self.sessions).push(session.clone());
        Some(session)
    }

    /// The kernel knows an image now, which somebody may be about to open.
    pub fn look_up(&self, session: &Arc<Session>) {
        self.give(Chore::Begin(session.clone()));
    }

    /// An image is opened.
    pub fn open(&self, session: &Arc<Session>) {
        if session.open() {
            self.give(Chore::Begin(session.clone()));
        }
    }

    /// A handle is closed.
    pub fn close(&self, session: &Arc<Session>) {
        if session.close() {
            self.give(Chore::Write(session.clone()));
        }
    }

    /// Reads the leaves of an image, so that no fault has to.
    pub fn load_leaves(self: &Arc<Self>, reader: ImageReader) {
        // Of a part few are needed.
        if !self.prefetch || self.part.is_some() {
            return;
        }
        let warm = self.clone();
        let load = move || {
            push::be_patient();
            // Whoever needs a leaf that is damaged is told.
            let _ = reader.load_leaves(&|| !warm.has_ended());
        };
        // Without a thread for it, faults load them.
        let _ = Builder::new().name("leaves".to_owned()).spawn(load);
    }

    /// Has what was seen in full written, and forgets images that nobody has any more.
    pub fn tick(&self) {
        lock(&self.sessions).retain(|session| {
            let is_gone = Arc::strong_count(session) == 1;
            if is_gone || session.is_recorded() {
                self.give(Chore::Write(session.clone()));
            }
            !is_gone
        });
    }

    /// Ends all pushing, and returns once what was seen is written.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let (done, wait) = channel();
        self.give(Chore::End(done));
        *lock(&self.chores) = None;
        let _ = wait.recv();
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn give(&self, chore: Chore) {
        if let Some(chores) = &*lock(&self.chores) {
            let _ = chores.send(chore);
        }
    }

    fn work(&self, chores: &Receiver<Chore>) {
        push::be_patient();
        for chore in chores {
            match chore {
                Chore::Begin(session) => self.begin(&session),
                Chore::Write(session) => self.write(&session),
                Chore::End(done) => {
                    let sessions = std::mem::take(&mut *lock(&self.sessions));
                    sessions.iter().for_each(|session| self.write(session));
                    drop(done);
                    return;
                }
            }
        }
    }

    fn begin(&self, session: &Session) {
        if session.plan().is_none() {
            let before = self.before(&session.subject);
            let sees = |page| session.sees(page);
            session.set_plan(Plan::new(before, self.prefetch, session.pages(), sees));
        }
        if let Some(notifier) = self.notifier.get().filter(|_| self.prefetch) {
            push(session, notifier, &|| self.has_ended());
        }
    }

    /// What was recorded before. A file that cannot be used is told of, and is as good as
    /// none: the next one that is written replaces it.
    fn before(&self, subject: &Subject) -> Option<WorkingSet> {
        if let Some(elsewhere) = &self.elsewhere {
            return elsewhere.working_set(&subject.image);
        }
        match self.store.working_set(subject.snapshot, &subject.image) {
            Ok(before) => before,
            Err(error) => {
                tracing::warn!(%error, "a working set is not used");
                None
            }
        }
    }

    fn write(&self, session: &Session) {
        let subject = &session.subject;
        let Some(seen) = session.seen().filter(|_| self.keeps) else {
            return;
        };
        if let Some(elsewhere) = &self.elsewhere {
            let before = session.plan().and_then(|plan| plan.before.as_ref());
            let set = WorkingSet::merged(before, &seen, SystemTime::now());
            return elsewhere.keep_working_set(&subject.image, &set);
        }
        // What a newer version wrote is left to it.
        let now = match self.store.working_set(subject.snapshot, &subject.image) {
            Err(error) if error.class() == ErrorClass::Newer => return,
            now => now.ok().flatten(),
        };
        let before = session.plan().and_then(|plan| plan.before.as_ref());
        // A recording of the whole image that came meanwhile is worth more than one of a part.
        let whole = |set: Option<&WorkingSet>| {
            let set = set.filter(|set| set.recordings() > 0);
            set.map(WorkingSet::recorded)
        };
        if self.part.is_some() && whole(now.as_ref()) != whole(before) {
            return;
        }
        let set = WorkingSet::merged(before, &seen, SystemTime::now());
        let kept = self
            .store
            .keep_working_set(subject.snapshot, &subject.image, &set);
        if let Err(error) = kept {
            tracing::debug!(%error, "a working set is not kept");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
