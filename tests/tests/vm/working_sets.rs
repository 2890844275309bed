//! What a machine's guest touches first is recorded, and pushed to the next one, alone or
//! beside machines of other heads.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapstore_guests::{TABLE, TOUCH, TouchCommand, page_sum};
use snapstore_store::{Seen, Store, WorkingSet};
use snapstore_tests::harness::skipped;
use snapstore_tests::vm::{Lab, eventually};

use crate::common_memory::{holds, id};

/// Pages that the guest has written before the first commit.
const FIRST: u32 = 1024;
const COUNT: u32 = 2048;
/// Those of them that it has written again before the second: what differs.
const OWN: u32 = 2000;
const OWN_COUNT: u32 = 400;
/// Pages between two that differ that are mapped along with them, and what the kernel
/// reads around.
const NEAR: u32 = 4;

/// Commits a guest that has written these pages.
fn commit(lab: &Lab, tag: &str, count: u32, first: u32, value: u32) -> Result<()> {
    let write = TouchCommand::Write {
        count,
        first,
        value,
    };
    lab.type_in("guest", &write.encode())?;
    lab.wait_for_text("guest", &format!("w{count}\n"))?;
    lab.commit(tag, "guest").map(drop)
}

/// A lab with the heads `old` and `new` of a chain.
fn two_heads(test: &str) -> Result<Option<Lab>> {
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(None);
    };
    lab.run("guest", TOUCH, &["--mem", "32M"])?;
    commit(&lab, "old", COUNT, FIRST, 0)?;
    commit(&lab, "new", OWN_COUNT, OWN, 7)?;
    lab.stop("guest")?;
    Ok(Some(lab))
}

/// Has a guest read pages that were written with this value.
fn reads(lab: &Lab, name: &str, first: u32, count: u32, value: u32) -> Result<()> {
    let read = TouchCommand::Read { count, first };
    lab.type_in(name, &read.encode())?;
    let answer = format!("r{:08x}\n", page_sum(count, first, value));
    lab.wait_for_text(name, &answer).map(drop)
}

fn set(lab: &Lab, tag: &str) -> Result<Option<WorkingSet>> {
    let store = Store::open(lab.cli.store())?;
    Ok(store.working_set(store.resolve(tag)?, "memory")?)
}

/// Where the set is kept.
fn path(lab: &Lab, tag: &str) -> Result<PathBuf> {
    let name = format!("working-sets/{}.memory", id(lab, tag)?);
    Ok(lab.cli.store().join(name))
}

/// Waits until a set is as it should be, once its mount has ended.
fn recorded(lab: &Lab, tag: &str, is_so: impl Fn(&WorkingSet) -> bool) -> Result<WorkingSet> {
    eventually("it is recorded", || {
        let dir = mount_of(lab, tag)?;
        let is_over = !lab.mounts()?.contains(&dir) && !dir.exists();
        Ok(set(lab, tag)
            .ok()
            .flatten()
            .filter(|set| is_over && is_so(set)))
    })
    .with_context(|| {
        format!(
            "{tag}: {:?}",
            set(lab, tag).map(|set| set.map(|set| set.last()))
        )
    })
}

fn pages(set: &WorkingSet) -> BTreeSet<u32> {
    set.pages().collect()
}

/// The mount that was made for a snapshot's machines.
fn mount_of(lab: &Lab, tag: &str) -> Result<PathBuf> {
    Ok(lab.runtime().join("mounts").join(id(lab, tag)?))
}

/// What a mount of machines has pushed and left out of the memory.
fn pushed(lab: &Lab, tag: &str) -> Result<(u64, u64)> {
    let dir = mount_of(lab, tag)?.display().to_string();
    let page = lab.cli.json(&["metrics"])?;
    let families = page["metrics"].as_array().into_iter().flatten();
    let samples: Vec<&Value> = families
        .flat_map(|family| family["samples"].as_array().into_iter().flatten())
        .filter(|sample| sample["labels"]["mount"] == *dir)
        .collect();
    let number = |name: &str| {
        let name = format!("snapstore_mount_prefetch_{name}_pages_total");
        let sample = samples.iter().find(|sample| sample["name"] == *name);
        let number = sample.and_then(|sample| sample["value"].as_f64());
        number.map(|number| number as u64).context(name)
    };
    Ok((number("pushed")?, number("sampled")?))
}

/// Pages that a machine may have read before they are pushed: it begins with some.
const FEW: u64 = 8;
/// Looks at a number that does not change, until it is believed: who pushes has the lowest
/// priority.
const LOOKS: u32 = 20;

