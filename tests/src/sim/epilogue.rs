//! The end of every history: what has gone halfway is mended, everything is looked
//! at, collected, and looked at again.

use std::sync::Arc;

use snapstore_store::sim::{observe, unobserved};
use snapstore_store::{
    Decision, Error, ErrorClass, GcOptions, GcReport, Silent, Store, StoreFormat,
};

use super::check::{check_thoroughly, stray_sets};
use super::world::{Actor, World};

/// Ends a history.
pub fn epilogue(world: &Arc<World>) {
    {
        let mut shared = world.lock();
        shared.repairs = 0;
        shared.cut = false;
        shared.full_until = 0;
    }
    observe(Some(Arc::new(Actor::new(world.clone(), 0))));
    let (to_repair, damaged) = {
        let shared = world.lock();
        (shared.half_repaired || shared.index_lost, shared.damaged)
    };
    if to_repair {
        repair(world);
    }
    check_thoroughly(world);
    if world.plan().full_in_the_end && !damaged && !has_failed(world) {
        if let Err(error) = on_a_full_disk(world) {
            world.fail("a full disk cannot be collected", error.to_string());
        }
        check_thoroughly(world);
    }
    if !has_failed(world) {
        upgrade(world);
        check_thoroughly(world);
    }
    for keep_percent in [50, 100] {
        if has_failed(world) {
            break;
        }
        match collect(world, keep_percent, false).and_then(|_| dead(world)) {
            Ok(0) => {}
            Ok(left) if !damaged => {
                world.fail("gc leaves what is dead", format!("{left} packs"));
            }
            Err(error) if !damaged => world.fail("gc fails", error.to_string()),
            _ => {}
        }
        check_thoroughly(world);
    }
    if !has_failed(world) && !damaged {
        match unobserved(|| stray_sets(world)) {
            Ok(0) => {}
            other => world.fail("gc leaves working sets", format!("{other:?}")),
        }
    }
    observe(None);
}

fn has_failed(world: &World) -> bool {
    world.lock().failure.is_some()
}

fn repair(world: &World) {
    match Store::repair(&world.root, &Silent) {
        Ok(_) => {
            let mut shared = world.lock();
            shared.half_repaired = false;
            shared.flipped = false;
            shared.index_lost = false;
        }
        Err(error) => world.fail("repair fails", error.to_string()),
    }
}

/// Whatever a store of format 1 has been through, it can be upgraded.
fn upgrade(world: &World) {
    let upgraded = Store::upgrade(&world.root, false, &Silent).map(|_| ());
    let finished = upgraded.and_then(|()| Store::open(&world.root));
    match finished {
        Ok(store) if store.format() == StoreFormat::Two && !store.is_upgrading() => {}
        Ok(_) => world.fail("upgrade fails", "it has not ended".to_owned()),
        Err(error) => {
            let damaged = world.lock().damaged;
            if !damaged || error.class() != ErrorClass::Damaged {
                world.fail("upgrade fails", error.to_string());
            }
        }
    }
}

fn collect(world: &World, keep_percent: u8, dry_run: bool) -> Result<GcReport, Error> {
    let options = GcOptions {
        keep_percent,
        dry_run,
    };
    Store::open(&world.root)?.gc(options, &Silent)
}

/// Packs of which nothing is needed.
fn dead(world: &World) -> Result<usize, Error> {
    let report = unobserved(|| collect(world, 50, true))?;
    let decisions = report.plan.packs.iter().map(|pack| pack.decision);
    Ok(decisions.filter(|it| *it == Decision::Delete).count())
}

/// Nothing can be written until a pack is deleted. Tags are removed all the same, and
/// what is dead then makes room.
fn on_a_full_disk(world: &World) -> Result<(), Error> {
    let store = Store::open(&world.root)?;
    let tags: Vec<String> = unobserved(|| store.tags())?.into_keys().collect();
    world.lock().full_until = u64::MAX;
    let most = tags.len().div_ceil(2);
    store.remove_tags(&tags[..most])?;
    {
        let mut shared = world.lock();
        for tag in &tags[..most] {
            shared.sets.change_tag(tag);
            let change = shared.model.begin(u32::MAX, tag, vec![None]);
            shared.model.end(change, Some(vec![None]));
        }
    }
    let before = dead(world)?;
    let collected = store.gc(GcOptions::default(), &Silent);
    let is_full = world.lock().full_until == u64::MAX;
    match collected {
        Ok(_) if before == 0 || !is_full => {}
        Ok(_) => world.fail(
            "a full disk cannot be collected",
            format!("{before} dead packs stay"),
        ),
        Err(error) if before > 0 => return Err(error),
        Err(_) => {}
    }
    world.lock().full_until = 0;
    store.gc(GcOptions::default(), &Silent)?;
    let after = dead(world)?;
    if after > 0 {
        let what = format!("{after} of {before} dead packs stay when there is room");
        world.fail("a full disk cannot be collected", what);
    }
    Ok(())
}
