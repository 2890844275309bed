//! A lease: who works on a bucket, and what it knows of condemnations.
//!
//! ```text
//! SNAPLEAS:  1 kind (0 push, 1 view, 2 removal)   20 head that is viewed, or zeros
//!            4 count, then each 20: condemnation that was seen
//!            2 length   who it is, for people
//! ```

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::error::Error;
use crate::protocol::record::{CondemnRecord, fence};
use crate::protocol::sealed::Fields;
use crate::protocol::{
    Bucket, Listed, Malformed, Name, Part, Result, Rule, Session, Unanswered, delete_surely,
    put_surely, seal, unseal,
};

const LEASE: [u8; 8] = *b"SNAPLEAS";

/// What a session does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseKind {
    /// It stores a snapshot, and may reuse what is there.
    Push,
    /// It reads the snapshot with this head.
    View(Name),
    /// It removes a tag.
    Removal,
}

/// What is in a beat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaseRecord {
    /// What the session does.
    pub kind: LeaseKind,
    /// The condemnations that it knows.
    pub seen: BTreeSet<Name>,
    /// Host and process, for people.
    pub who: String,
}

impl LeaseRecord {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self, key: &str) -> Vec<u8> {
        let (kind, head) = match self.kind {
            LeaseKind::Push => (0, [0; Name::LEN]),
            LeaseKind::View(head) => (1, head.to_bytes()),
            LeaseKind::Removal => (2, [0; Name::LEN]),
        };
        let mut payload = vec![kind];
        payload.extend_from_slice(&head);
        let count = u32::try_from(self.seen.len()).expect("few collections are under way");
        payload.extend_from_slice(&count.to_le_bytes());
        for name in &self.seen {
            payload.extend_from_slice(&name.to_bytes());
        }
        let who = self.who.as_bytes();
        let len = u16::try_from(who.len().min(512)).expect("at most 512");
        payload.extend_from_slice(&len.to_le_bytes());
        payload.extend_from_slice(&who[..usize::from(len)]);
        seal(LEASE, key, &payload)
    }

    /// # Errors
    /// If it is damaged or newer.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(unseal(LEASE, key, bytes)?);
        let kind = fields.array()?;
        let head = Name::from_bytes(&fields.array()?);
        let kind = match kind {
            [0_u8] => LeaseKind::Push,
            [1] => LeaseKind::View(head),
            [2] => LeaseKind::Removal,
            _ => return Err(Malformed::Wrong("it is a lease of no kind that there is")),
        };
        let count = fields.count(Name::LEN)?;
        let seen = (0..count).map(|_| Ok(Name::from_bytes(&fields.array()?)));
        let seen = seen.collect::<Result<_, Malformed>>()?;
        let len = usize::from(u16::from_le_bytes(fields.array()?));
        let who = String::from_utf8_lossy(fields.take(len)?).into_owned();
        fields.end()?;
        Ok(Self { kind, seen, who })
    }
}

/// A session's own lease.
pub struct Lease {
    session: Session,
    record: LeaseRecord,
    next_beat: u32,
    next_number: u32,
    condemned: BTreeSet<Part>,
}

