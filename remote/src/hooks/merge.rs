//! What a collection does with runs: those whose packs are gone go, and of many small ones
//! it makes one, so that there are few to be read. Whatever it does loses nothing: a run is a
//! hint.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::hooks::run::{LONGEST_RUN_BYTES, Listed, Prefix, Run};
use crate::protocol::{Bucket as _, Listed as Object, Malformed, Name, Part, Session, Unanswered};
use crate::remote::Remote;

/// So many small runs are made one.
const MANY: usize = 64;
/// What is shorter is small.
const SMALL_BYTES: u64 = 1 << 20;

/// What a run is good for.
enum Worth {
    /// It is kept as it is.
    Kept,
    /// None of its packs is there, or it is damaged.
    Nothing,
    /// It is kept, and may be made one with others.
    Small(Run),
}

/// Tidies the runs of a bucket.
pub fn tidy(remote: &Remote) -> Result<()> {
    // A run is written after its packs: in this order none is taken for one without packs.
    let runs = remote.bucket.list("hooks/")?;
    if runs.is_empty() {
        return Ok(());
    }
    let packs: BTreeSet<Name> = remote
        .bucket
        .list("packs/")?
        .iter()
        .filter_map(|one| match Part::parse(&one.key) {
            Some(Part::Pack(name)) => Some(name),
            _ => None,
        })
        .collect();
    let sessions: BTreeSet<Session> = packs.iter().map(|pack| pack.session).collect();
    let is_small = |one: &&Object| one.len_bytes < SMALL_BYTES;
    let merges = runs.iter().filter(is_small).count() >= MANY;
    let mut merged = Merged {
        remote,
        session: remote.fresh_session(),
        next: 0,
        run: Run::default(),
        old: Vec::new(),
    };
    for one in &runs {
        let Some(name) = Name::parse_hooks(&one.key) else {
            continue;
        };
        let is_own = sessions.contains(&name.session);
        let merges = merges && is_small(&one);
        if is_own && !merges {
            continue;
        }
        match worth(remote, one, &packs, merges)? {
            Worth::Kept => {}
            Worth::Nothing => remote.bucket.delete(&one.key)?,
            Worth::Small(run) => merged.add(&one.key, &run, &packs)?,
        }
    }
    Ok(merged.write()?)
}

fn worth(remote: &Remote, one: &Object, packs: &BTreeSet<Name>, merges: bool) -> Result<Worth> {
    if one.len_bytes > LONGEST_RUN_BYTES {
        return Ok(Worth::Nothing);
    }
    let bytes = match remote.object(&one.key)? {
        Ok(Some(bytes)) => bytes,
        // What stands there is no object, or it is gone.
        Ok(None) | Err(_) => return Ok(Worth::Kept),
    };
    let run = match Run::decode(&one.key, &bytes) {
        Ok(run) => run,
        Err(Malformed::Newer(_)) => return Ok(Worth::Kept),
        Err(Malformed::Wrong(_)) => return Ok(Worth::Nothing),
    };
    Ok(
        match run.packs.iter().any(|pack| packs.contains(&pack.name)) {
            false => Worth::Nothing,
            true if merges => Worth::Small(run),
            true => Worth::Kept,
        },
    )
}

/// Runs that become one.
struct Merged<'a> {
    remote: &'a Remote,
    session: Session,
    next: u32,
    run: Run,
    /// The keys of those that are in it.
    old: Vec<String>,
}

impl Merged<'_> {
    fn add(&mut self, key: &str, run: &Run, packs: &BTreeSet<Name>) -> Result<(), Unanswered> {
        let mut of_packs: Vec<Vec<Prefix>> = vec![Vec::new(); run.packs.len()];
        for (prefix, pack) in &run.hooks {
            of_packs[*pack as usize].push(*prefix);
        }
        let is_there = |(pack, _): &(Listed, _)| packs.contains(&pack.name);
        let each = run.packs.iter().copied().zip(of_packs);
        for (pack, hooks) in each.filter(is_there) {
            self.run.add_hooks(pack, hooks.into_iter());
        }
        self.old.push(key.to_owned());
        match self.run.is_full() {
            true => self.write(),
            false => Ok(()),
        }
    }

    /// Writes the new one, and then deletes those that are in it: the other way round a
    /// collection that is killed would lose them.
    fn write(&mut self) -> Result<(), Unanswered> {
        let old = std::mem::take(&mut self.old);
        if old.len() < 2 {
            return Ok(());
        }
        let name = Name {
            session: self.session,
            number: self.next,
        };
        self.next += 1;
        let key = name.hooks_key();
        let run = std::mem::take(&mut self.run);
        self.remote.bucket.put(&key, &run.encode(&key))?;
        for key in old {
            self.remote.bucket.delete(&key)?;
        }
        Ok(())
    }
}
