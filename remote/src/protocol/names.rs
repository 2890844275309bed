//! The keys of a bucket's objects.
//!
//! ```text
//! config                                    what the bucket is
//! refs/TAG/SEQ-SESSION-REV-KIND-HEAD        a record of a tag; HEAD is SESSION-N of its writer
//! heads/SESSION-N                           one snapshot
//! packs/SESSION-N                           pages and leaves
//! hooks/SESSION-N                           which pages are in which packs, of a sample
//! lease/SESSION/BEAT                        who works on the bucket
//! fence/SESSION                             whose word counts no more
//! condemn/SESSION-N                         what a collection is about to delete
//! SESSION   32 hexadecimal digits
//! SEQ       16                              N, REV, BEAT  8
//! KIND      s set, r removed, t retracted
//! ```

use std::fmt;

/// Who works on a bucket: 128 random bits, used for one push, removal, view or
/// collection, and never again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Session(pub u128);

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Session {
    /// The session with this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(Self(hex(text, 32)?))
    }

    /// A sign of life.
    #[must_use]
    pub fn beat_key(self, beat: u32) -> String {
        format!("lease/{self}/{beat:08x}")
    }

    /// Its fence.
    #[must_use]
    pub fn fence_key(self) -> String {
        format!("fence/{self}")
    }

    /// The session and the number of a beat.
    #[must_use]
    pub fn parse_beat(key: &str) -> Option<(Self, u32)> {
        let (session, beat) = key.strip_prefix("lease/")?.split_once('/')?;
        Some((Self::parse(session)?, number(beat)?))
    }

    /// Whose fence a key is.
    #[must_use]
    pub fn parse_fence(key: &str) -> Option<Self> {
        Self::parse(key.strip_prefix("fence/")?)
    }
}

/// The name of a pack, a head or a condemnation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Who wrote it.
    pub session: Session,
    /// Which of its objects.
    pub number: u32,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:08x}", self.session, self.number)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Name {
    /// How long a name is in a file.
    pub const LEN: usize = 20;

    /// The name that is written so.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (session, number_) = text.split_once('-')?;
        Some(Self {
            session: Session::parse(session)?,
            number: number(number_)?,
        })
    }

    /// Its bytes in files, little-endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.session.0.to_le_bytes());
        bytes[16..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// The name with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let (session, number) = bytes.split_at(16);
        Self {
            session: Session(u128::from_le_bytes(session.try_into().expect("16 bytes"))),
            number: u32::from_le_bytes(number.try_into().expect("4 bytes")),
        }
    }

    /// The key of the pack.
    #[must_use]
    pub fn pack_key(self) -> String {
        format!("packs/{self}")
    }

    /// The key of the head.
    #[must_use]
    pub fn head_key(self) -> String {
        format!("heads/{self}")
    }

    /// The key of a run of hooks.
    #[must_use]
    pub fn hooks_key(self) -> String {
        format!("hooks/{self}")
    }

    /// The run of hooks that a key is of.
    #[must_use]
    pub fn parse_hooks(key: &str) -> Option<Self> {
        Self::parse(key.strip_prefix("hooks/")?)
    }

    /// The key of the condemnation.
    #[must_use]
    pub fn condemn_key(self) -> String {
        format!("condemn/{self}")
    }
}

/// What a collection can delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Part {
    /// A pack.
    Pack(Name),
    /// A head.
    Head(Name),
}

impl Part {
    /// Its key.
    #[must_use]
    pub fn key(self) -> String {
        match self {
            Self::Pack(name) => name.pack_key(),
            Self::Head(name) => name.head_key(),
        }
    }

    /// What a key names.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        match key.split_once('/')? {
            ("packs", name) => Some(Self::Pack(Name::parse(name)?)),
            ("heads", name) => Some(Self::Head(Name::parse(name)?)),
            _ => None,
        }
    }

    /// Who wrote it.
    #[must_use]
    pub fn session(self) -> Session {
        match self {
            Self::Pack(name) | Self::Head(name) => name.session,
        }
    }
}