impl Lease {
    /// Writes a lease, and then reads what is condemned.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub async fn begin<B: Bucket>(bucket: &B, kind: LeaseKind, who: &str) -> Result<Self> {
        let mut lease = Self::new(bucket, kind, who);
        let begun = lease.write(bucket).await;
        match begun {
            Ok(()) => Ok(lease),
            Err(error) => {
                lease.give_up(bucket).await;
                Err(error)
            }
        }
    }

    /// A view's lease that is to be written, and its first beat: key and bytes.
    pub(crate) fn of_view<B: Bucket>(bucket: &B, head: Name, who: &str) -> (Self, String, Vec<u8>) {
        let mut lease = Self::new(bucket, LeaseKind::View(head), who);
        let (key, bytes) = lease.beat_bytes(0);
        // It may be written, whatever is told.
        lease.next_beat = 1;
        (lease, key, bytes)
    }

    fn new<B: Bucket>(bucket: &B, kind: LeaseKind, who: &str) -> Self {
        Self {
            session: bucket.fresh_session(),
            record: LeaseRecord {
                kind,
                seen: BTreeSet::new(),
                who: who.to_owned(),
            },
            next_beat: 0,
            next_number: 0,
            condemned: BTreeSet::new(),
        }
    }

    async fn write<B: Bucket>(&mut self, bucket: &B) -> Result<()> {
        let early = bucket.is_without(Rule::LeaseBeforeCondemned);
        if self.record.kind == LeaseKind::Push && early {
            self.read_condemned(bucket).await?;
        }
        self.beat(bucket).await?;
        if self.record.kind == LeaseKind::Push && !early {
            self.read_condemned(bucket).await?;
            self.beat(bucket).await?;
        }
        Ok(())
    }

    /// Another sign of life.
    ///
    /// # Errors
    /// If the bucket did not answer.
    pub async fn beat<B: Bucket>(&mut self, bucket: &B) -> Result<(), Unanswered> {
        let key = self.session.beat_key(self.next_beat);
        // Its number is taken, whatever becomes of it.
        self.next_beat += 1;
        put_surely(bucket, &key, &self.record.encode(&key)).await
    }

    async fn read_condemned<B: Bucket>(&mut self, bucket: &B) -> Result<()> {
        for (name, record) in condemnations(bucket).await? {
            self.record.seen.insert(name);
            self.condemned.extend(record.parts);
        }
        Ok(())
    }

    /// Whose lease it is.
    #[must_use]
    pub fn session(&self) -> Session {
        self.session
    }

    /// A name for an object of this session.
    pub fn next_name(&mut self) -> Name {
        let number = self.next_number;
        self.next_number += 1;
        Name {
            session: self.session,
            number,
        }
    }

    /// Whether a collection was about to delete it when this lease began.
    #[must_use]
    pub fn is_condemned(&self, part: Part) -> bool {
        self.condemned.contains(&part)
    }

    /// Ends the session, all of whose writes were acknowledged.
    ///
    /// # Errors
    /// If the bucket did not answer: the lease may still be there.
    pub async fn end<B: Bucket>(&self, bucket: &B) -> Result<(), Unanswered> {
        for beat in 0..self.next_beat {
            delete_surely(bucket, &self.session.beat_key(beat)).await?;
        }
        Ok(())
    }

    /// Ends a session whose writes may come late: nothing of it counts any more. Where
    /// that cannot be written, the lease stays, and a collection gives it up.
    pub async fn give_up<B: Bucket>(&self, bucket: &B) {
        if !bucket.is_without(Rule::FailureIsFenced) {
            let key = self.session.fence_key();
            if put_surely(bucket, &key, &fence(&key)).await.is_err() {
                return;
            }
        }
        // If it stays it is one of a session that is known to have ended.
        let _ = self.end(bucket).await;
    }

    /// How a fresh beat of this lease is written, for who keeps it alive from another
    /// thread.
    #[must_use]
    pub fn beat_bytes(&self, beat: u32) -> (String, Vec<u8>) {
        let key = self.session.beat_key(beat);
        let bytes = self.record.encode(&key);
        (key, bytes)
    }

    /// The beats that another thread wrote are this lease's.
    pub fn wrote_beats_up_to(&mut self, next: u32) {
        self.next_beat = self.next_beat.max(next);
    }

    /// The number of the next beat.
    #[must_use]
    pub fn next_beat(&self) -> u32 {
        self.next_beat
    }
}

const DAMAGED_CONDEMNATION: &str = "it does not tell what a collection condemned, so nothing can \
    be pushed or collected. Once no `remote gc` of this bucket is running on any host, delete \
    this object from the bucket, and run the command again";

/// What collections are about to delete.
pub(crate) async fn condemnations<B: Bucket>(bucket: &B) -> Result<Vec<(Name, CondemnRecord)>> {
    let mut found = Vec::new();
    // What it condemned is not known, so nothing may be reused meanwhile.
    let told = |error| match error {
        Error::Damaged { key, .. } => Error::Damaged {
            key,
            reason: DAMAGED_CONDEMNATION,
        },
        other => other,
    };
    for listed in bucket.list("condemn/").await? {
        let name = listed.key.strip_prefix("condemn/").and_then(Name::parse);
        let Some(name) = name else { continue };
        // One that went away meanwhile condemns nothing that exists.
        let bytes = bucket.get(&listed.key).await;
        if let Some(bytes) = bytes.map_err(|error| told(error.into()))? {
            let record = CondemnRecord::decode(&listed.key, &bytes);
            let record = record.map_err(|error| told(error.of(&listed.key)));
            found.push((name, record?));
        }
    }
    Ok(found)
}

