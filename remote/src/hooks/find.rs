//! Packs that have pages of a snapshot, found by hooks, and where its pages are in them.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;

use crate::error::usable;
use crate::head::PagePlace;
use crate::hooks::read::Runs;
use crate::hooks::run::{Listed, ONE_IN, Prefix, Run, hook};
use crate::pack::{Held, decode_list};
use crate::protocol::{Error, Result};
use crate::remote::Remote;

/// Packs whose lists are read.
const MOST_PACKS: usize = 16;
/// Packs that are remembered of one run, and of all.
const MOST_OF_RUN: usize = 32;
const MOST_REMEMBERED: usize = 256;
/// A list is read if it is shorter than the pages that it is likely to find, if each takes so
/// much.
const PAGE_BYTES: u64 = 1024;
/// Lists that are read at once.
const AT_ONCE: usize = 4;

/// The hooks of a snapshot's pages, and then the pages that were found.
#[derive(Debug, Default)]
pub struct Finding {
    /// Sorted.
    wanted: Vec<Prefix>,
    /// By their ids.
    found: Vec<Held>,
}

/// A pack that has some of the wanted hooks.
struct Candidate {
    pack: Listed,
    /// Which of them, by their numbers.
    hits: Vec<u32>,
}

impl Finding {
    /// Has this page looked for. Only hooks count.
    pub fn want(&mut self, id: &[u8; 32]) {
        self.wanted.extend(hook(id));
    }

    /// Where a page is.
    pub fn place(&self, id: &[u8; 32]) -> Option<PagePlace> {
        let at = self.found.binary_search_by_key(id, |held| held.id);
        at.ok().map(|at| self.found[at].place)
    }
}

/// Looks where the pages are that `want` names, if there are runs. They are kept in this
/// directory. `beat` is called now and then.
///
/// # Errors
/// If the bucket did not answer, and those of `want` and `beat`. What is damaged finds nothing.
pub async fn find(
    remote: &Remote,
    dir: Option<&Path>,
    want: impl FnOnce(&mut Finding) -> Result<()>,
    mut beat: impl AsyncFnMut() -> Result<()>,
) -> Result<Finding> {
    let mut finding = Finding::default();
    let mut runs = Runs::list(remote, dir)?;
    if runs.is_empty() {
        return Ok(finding);
    }
    want(&mut finding)?;
    finding.wanted.sort_unstable();
    finding.wanted.dedup();
    if finding.wanted.is_empty() {
        return Ok(finding);
    }
    let mut candidates = Vec::new();
    while let Some(some) = runs.next()? {
        for run in some {
            candidates.extend(hits(&finding.wanted, &run));
            if candidates.len() > 2 * MOST_REMEMBERED {
                keep_best(&mut candidates, MOST_REMEMBERED);
            }
        }
        beat().await?;
    }
    let chosen = choose(candidates, finding.wanted.len());
    for some in chosen.chunks(AT_ONCE) {
        let lists: Vec<Result<Vec<Held>>> = thread::scope(|scope| {
            let threads = some.iter().map(|pack| scope.spawn(|| list(remote, *pack)));
            let threads: Vec<_> = threads.collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|held| held.unwrap_or_else(|_| Ok(Vec::new())))
                .collect()
        });
        for held in lists {
            finding.found.extend(held?);
        }
        beat().await?;
    }
    // Of several places that of the pack that has most.
    finding.found.sort_by_key(|held| held.id);
    finding.found.dedup_by_key(|held| held.id);
    Ok(finding)
}

/// What a pack's list says.
fn list(remote: &Remote, pack: Listed) -> Result<Vec<Held>> {
    let part = (u64::from(pack.at), pack.len as usize);
    let bytes = remote.bucket.get(&pack.name.pack_key(), Some(part));
    let bytes = usable(bytes.map_err(Error::from))?.flatten();
    let held = bytes.and_then(|bytes| decode_list(pack.name, &bytes));
    if held.is_none() {
        tracing::debug!(pack = %pack.name, "a pack that hooks name is not as they say");
    }
    Ok(held.unwrap_or_default())
}