/// Waits until all of so many pages are pushed, but for those that are left out.
fn all_pushed(lab: &Lab, tag: &str, count: usize) -> Result<u64> {
    let count = count as u64;
    let (mut last, mut still) = ((0, 0), 0);
    let done = eventually("the set is pushed", || {
        let now = pushed(lab, tag)?;
        still = if now == last { still + 1 } else { 0 };
        last = now;
        let is_all = now.0 + now.1 + FEW >= count && now.0 > 0;
        Ok((is_all && still > LOOKS).then_some(()))
    });
    done.with_context(|| format!("{last:?} of {count}"))?;
    ensure!(last.0 + last.1 <= count, "{last:?} of {count}");
    Ok(last.0)
}

#[test]
fn what_a_guest_touches_is_pushed_to_the_next_one() -> Result<()> {
    let test = "what_a_guest_touches_is_pushed_to_the_next_one";
    let Some(lab) = two_heads(test)? else {
        return Ok(());
    };
    let restore = |name: &str, more: &[&str]| -> Result<()> {
        let paused = ["--name", name, "--paused"];
        lab.restore("old", &[&paused[..], more].concat()).map(drop)
    };
    let goes_on = |name: &str| -> Result<()> {
        lab.cli.ok(&["resume", name])?;
        reads(&lab, name, FIRST, COUNT, 0)?;
        lab.stop(name)
    };
    restore("one", &[])?;
    goes_on("one")?;
    let first = recorded(&lab, "old", |_| true)?;
    let of_first = pages(&first);
    let touched: BTreeSet<u32> = (FIRST..FIRST + COUNT).collect();
    let known = touched.intersection(&of_first).count();
    ensure!(4 * known >= 3 * touched.len(), "{known} are known");
    let shown = lab.cli.json(&["show", "old"])?["working_sets"][0].clone();
    ensure!(
        shown["image"] == "memory" && shown["recordings"] == 1,
        "{shown}"
    );
    ensure!(shown["pages"] == of_first.len(), "{shown}");

    restore("two", &[])?;
    let given = all_pushed(&lab, "old", of_first.len())?;
    goes_on("two")?;
    let second = recorded(&lab, "old", |set| set.recordings() == 2)?;
    ensure!(
        u64::from(second.last().pushed) >= given,
        "{:?}",
        second.last()
    );
    ensure!(second.last().hit_rate() > Some(0.7), "{:?}", second.last());
    ensure!(
        known <= touched.intersection(&pages(&second)).count(),
        "some are forgotten"
    );

    restore("not", &["--no-prefetch"])?;
    goes_on("not")?;
    let third = recorded(&lab, "old", |set| set.recordings() == 3)?;
    ensure!(third.last().pushed == 0, "{:?}", third.last());

    restore("last", &[])?;
    all_pushed(&lab, "old", third.pages().count())?;
    if rustix::process::geteuid().is_root() {
        holds(&lab, "last", "old")?;
    } else {
        skipped(test, "only root reads the memory of a machine's process");
    }
    lab.finish()
}

#[test]
fn a_recording_that_is_of_no_use_does_not_matter() -> Result<()> {
    let Some(lab) = two_heads("a_recording_that_is_of_no_use_does_not_matter")? else {
        return Ok(());
    };
    lab.run("table", TABLE, &[])?;
    lab.wait_for_steps("table", 2)?;
    lab.commit("table", "table")?;
    lab.stop("table")?;
    lab.restore("table", &["--name", "table"])?;
    lab.wait_for_steps("table", 2)?;
    lab.stop("table")?;
    recorded(&lab, "table", |_| true)?;
    lab.restore("old", &["--name", "guest"])?;
    reads(&lab, "guest", FIRST, COUNT, 0)?;
    lab.stop("guest")?;
    recorded(&lab, "old", |_| true)?;
    let path_of_old = path(&lab, "old")?;
    let good = fs::read(&path_of_old)?;
    let mut damaged = good.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let cases = [
        ("damaged", Some(damaged)),
        ("cut", Some(good[..middle].to_vec())),
        ("another's", Some(fs::read(path(&lab, "table")?)?)),
        ("lost", None),
    ];
    for (name, bytes) in cases {
        match bytes {
            Some(bytes) => fs::write(&path_of_old, bytes)?,
            None => fs::remove_file(&path_of_old)?,
        }
        lab.restore("old", &["--name", "guest"])?;
        reads(&lab, "guest", FIRST, COUNT, 0).context(name)?;
        ensure!(
            pushed(&lab, "old")? == (0, 0),
            "{name}: something is pushed"
        );
        lab.stop("guest")?;
        // The next recording takes its place.
        let set = recorded(&lab, "old", |_| true).context(name)?;
        ensure!(set.recordings() == 1, "{name}");
    }
    // One that is whole and senseless.
    let store = Store::open(lab.cli.store())?;
    let seen = Seen {
        touched: vec![3, 1 << 20, u32::MAX, FIRST],
        ..Seen::default()
    };
    let senseless = WorkingSet::merged(None, &seen, std::time::SystemTime::now());
    store.keep_working_set(store.resolve("old")?, "memory", &senseless)?;
    lab.restore("old", &["--name", "guest"])?;
    reads(&lab, "guest", FIRST, COUNT, 0)?;
    let (pushed, left_out) = pushed(&lab, "old")?;
    ensure!(pushed + left_out <= 2, "{pushed} and {left_out}");
    lab.stop("guest")?;
    lab.finish()
}

