//! A bucket in memory, and whose turn it is.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

use super::bucket::{Ask, Reply, SimBucket, Slot};
use super::oracle::Oracle;
use crate::protocol::{HeadSummary, Name, RefKey, RefKind, Rule};

/// Makes every choice of a history.
pub trait Chooser {
    /// One of so many; the first is the ordinary one. `weight` is how likely the others
    /// are, of a thousand, where that is drawn.
    fn choose(&mut self, of: usize, weight: u32) -> usize;
    /// Which of so many whose turn it can be; `last` had it before.
    fn turn(&mut self, of: usize, last: Option<usize>) -> usize;
    /// Whether listings are read a few keys at a time.
    fn pages(&self) -> bool;
    /// Whether to go on, in this state.
    fn goes_on(&mut self, state: u64) -> bool;
}

/// A write that is under way, for ever or until it lands.
#[derive(Clone, Hash, Debug)]
struct Late {
    number: u32,
    key: String,
    /// Nothing is a delete.
    bytes: Option<Vec<u8>>,
    /// Somebody waits for its end.
    awaited: bool,
}

type Script = Pin<Box<dyn Future<Output = ()>>>;

struct Actor {
    name: String,
    slot: Rc<RefCell<Slot>>,
    script: Option<Script>,
    /// Of all replies: what the actor does next depends on nothing else.
    history: u64,
}

pub struct World {
    pub objects: BTreeMap<String, Vec<u8>>,
    late: Vec<Late>,
    next_late: u32,
    actors: Vec<Actor>,
    last: Option<usize>,
    pub faults_left: u32,
    pub without: Option<Rule>,
    sessions: Rc<RefCell<u64>>,
    pub oracle: Rc<RefCell<Oracle>>,
    pub trace: Vec<String>,
    pub traced: bool,
    pub always_given_up: bool,
}