const DAMAGED_LEASE: &str = "it does not tell what its host works on, so nothing is collected yet. \
    Who is at work writes another one; if none was written for a day, `remote gc` takes it for \
    ended and removes it, so run that then";

/// What a beat says, if it is still there.
///
/// # Errors
/// [`Error::Damaged`]; if the bucket did not answer.
pub(crate) async fn read_beat<B: Bucket>(bucket: &B, beat: &Listed) -> Result<Option<LeaseRecord>> {
    let told = |error| match error {
        Error::Damaged { key, .. } => Error::Damaged {
            key,
            reason: DAMAGED_LEASE,
        },
        other => other,
    };
    let bytes = bucket.get(&beat.key).await;
    let Some(bytes) = bytes.map_err(|error| told(error.into()))? else {
        return Ok(None);
    };
    let record = LeaseRecord::decode(&beat.key, &bytes);
    Ok(Some(record.map_err(|error| told(error.of(&beat.key)))?))
}

/// The latest beat of each session that has a lease, in a listing.
pub(crate) fn latest_beats(listing: &[Listed]) -> BTreeMap<Session, (u32, Listed)> {
    let mut latest: BTreeMap<Session, (u32, Listed)> = BTreeMap::new();
    for listed in listing {
        let Some((session, beat)) = Session::parse_beat(&listed.key) else {
            continue;
        };
        let before = latest.get(&session).map(|(beat, _)| *beat);
        if before.is_none_or(|before| before < beat) {
            latest.insert(session, (beat, listed.clone()));
        }
    }
    latest
}

/// Whether none of a session's beats that were listed is there. They stay until it ends, so
/// one that was at work when they were listed has ended, or had written none yet. Some servers
/// list for minutes what was deleted while one of their nodes was away: only a read tells.
pub(crate) async fn is_ended<B: Bucket>(
    bucket: &B,
    session: Session,
    listed: &[Listed],
) -> Result<bool, Unanswered> {
    let is_own = |one: &&Listed| Session::parse_beat(&one.key).is_some_and(|it| it.0 == session);
    for beat in listed.iter().filter(is_own).rev() {
        if bucket.exists(&beat.key).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The latest beat of a session that can be read, and what it says, or why it says nothing; none if
/// the session has ended ([`is_ended`]). One that is listed and cannot be read may be on its way,
/// and then those before it are there.
pub(crate) async fn read_latest<B: Bucket>(
    bucket: &B,
    session: Session,
    listed: &[Listed],
) -> Result<Option<(Listed, Result<LeaseRecord>)>> {
    let is_own = |one: &&Listed| Session::parse_beat(&one.key).is_some_and(|it| it.0 == session);
    for beat in listed.iter().filter(is_own).rev() {
        match read_beat(bucket, beat).await {
            Ok(None) => {}
            Ok(Some(record)) => return Ok(Some((beat.clone(), Ok(record)))),
            Err(error @ Error::Damaged { .. }) => return Ok(Some((beat.clone(), Err(error)))),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// A session that has a lease, its latest beat, and what that says, or why it says nothing.
pub type Leased = (Session, Listed, Result<LeaseRecord>);

/// The sessions that have leases, and what their latest beats say. One that went away
/// meanwhile is left out, and so is a damaged one of a session that was given up.
///
/// # Errors
/// If the bucket did not answer, or a lease is of a newer version.
pub async fn leases<B: Bucket>(bucket: &B) -> Result<Vec<Leased>> {
    let mut found = Vec::new();
    for (session, (_, listed)) in latest_beats(&bucket.list("lease/").await?) {
        let record = match read_beat(bucket, &listed).await {
            Ok(None) => continue,
            Ok(Some(record)) => Ok(record),
            Err(error @ Error::Damaged { .. }) => {
                if bucket.exists(&session.fence_key()).await? {
                    continue;
                }
                Err(error)
            }
            Err(error) => return Err(error),
        };
        found.push((session, listed, record));
    }
    Ok(found)
}
