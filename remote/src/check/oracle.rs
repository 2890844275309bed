//! What was acknowledged, and whether it is there.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::{HeadSummary, Listed, Listing, Name, RefKey, RefKind, Session};

/// A tag's change that somebody was told to count.
#[derive(Clone, Hash, Debug)]
pub struct Acked {
    pub record: RefKey,
    pub contents: u8,
    /// Whether the tag was not to exist before. Only of what its writer knows.
    pub is_new: bool,
}

#[derive(Default, Hash)]
pub struct Oracle {
    pub acked: Vec<Acked>,
    /// Views that were told to have begun: whose, of which head, with which contents.
    pub views: Vec<(Session, Name, Option<u8>)>,
    /// What the heads hold that were written.
    pub heads: BTreeMap<Name, u8>,
    /// Heads of repacks: what they hold a tag has named before.
    pub moved: BTreeSet<Name>,
    /// Removals that were asked for, acknowledged or not.
    pub removals: Vec<RefKey>,
    /// What a collection said that no collection does.
    pub damage: Option<String>,
}

type Objects = BTreeMap<String, Vec<u8>>;

/// The records as they are, of all that has landed.
pub fn listing(objects: &Objects) -> Listing {
    let of = |prefix: &str| -> Vec<Listed> {
        let keys = objects.keys().filter(|key| key.starts_with(prefix));
        keys.map(|key| Listed {
            key: key.clone(),
            len_bytes: 1,
            modified: 0,
        })
        .collect()
    };
    Listing::from_keys(&of("refs/"), of("lease/"), &of("fence/"))
}

/// What a head's packs hold.
pub fn contents_of(objects: &Objects, head: Name) -> Result<u8, String> {
    let key = head.head_key();
    let bytes = objects.get(&key).ok_or_else(|| format!("{key} is gone"))?;
    let (summary, rest) = HeadSummary::decode(&key, bytes).map_err(|_| format!("{key}: bad"))?;
    let mut found = 0;
    for pack in &summary.packs {
        let key = pack.pack_key();
        let pack = objects.get(&key).ok_or_else(|| format!("{key} is gone"))?;
        found |= pack[0];
    }
    match rest {
        [wanted] if wanted & !found == 0 => Ok(*wanted),
        _ => Err(format!("{key} has not all it needs")),
    }
}

impl Oracle {
    /// A change counts.
    pub fn counts(&mut self, record: &RefKey) {
        self.acked.push(Acked {
            record: record.clone(),
            contents: self.heads.get(&record.head).copied().unwrap_or(0),
            is_new: false,
        });
    }

    /// Its writer was told so: it was to be new.
    pub fn was_new(&mut self, record: &RefKey) {
        for one in &mut self.acked {
            one.is_new |= one.record == *record;
        }
    }

    pub fn check(&self, objects: &Objects) -> Result<(), String> {
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        let listing = listing(objects);
        for one in &self.acked {
            let higher =
                |other: &&Acked| other.record.tag == one.record.tag && other.record > one.record;
            if one.record.kind == RefKind::Set && !self.acked.iter().any(|it| higher(&it)) {
                // Somebody may have confirmed another change since, which then counts.
                let winner = listing.judge(&one.record.tag).winner;
                let winner = winner.filter(|winner| *winner > one.record);
                let record = winner.as_ref().unwrap_or(&one.record);
                if record.kind == RefKind::Set {
                    match contents_of(objects, record.head) {
                        Ok(contents) if contents == one.contents || record != &one.record => {}
                        Ok(_) => return Err(format!("{record:?} holds something else")),
                        Err(lost) => return Err(format!("{record:?} counts: {lost}")),
                    }
                }
            }
            if one.is_new {
                self.check_exclusive(one)?;
            }
            self.check_moved(one, &listing)?;
        }
        for (session, head, contents) in &self.views {
            if objects.contains_key(&session.fence_key()) {
                continue;
            }
            match (contents_of(objects, *head), contents) {
                (Ok(_), None) => {}
                (Ok(found), Some(contents)) if found == *contents => {}
                (Ok(_), _) => return Err(format!("the view of {head} sees something else")),
                (Err(lost), _) => return Err(format!("view of {head}: {lost}")),
            }
        }
        Ok(())
    }

    /// No tag names what only a repack says: it moves what the tag's last change says.
    fn check_moved(&self, one: &Acked, listing: &Listing) -> Result<(), String> {
        if !self.moved.contains(&one.record.head) {
            return Ok(());
        }
        let tag = &one.record.tag;
        let winner = listing.judge(tag).winner;
        if winner.as_ref() != Some(&one.record) {
            return Ok(());
        }
        let changes = self.acked.iter().map(|other| &other.record);
        let changes = changes.filter(|it| it.tag == *tag && !self.moved.contains(&it.head));
        match changes.max() {
            Some(last) if last < &one.record && !last.is_same_change(&one.record) => Err(format!(
                "{:?} moved what {last:?} had taken the place of",
                one.record
            )),
            _ => Ok(()),
        }
    }

    /// A push of a new tag was acknowledged: what was acknowledged before it was removed.
    fn check_exclusive(&self, new: &Acked) -> Result<(), String> {
        let same = |other: &&Acked| other.record.tag == new.record.tag;
        let before = self.acked.iter().filter(same).filter(|other| {
            other.record < new.record
                && !other.record.is_same_change(&new.record)
                && other.contents != new.contents
        });
        match before.max_by(|one, other| one.record.cmp(&other.record)) {
            Some(last)
                if last.record.kind == RefKind::Set
                    && !self.removals.iter().any(|removal| {
                        removal.tag == last.record.tag
                            && *removal > last.record
                            && *removal < new.record
                    }) =>
            {
                Err(format!(
                    "{:?} was acknowledged as new over {:?}",
                    new.record, last.record
                ))
            }
            _ => Ok(()),
        }
    }
}