fn keep_best(candidates: &mut Vec<Candidate>, most: usize) {
    candidates.sort_by_key(|one| std::cmp::Reverse(one.hits.len()));
    candidates.truncate(most);
}

/// The packs of a run that have most of the wanted hooks. Both are sorted.
fn hits(wanted: &[Prefix], run: &Run) -> Vec<Candidate> {
    let mut found: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut at = 0;
    for (prefix, pack) in &run.hooks {
        while wanted.get(at).is_some_and(|wanted| wanted < prefix) {
            at += 1;
        }
        if wanted.get(at) == Some(prefix) {
            let number = u32::try_from(at).expect("fewer hooks than pages");
            found.entry(*pack).or_default().push(number);
        }
    }
    let candidate = |(pack, hits): (u32, Vec<u32>)| Candidate {
        pack: run.packs[pack as usize],
        hits,
    };
    let mut candidates = found.into_iter().map(candidate).collect();
    keep_best(&mut candidates, MOST_OF_RUN);
    candidates
}

/// The packs to be read: each time the one that has most of the hooks that none before it
/// has, as long as that is worth the reading.
fn choose(mut candidates: Vec<Candidate>, wanted: usize) -> Vec<Listed> {
    let mut is_covered = vec![false; wanted];
    let mut chosen: Vec<Listed> = Vec::new();
    while chosen.len() < MOST_PACKS {
        let is_new = |hit: &u32| !is_covered[*hit as usize];
        for one in &mut candidates {
            one.hits.retain(is_new);
        }
        let worth = |one: &Candidate| {
            let pages = one.hits.len() as u64 * ONE_IN;
            pages * PAGE_BYTES > u64::from(one.pack.len)
        };
        candidates.retain(|one| !one.hits.is_empty() && worth(one));
        let best = candidates.iter().enumerate();
        let Some((at, _)) = best.max_by_key(|(_, one)| one.hits.len()) else {
            break;
        };
        let best = candidates.swap_remove(at);
        for hit in best.hits {
            is_covered[hit as usize] = true;
        }
        if !chosen.iter().any(|pack| pack.name == best.pack.name) {
            chosen.push(best.pack);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Name, Session};

    fn listed(number: u32, len: u32) -> Listed {
        let session = Session(1);
        Listed {
            name: Name { session, number },
            at: 0,
            len,
        }
    }

    fn run(packs: &[(u32, &[u8])]) -> Run {
        let mut run = Run::default();
        for (number, hooks) in packs {
            let hooks = hooks.iter().map(|hook| [*hook; 8]);
            run.add_hooks(listed(*number, 100), hooks);
        }
        Run::decode("k", &run.encode("k")).expect("it is one")
    }

    #[test]
    fn packs_that_add_most_are_chosen_first_and_none_that_adds_nothing() {
        let wanted: Vec<Prefix> = (0..10).map(|hook| [hook; 8]).collect();
        let run = run(&[
            (1, &[0, 1, 2]),
            (2, &[0, 1, 2, 3, 40]),
            (3, &[4, 41, 42, 43, 44, 45]),
            (4, &[50]),
        ]);
        let chosen = choose(hits(&wanted, &run), wanted.len());
        assert_eq!(chosen, [listed(2, 100), listed(3, 100)]);
        // A list that is longer than what it finds.
        let hits = vec![0];
        let pack = listed(5, 200_000);
        assert_eq!(choose(vec![Candidate { pack, hits }], 1), []);
    }

    #[test]
    fn of_many_packs_sixteen_are_read_and_few_are_remembered() {
        let wanted: Vec<Prefix> = (0..200).map(|hook| [hook; 8]).collect();
        let packs: Vec<(u32, [u8; 1])> = (0..200).map(|at| (at, [at as u8])).collect();
        let packs: Vec<(u32, &[u8])> = packs.iter().map(|(at, hook)| (*at, &hook[..])).collect();
        let candidates = hits(&wanted, &run(&packs));
        assert_eq!(candidates.len(), MOST_OF_RUN);
        assert_eq!(choose(candidates, wanted.len()).len(), MOST_PACKS);
    }
}