/// The pages that a head has of its own beside the other, and those near them.
fn own_pages(lab: &Lab) -> Result<BTreeSet<u32>> {
    let (old, new) = (
        lab.stored_all("old", "memory")?,
        lab.stored_all("new", "memory")?,
    );
    let both = old.chunks(4096).zip(new.chunks(4096));
    let differ = both.zip(0_u32..).filter(|((a, b), _)| a != b);
    let near = differ.flat_map(|(_, page)| page.saturating_sub(NEAR)..=page + NEAR);
    Ok(near.collect())
}

#[test]
fn a_head_beside_others_has_its_own_part_pushed() -> Result<()> {
    let Some(lab) = two_heads("a_head_beside_others_has_its_own_part_pushed")? else {
        return Ok(());
    };
    let own = own_pages(&lab)?;
    let others = |set: &WorkingSet| -> BTreeSet<u32> { &pages(set) - &own };
    lab.restore("old", &["--name", "old"])?;
    reads(&lab, "old", FIRST, COUNT, 0)?;
    lab.stop("old")?;
    let common = recorded(&lab, "old", |_| true)?;
    lab.restore("old", &["--name", "old"])?;
    let pushed_once = all_pushed(&lab, "old", common.pages().count())?;
    let beside = |more: &[&str]| -> Result<()> {
        let paused = ["--name", "new", "--paused"];
        lab.restore("new", &[&paused[..], more].concat()).map(drop)
    };
    let goes_on = || -> Result<()> {
        lab.cli.ok(&["resume", "new"])?;
        reads(&lab, "new", OWN, OWN_COUNT, 7)?;
        reads(&lab, "new", FIRST, OWN - FIRST, 0)?;
        lab.stop("new")
    };
    beside(&[])?;
    goes_on()?;
    let part = recorded(&lab, "new", |_| true)?;
    let of_part = pages(&part);
    let count = (OWN..OWN + OWN_COUNT)
        .filter(|page| of_part.contains(page))
        .count();
    ensure!(4 * count >= 3 * OWN_COUNT as usize, "{count} are known");
    ensure!(others(&part).is_empty(), "{:?}", others(&part));
    ensure!(part.recordings() == 0, "none of the whole");

    // What they have in common is pushed by the mount that was there, and once.
    beside(&[])?;
    all_pushed(&lab, "new", of_part.len())?;
    ensure!(pushed(&lab, "old")?.0 == pushed_once);
    goes_on()?;
    let after = recorded(&lab, "new", |set| set.recorded() > part.recorded())?;
    ensure!(pages(&after).is_superset(&of_part), "some are forgotten");
    ensure!(
        after.last().hit_rate().is_none_or(|rate| rate > 0.5),
        "{:?}",
        after.last()
    );
    beside(&["--no-prefetch"])?;
    goes_on()?;
    let third = recorded(&lab, "new", |set| set.recorded() > after.recorded())?;
    ensure!(third.last().pushed == 0, "{:?}", third.last());
    lab.stop("old")?;
    recorded(&lab, "old", |_| true)?;

    // Alone it has what is known of the part pushed, and all of it recorded.
    let known = third.pages().count();
    lab.restore("new", &["--name", "new", "--paused"])?;
    all_pushed(&lab, "new", known)?;
    goes_on()?;
    let whole = recorded(&lab, "new", |set| set.recordings() == 1)?;
    ensure!(pages(&whole).is_superset(&of_part), "some are forgotten");
    let of_others = others(&whole);
    ensure!(
        of_others.len() as u32 > (OWN - FIRST) / 2,
        "{} others",
        of_others.len()
    );

    // Beside others again: what they have for it is neither pushed nor forgotten.
    lab.restore("old", &["--name", "old"])?;
    lab.restore("new", &["--name", "new", "--paused"])?;
    all_pushed(&lab, "new", pages(&whole).intersection(&own).count())?;
    goes_on()?;
    let again = recorded(&lab, "new", |set| set.recorded() > whole.recorded())?;
    ensure!(
        others(&again) == of_others,
        "of the others nothing was seen"
    );
    ensure!((again.recordings(), again.last()) == (1, whole.last()));
    lab.finish()
}