impl World {
    pub fn new(without: Option<Rule>, faults: u32, seed: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            late: Vec::new(),
            next_late: 0,
            actors: Vec::new(),
            last: None,
            faults_left: faults,
            without,
            sessions: Rc::new(RefCell::new(seed)),
            oracle: Rc::default(),
            trace: Vec::new(),
            traced: false,
            always_given_up: false,
        }
    }

    /// What the next actor sees.
    pub fn bucket(&self) -> SimBucket {
        SimBucket {
            slot: Rc::default(),
            sessions: self.sessions.clone(),
            without: self.without,
            host: u32::try_from(self.actors.len()).expect("few actors"),
            oracle: self.oracle.clone(),
        }
    }

    /// Adds an actor, and lets it come to its first request.
    pub fn add<F: Future<Output = ()> + 'static>(
        &mut self,
        name: &str,
        script: impl FnOnce(SimBucket) -> F,
    ) {
        let bucket = self.bucket();
        let slot = bucket.slot.clone();
        self.actors.push(Actor {
            name: name.to_owned(),
            slot,
            script: Some(Box::pin(script(bucket))),
            history: 0,
        });
        self.poll(self.actors.len() - 1);
    }

    fn poll(&mut self, at: usize) {
        let actor = &mut self.actors[at];
        let Some(script) = &mut actor.script else {
            return;
        };
        if script
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
        {
            actor.script = None;
        }
    }

    fn reply(&mut self, at: usize, reply: Reply) {
        let actor = &mut self.actors[at];
        if self.traced {
            let ask = actor.slot.borrow().ask.clone();
            let text = match &ask {
                Some(Ask::Put(key, bytes)) => format!("Put {key} {}", bytes.len()),
                other => format!("{other:?}").replace("000000000000", ".."),
            };
            let reply = match &reply {
                Reply::Bytes(bytes) => format!("Bytes {}", bytes.is_some()),
                other => format!("{other:?}"),
            };
            self.trace
                .push(format!("{}: {text} -> {reply}", actor.name));
        }
        let mut hasher = DefaultHasher::new();
        (actor.history, &reply).hash(&mut hasher);
        actor.history = hasher.finish();
        actor.slot.borrow_mut().ask = None;
        actor.slot.borrow_mut().reply = Some(reply);
        self.poll(at);
    }

    fn state(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.objects, &self.late, self.faults_left).hash(&mut hasher);
        for actor in &self.actors {
            (actor.history, actor.script.is_some()).hash(&mut hasher);
            actor.slot.borrow().ask.hash(&mut hasher);
        }
        self.oracle.borrow().hash(&mut hasher);
        hasher.finish()
    }

    /// Runs all actors to their ends. What was lost, if anything was.
    pub fn run(&mut self, chooser: &mut dyn Chooser) -> Result<bool, String> {
        self.run_with(chooser, &mut |_| {})
    }

    /// The same, looking at the oracle after each step.
    pub fn run_with(
        &mut self,
        chooser: &mut dyn Chooser,
        look: &mut dyn FnMut(&Oracle),
    ) -> Result<bool, String> {
        loop {
            let ready: Vec<usize> = (0..self.actors.len())
                .filter(|at| self.actors[*at].script.is_some())
                .collect();
            if ready.is_empty() {
                return Ok(true);
            }
            if !chooser.goes_on(self.state()) {
                return Ok(false);
            }
            let landing: Vec<usize> = (0..self.late.len())
                .filter(|at| !self.late[*at].awaited)
                .collect();
            let last = ready.iter().position(|at| Some(*at) == self.last);
            let turn = chooser.turn(ready.len() + landing.len(), last);
            match ready.get(turn) {
                Some(at) => {
                    self.last = Some(*at);
                    self.step(*at, chooser);
                }
                None => self.land(landing[turn - ready.len()]),
            }
            let oracle = self.oracle.borrow();
            look(&oracle);
            oracle.check(&self.objects)?;
        }
    }

    fn land(&mut self, at: usize) {
        let late = self.late.remove(at);
        if self.traced {
            let what = if late.bytes.is_some() {
                "write"
            } else {
                "delete"
            };
            self.trace
                .push(format!("late {what} of {} lands", late.key));
        }
        self.apply(&late.key, late.bytes);
    }

    fn apply(&mut self, key: &str, bytes: Option<Vec<u8>>) {
        match bytes {
            Some(bytes) => self.objects.insert(key.to_owned(), bytes),
            None => self.objects.remove(key),
        };
    }

    fn make_late(&mut self, key: &str, bytes: Option<Vec<u8>>, awaited: bool) -> u32 {
        self.next_late += 1;
        self.late.push(Late {
            number: self.next_late,
            key: key.to_owned(),
            bytes,
            awaited,
        });
        self.next_late
    }

    /// A fault, or none.
    fn fault(&mut self, of: usize, weight: u32, chooser: &mut dyn Chooser) -> usize {
        if self.faults_left == 0 {
            return 0;
        }
        let fault = chooser.choose(of, weight);
        if fault != 0 {
            self.faults_left -= 1;
        }
        fault
    }

    fn step(&mut self, at: usize, chooser: &mut dyn Chooser) {
        let ask = self.actors[at].slot.borrow().ask.clone();
        let ask = ask.expect("an actor that has not ended asks for something");
        match ask {
            Ask::Put(key, bytes) => self.write(at, &key, Some(bytes), chooser),
            Ask::Delete(key) => self.write(at, &key, None, chooser),
            Ask::Finish(number) => {
                let late = self.late.iter().position(|one| one.number == number);
                self.land(late.expect("nobody else ends it"));
                self.reply(at, Reply::Done);
            }
            Ask::Get(key) => {
                let seen = self.seen(&key, chooser);
                self.reply(at, Reply::Bytes(seen));
            }
            Ask::Exists(key) => {
                let seen = self.seen(&key, chooser).is_some();
                self.reply(at, Reply::Flag(seen));
            }
            Ask::List(prefix, found) => self.list(at, &prefix, found, chooser),
            Ask::GivenUp { view } => {
                let weight = if view { 100 } else { 400 };
                let given_up = self.always_given_up || chooser.choose(2, weight) == 1;
                self.reply(at, Reply::Flag(given_up));
            }
            Ask::Pause => self.reply(at, Reply::Done),
            Ask::Order => {
                let reversed = chooser.choose(2, 500) == 1;
                self.reply(at, Reply::Flag(reversed));
            }
        }
    }

    fn write(&mut self, at: usize, key: &str, bytes: Option<Vec<u8>>, chooser: &mut dyn Chooser) {
        if let (Some(bytes), Some(head)) =
            (&bytes, key.strip_prefix("heads/").and_then(Name::parse))
            && let Ok((_, [contents])) = HeadSummary::decode(key, bytes)
        {
            self.oracle.borrow_mut().heads.insert(head, *contents);
        }
        let removal = RefKey::parse(key).filter(|record| record.kind == RefKind::Removed);
        if bytes.is_some() {
            self.oracle.borrow_mut().removals.extend(removal);
        }
        match self.fault(7, 60, chooser) {
            0 => {
                self.apply(key, bytes);
                self.reply(at, Reply::Done);
            }
            // Under way, and seen by some.
            1 => {
                let number = self.make_late(key, bytes, true);
                self.actors[at].slot.borrow_mut().ask = Some(Ask::Finish(number));
            }
            // An error, and it may still happen.
            2 => {
                self.make_late(key, bytes, false);
                self.reply(at, Reply::Failed);
            }
            // It happened, and the reply is lost.
            3 => {
                self.apply(key, bytes);
                self.reply(at, Reply::Failed);
            }
            // It was sent twice, and the second one is late.
            4 => {
                self.apply(key, bytes.clone());
                self.make_late(key, bytes, false);
                self.reply(at, Reply::Done);
            }
            // The host crashes before it, or while it is under way.
            5 => self.crash(at),
            _ => {
                self.make_late(key, bytes, false);
                self.crash(at);
            }
        }
    }

    fn crash(&mut self, at: usize) {
        self.actors[at].script = None;
        if self.traced {
            self.trace.push(format!("{} crashes", self.actors[at].name));
        }
        for late in &mut self.late {
            late.awaited = false;
        }
        for actor in &mut self.actors {
            if let (Some(Ask::Finish(number)), true) =
                (&actor.slot.borrow().ask, actor.script.is_some())
            {
                let own = self.late.iter_mut().find(|late| late.number == *number);
                own.expect("it is awaited").awaited = true;
            }
        }
    }

    /// What a read finds: of writes under way it may see each.
    fn seen(&mut self, key: &str, chooser: &mut dyn Chooser) -> Option<Vec<u8>> {
        let mut seen = self.objects.get(key).cloned();
        for late in self.late.iter().filter(|late| late.key == key) {
            if seen != late.bytes && chooser.choose(2, 500) == 1 {
                seen.clone_from(&late.bytes);
            }
        }
        seen
    }

    fn list(&mut self, at: usize, prefix: &str, mut found: Vec<String>, chooser: &mut dyn Chooser) {
        let after = found.last().cloned();
        let later = |key: &&String| {
            key.starts_with(prefix) && after.as_ref().is_none_or(|after| after < *key)
        };
        let mut keys: Vec<String> = self.objects.keys().filter(later).cloned().collect();
        let late = self.late.iter().map(|late| &late.key).filter(later);
        keys.extend(late.cloned());
        keys.sort();
        keys.dedup();
        let page = if chooser.pages() { 1 } else { usize::MAX };
        let mut left = page;
        let ended = keys.len() <= page;
        for key in keys {
            if left == 0 {
                break;
            }
            if self.seen(&key, chooser).is_some() {
                found.push(key);
                left -= 1;
            }
        }
        if ended || left > 0 {
            self.reply(at, Reply::Keys(found));
        } else {
            self.actors[at].slot.borrow_mut().ask = Some(Ask::List(prefix.to_owned(), found));
        }
    }

    /// Nothing is under way any more: all of it happened, or none.
    pub fn settle(&mut self, chooser: &mut dyn Chooser) {
        while !self.late.is_empty() {
            if chooser.choose(2, 500) == 1 {
                self.land(0);
            } else {
                self.late.remove(0);
            }
        }
    }
}
