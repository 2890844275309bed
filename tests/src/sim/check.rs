//! The law: what was acknowledged is read back whole, and `verify` says the
//! same as the reader.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use snapstore_store::{Damage, Error, Finding, Silent, SnapshotId, Store};

use super::content::{self, Content};
use super::world::World;

/// Reads a snapshot whole, as a process would that has just begun.
///
/// # Errors
/// What the store says, or that the bytes are nobody's.
pub fn reads_as(store: &Store, id: SnapshotId) -> anyhow::Result<Content> {
    let manifest = store.manifest(id)?;
    content::read(store, &manifest, &mut || {})
}

/// Compares the store with the model. It is done between two steps, by somebody
/// whom nobody overtakes.
pub fn check(world: &World, after_power_cut: bool) {
    let (due, damaged) = {
        let mut shared = world.lock();
        // Nobody has changed anything since it was last looked at.
        if shared.changes == shared.checked_at && !after_power_cut {
            return;
        }
        shared.checked_at = shared.changes;
        shared.checks += 1;
        let due = after_power_cut || shared.checks.is_multiple_of(3) || shared.damaged;
        (due, shared.is_damaged())
    };
    snapstore_store::sim::unobserved(|| {
        compare(world, after_power_cut, damaged, due);
    });
}

/// The same, and `verify` too.
pub fn check_thoroughly(world: &World) {
    let damaged = world.lock().is_damaged();
    snapstore_store::sim::unobserved(|| compare(world, false, damaged, true));
}

fn compare(world: &World, after_power_cut: bool, damaged: bool, with_verify: bool) {
    let store = match Store::open(&world.root) {
        Ok(store) => store.with_lock_timeout(Duration::ZERO),
        Err(error) => return world.fail("the store does not open", error.to_string()),
    };
    let tags = match store.tags() {
        Ok(tags) => tags,
        Err(error) => return world.fail("tags cannot be read", error.to_string()),
    };
    let mut unreadable = BTreeSet::new();
    for (tag, id) in &tags {
        match reads_as(&store, *id) {
            Ok(content) => {
                let content = Arc::new(content);
                let mut shared = world.lock();
                shared.model.know(*id, content.clone());
                if !shared
                    .model
                    .see(tag, &Some(content.clone()), after_power_cut)
                {
                    let may_be = shared.model.values(tag);
                    drop(shared);
                    let what = format!("{tag} is {content:?}; it may be {may_be:?}");
                    return world.fail("a tag names what it should not", what);
                }
            }
            Err(error) if damaged => {
                let shared = world.lock();
                let firm = shared.firm.get(tag) == Some(id) && !shared.index_lost;
                drop(shared);
                if firm {
                    let what = format!("{tag}, committed after the damage: {error}");
                    return world.fail("an acknowledged snapshot is not whole", what);
                }
                unreadable.insert(tag.clone());
            }
            Err(error) => {
                let what = format!("{tag}: {error}");
                return world.fail("an acknowledged snapshot is not whole", what);
            }
        }
    }
    let known = world.lock().model.tags();
    for tag in known {
        let here = tags.contains_key(&tag);
        let may_be = here || world.lock().model.see(&tag, &None, after_power_cut);
        if !may_be {
            return world.fail("a tag is gone", tag);
        }
    }
    if !damaged {
        check_pins(world, &store);
    }
    check_sets(world, &store);
    if with_verify {
        check_verify(
            world,
            &store,
            &tags.into_keys().collect(),
            &unreadable,
            damaged,
        );
    }
}

fn check_pins(world: &World, store: &Store) {
    let held: Vec<_> = {
        let shared = world.lock();
        let pairs = shared.held.iter().map(|it| (it.id, it.content.clone()));
        pairs.collect()
    };
    for (id, content) in held {
        match reads_as(store, id) {
            Ok(found) if found == *content => {}
            Ok(found) => {
                let what = format!("{id} is {found:?} and not {content:?}");
                return world.fail("wrong bytes", what);
            }
            Err(error) => {
                let what = format!("{id}, which is pinned: {error}");
                return world.fail("a pinned snapshot is not whole", what);
            }
        }
    }
}

/// Working sets are what was recorded last, or nothing; nobody but who reads them is told of
/// what is torn.
fn check_sets(world: &World, store: &Store) {
    let known = world.lock().sets.known();
    for (id, image) in known {
        let found = store.working_set(id, &image);
        let seen = world.lock().sets.see(id, &image, &found);
        if let Err(what) = seen {
            return world.fail("a working set is not what was recorded", what);
        }
    }
}

/// How many files there are of working sets that are of no tag's snapshot.
///
/// # Errors
/// If the tags cannot be read.
pub fn stray_sets(world: &World) -> Result<usize, Error> {
    let store = Store::open(&world.root)?;
    let kept: BTreeSet<String> = (store.tags()?.into_values())
        .map(|id| id.to_string())
        .collect();
    let files = fs::read_dir(world.root.join("working-sets"));
    let names = files.into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_stray = |name: &String| !name.split('.').next().is_some_and(|id| kept.contains(id));
    Ok(names.filter(is_stray).count())
}

fn check_verify(
    world: &World,
    store: &Store,
    tags: &BTreeSet<String>,
    unreadable: &BTreeSet<String>,
    damaged: bool,
) {
    let report = match store.verify(true, &Silent) {
        Ok(report) => report,
        // Somebody collects.
        Err(Error::Busy { .. }) => return,
        Err(error) => return world.fail("verify fails", error.to_string()),
    };
    if !damaged {
        if !report.findings.is_empty() {
            world.fail("verify cries wolf", describe_findings(&report.findings));
        }
        return;
    }
    let named_by = |wanted: &dyn Fn(&Finding) -> bool| -> BTreeSet<String> {
        let findings = report.findings.iter().filter(|finding| wanted(finding));
        findings
            .flat_map(|finding| finding.snapshots.iter().cloned())
            .filter(|tag| tags.contains(tag))
            .collect()
    };
    let named = named_by(&|finding| !finding.read_all_the_same);
    // Who has parts in a pack with a damaged header, footer or seal may find them.
    let lost = named_by(&|finding| {
        !finding.read_all_the_same && !matches!(finding.damage, Damage::Pack { .. })
    });
    if let Some(tag) = unreadable.difference(&named).next() {
        let what = format!("{tag}; it says {}", describe_findings(&report.findings));
        return world.fail("verify does not name what is lost", what);
    }
    if let Some(tag) = lost.difference(unreadable).next() {
        let what = format!("{tag}; it says {}", describe_findings(&report.findings));
        world.fail("verify names what can be read", what);
    }
}

/// Findings in a line.
#[must_use]
pub fn describe_findings(findings: &[Finding]) -> String {
    let each = findings
        .iter()
        .map(|finding| format!("{} (needed by {:?})", finding.damage, finding.snapshots));
    each.collect::<Vec<_>>().join("; ")
}