/// What a record says of its tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum RefKind {
    /// Its writer takes back what it wrote under this number.
    Retracted,
    /// The tag names nothing.
    Removed,
    /// The tag names a snapshot.
    Set,
}

impl RefKind {
    fn letter(self) -> char {
        match self {
            Self::Retracted => 't',
            Self::Removed => 'r',
            Self::Set => 's',
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "t" => Some(Self::Retracted),
            "r" => Some(Self::Removed),
            "s" => Some(Self::Set),
            _ => None,
        }
    }
}

/// The key of a tag's record. Records of a tag compare as they count.
#[derive(Clone, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct RefKey {
    /// The tag.
    pub tag: String,
    /// Its number: each change of a tag takes the next one.
    pub seq: u64,
    /// Who made this change.
    pub session: Session,
    /// How often the same change was written anew: confirmed, or with other packs.
    pub rev: u32,
    /// What it says.
    pub kind: RefKind,
    /// The head, of the session that wrote this record. Without an object for removals.
    pub head: Name,
}

impl RefKey {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> String {
        let Self {
            tag,
            seq,
            session,
            rev,
            head,
            ..
        } = self;
        let kind = self.kind.letter();
        format!("refs/{tag}/{seq:016x}-{session}-{rev:08x}-{kind}-{head}")
    }

    /// The record with this key.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        let (tag, rest) = key.strip_prefix("refs/")?.rsplit_once('/')?;
        let mut parts = rest.splitn(5, '-');
        let record = Self {
            tag: tag.to_owned(),
            seq: hex(parts.next()?, 16)?.try_into().ok()?,
            session: Session::parse(parts.next()?)?,
            rev: number(parts.next()?)?,
            kind: RefKind::parse(parts.next()?)?,
            head: Name::parse(parts.next()?)?,
        };
        (!tag.is_empty() && !tag.contains('/')).then_some(record)
    }

    /// The session that wrote the record.
    #[must_use]
    pub fn writer(&self) -> Session {
        self.head.session
    }

    /// Whether both are of the same change of the tag.
    #[must_use]
    pub fn is_same_change(&self, other: &Self) -> bool {
        (self.seq, self.session) == (other.seq, other.session)
    }
}

/// What the records of a tag begin with.
#[must_use]
pub fn tag_prefix(tag: &str) -> String {
    format!("refs/{tag}/")
}

fn hex(text: &str, digits: usize) -> Option<u128> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let good = text.len() == digits && text.bytes().all(good);
    good.then(|| u128::from_str_radix(text, 16).ok())?
}

fn number(text: &str) -> Option<u32> {
    hex(text, 8)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_round_trip_and_others_are_none() {
        let name = Name {
            session: Session(7),
            number: 3,
        };
        for kind in [RefKind::Set, RefKind::Removed, RefKind::Retracted] {
            let record = RefKey {
                tag: "base-1:x".to_owned(),
                seq: 9,
                session: Session(u128::MAX),
                rev: 2,
                kind,
                head: name,
            };
            assert_eq!(RefKey::parse(&record.key()), Some(record.clone()));
            let key = record.key();
            for wrong in [
                &key[..key.len() - 1],
                &key.to_uppercase(),
                &format!("{key}0"),
            ] {
                assert_eq!(RefKey::parse(wrong), None, "{wrong}");
            }
        }
        assert_eq!(Part::parse(&name.pack_key()), Some(Part::Pack(name)));
        assert_eq!(Part::parse(&name.head_key()), Some(Part::Head(name)));
        assert_eq!(Name::parse_hooks(&name.hooks_key()), Some(name));
        assert_eq!(Part::parse(&name.hooks_key()), None);
        assert_eq!(Part::parse("packs/7-3"), None);
        assert_eq!(Name::from_bytes(&name.to_bytes()), name);
        let beat = Session(5).beat_key(17);
        assert_eq!(Session::parse_beat(&beat), Some((Session(5), 17)));
    }
}
