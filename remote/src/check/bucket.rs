//! The bucket as an actor has it: it asks, and is told when it has its turn.

use std::cell::RefCell;
use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::rc::Rc;
use std::task::Poll;

use super::oracle::Oracle;
use crate::protocol::{self, Answer, AtOnce, Bucket, Listed, RefKey, Rule, Session, Unanswered};

/// What an actor asks for, one request at a time.
#[derive(Clone, Hash, Debug)]
pub enum Ask {
    Put(String, Vec<u8>),
    Delete(String),
    Get(String),
    Exists(String),
    List(String, Vec<String>),
    GivenUp {
        view: bool,
    },
    Pause,
    /// Which way round things are done that are asked for at once.
    Order,
    /// A write that is under way, by its number.
    Finish(u32),
}

#[derive(Clone, Hash, Debug)]
pub enum Reply {
    Done,
    Failed,
    Bytes(Option<Vec<u8>>),
    Keys(Vec<String>),
    Flag(bool),
}

/// What an actor asks for, and what it is told.
#[derive(Default)]
pub struct Slot {
    pub ask: Option<Ask>,
    pub reply: Option<Reply>,
}

/// An actor's end of the bucket.
#[derive(Clone)]
pub struct SimBucket {
    pub slot: Rc<RefCell<Slot>>,
    pub sessions: Rc<RefCell<u64>>,
    pub without: Option<Rule>,
    pub host: u32,
    pub oracle: Rc<RefCell<Oracle>>,
}

impl SimBucket {
    async fn ask(&self, ask: Ask) -> Reply {
        self.slot.borrow_mut().ask = Some(ask);
        poll_fn(|_| match self.slot.borrow_mut().reply.take() {
            Some(reply) => Poll::Ready(reply),
            None => Poll::Pending,
        })
        .await
    }

    /// Lets others have their turns.
    pub async fn pause(&self) {
        self.ask(Ask::Pause).await;
    }

    fn done(reply: &Reply, what: &'static str, key: &str) -> Result<(), Unanswered> {
        match reply {
            Reply::Done => Ok(()),
            _ => Err(Unanswered {
                what,
                key: key.to_owned(),
                reason: "no answer".to_owned(),
                wrong: None,
                refused: false,
            }),
        }
    }
}

impl AtOnce for SimBucket {
    async fn at_once(&self, asks: &[protocol::Ask<'_>]) -> Vec<Result<Answer, Unanswered>> {
        let reversed = matches!(self.ask(Ask::Order).await, Reply::Flag(true));
        let mut answers = Vec::new();
        for at in 0..asks.len() {
            let at = if reversed { asks.len() - 1 - at } else { at };
            answers.push(asks[at].of(self).await);
        }
        if reversed {
            answers.reverse();
        }
        answers
    }
}

impl Bucket for SimBucket {
    async fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        let reply = self.ask(Ask::Put(key.to_owned(), bytes.to_owned())).await;
        Self::done(&reply, "write", key)
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Unanswered> {
        match self.ask(Ask::Get(key.to_owned())).await {
            Reply::Bytes(bytes) => Ok(bytes),
            other => panic!("{other:?}"),
        }
    }

    async fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        match self.ask(Ask::Exists(key.to_owned())).await {
            Reply::Flag(flag) => Ok(flag),
            other => panic!("{other:?}"),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        match self.ask(Ask::List(prefix.to_owned(), Vec::new())).await {
            Reply::Keys(keys) => Ok(keys
                .into_iter()
                .map(|key| Listed {
                    key,
                    len_bytes: 1,
                    modified: 0,
                })
                .collect()),
            other => panic!("{other:?}"),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), Unanswered> {
        let reply = self.ask(Ask::Delete(key.to_owned())).await;
        Self::done(&reply, "delete", key)
    }

    fn fresh_session(&self) -> Session {
        if self.is_without(Rule::NamesAreUsedOnce) {
            return Session(u128::from(self.host) + 1);
        }
        let mut count = self.sessions.borrow_mut();
        *count += 1;
        let mut hasher = DefaultHasher::new();
        count.hash(&mut hasher);
        Session(u128::from(hasher.finish()))
    }

    async fn is_given_up(&self, _: Session, _: &Listed, view: bool) -> bool {
        match self.ask(Ask::GivenUp { view }).await {
            Reply::Flag(flag) => flag,
            other => panic!("{other:?}"),
        }
    }

    fn counts(&self, record: &RefKey) {
        self.oracle.borrow_mut().counts(record);
    }

    fn attempts(&self) -> u32 {
        1
    }

    fn is_without(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }
}
