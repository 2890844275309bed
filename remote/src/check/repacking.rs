//! Repacks beside all else: nothing is lost, no tag names what it did not name before, and in
//! the end no pack is left of which only a part is needed.

use std::env;

use super::actors::{ANYTHING, Act, add};
use super::explore::{Drawn, Every};
use super::oracle::{contents_of, listing};
use super::tests::{ends, epilogue, number, push, replace, set_up};
use super::world::World;
use crate::protocol::{HeadSummary, Name, Part, Roots, Rule};

/// What only a repack rests on.
pub const OF_REPACKS: [Rule; 4] = [
    Rule::RepackKeepsNumber,
    Rule::RepackOfWhatCounts,
    Rule::LeaseOutlivesRecords,
    Rule::CutOffRepackIsFinished,
];

/// Packs that are needed in parts, by one tag or by two.
fn before(chooser: &mut Drawn) -> Vec<Act> {
    let all = [
        vec![
            push("a", 7, None),
            push("b", 3, Some("a")),
            Act::Remove("a"),
        ],
        vec![
            push("a", 7, None),
            push("b", 3, Some("a")),
            replace("a", 0b1001, Some("a")),
        ],
        vec![
            push("b", 7, None),
            push("a", 0b1011, Some("b")),
            replace("b", 0b1010, Some("a")),
        ],
        vec![push("a", 7, None), replace("a", 3, Some("a"))],
        vec![],
    ];
    let at = chooser.rng.usize(..all.len());
    all[at].clone()
}

fn drawn_act(chooser: &mut Drawn) -> Act {
    let rng = &mut chooser.rng;
    let tag = ["a", "b"][rng.usize(..2)];
    let like = [None, Some("a"), Some("b"), Some(ANYTHING)][rng.usize(..4)];
    let contents = rng.u8(1..16);
    match rng.u32(..12) {
        0..2 => push(tag, contents, like),
        2..4 => replace(tag, contents, like),
        4 | 5 => Act::Remove(tag),
        6 => Act::View(tag),
        7 => Act::Rewrite(tag),
        8 | 9 => Act::Repack,
        _ => Act::Collect,
    }
}

fn history(seed: u64, without: Option<Rule>, traced: bool) -> Result<(), (String, Vec<String>)> {
    let mut chooser = Drawn::new(seed);
    let faults = chooser.rng.u32(..4);
    let mut world = World::new(without, faults, seed << 20);
    world.traced = traced;
    let result = drawn(&mut world, &mut chooser, without);
    result.map_err(|lost| (lost, std::mem::take(&mut world.trace)))
}

fn drawn(world: &mut World, chooser: &mut Drawn, without: Option<Rule>) -> Result<(), String> {
    set_up(world, before(chooser))?;
    add(world, "repacker", vec![Act::Repack, Act::Collect]);
    for host in 0..chooser.rng.usize(1..4) {
        let count = chooser.rng.usize(1..4);
        let acts: Vec<Act> = (0..count).map(|_| drawn_act(chooser)).collect();
        add(world, &format!("host {host} {acts:?}"), acts);
    }
    // Where nothing is lost, but something is left.
    let looks_at_end = without.is_none_or(|rule| rule == Rule::CutOffRepackIsFinished);
    ends(world, chooser, looks_at_end)?;
    match looks_at_end {
        true => all_is_repacked(world, chooser),
        false => Ok(()),
    }
}

/// Two repacks in peace: then no pack is left that is needed in parts, but for those of pushes
/// that were cut off.
fn all_is_repacked(world: &mut World, chooser: &mut Drawn) -> Result<(), String> {
    let acts = vec![Act::Repack, Act::Collect, Act::Repack, Act::Collect];
    add(world, "repacker at the end", acts);
    world.run(chooser)?;
    let listing = listing(&world.objects);
    let roots = Roots::of(&world.bucket(), &listing);
    let packs_of = |head: Name| {
        let key = head.head_key();
        let bytes = world.objects.get(&key);
        let decoded = bytes.and_then(|bytes| Some(HeadSummary::decode(&key, bytes).ok()?.0.packs));
        decoded.unwrap_or_default()
    };
    let is_fixed = |pack: Name| {
        let mut fixed = roots.fixed.iter();
        fixed.any(|record| packs_of(record.head).contains(&pack))
    };
    if !roots.cut_off.is_empty() {
        return Err(format!("a repack is left: {:?}", roots.cut_off));
    }
    for (key, held) in &world.objects {
        let Some(Part::Pack(pack)) = Part::parse(key) else {
            continue;
        };
        let needed = roots
            .movable
            .iter()
            .filter(|record| packs_of(record.head).contains(&pack));
        let needed = needed.filter_map(|record| contents_of(&world.objects, record.head).ok());
        let needed = needed.fold(0, |all, one| all | one);
        if held[0] & !needed != 0 && !is_fixed(pack) {
            return Err(format!(
                "{key} has {:04b}, and {needed:04b} is needed",
                held[0]
            ));
        }
    }
    epilogue(world, chooser)
}

#[test]
fn drawn_repacks_lose_nothing_and_leave_nothing() {
    let first = number("CHECK_SEED", 1);
    for seed in first..first + number("CHECK_HISTORIES", 4000) {
        if let Err((lost, _)) = history(seed, None, false) {
            let (_, trace) = history(seed, None, true).expect_err("it is the same history");
            panic!("seed {seed}: {lost}\n{}", trace.join("\n"));
        }
    }
}

/// A pack of two tags is repacked, and somebody else changes one of them.
#[test]
fn small_scenes_with_a_repack_in_every_order() -> Result<(), String> {
    let shared = vec![
        push("a", 7, None),
        push("b", 3, Some("a")),
        replace("a", 5, None),
    ];
    let alone = vec![
        push("a", 7, None),
        push("b", 3, Some("a")),
        Act::Remove("a"),
    ];
    let scenes = [
        (alone.clone(), vec![Act::Remove("b")]),
        (alone.clone(), vec![replace("b", 8, None)]),
        (alone.clone(), vec![Act::View("b")]),
        (alone, vec![Act::Repack, Act::Collect]),
        (shared, vec![push("c", 3, Some("b"))]),
    ];
    for (scene, (before, other)) in scenes.into_iter().enumerate() {
        let mut every = Every::to_depth(200);
        loop {
            let mut world = World::new(None, 0, 0);
            set_up(&mut world, before.clone())?;
            add(&mut world, "repacker", vec![Act::Repack, Act::Collect]);
            add(&mut world, "other", other.clone());
            let ran = world.run(&mut every);
            ran.map_err(|lost| format!("scene {scene}, history {}: {lost}", every.histories))?;
            // Later orders have somebody wait for long: 1000 take minutes.
            if !every.next() || every.histories >= number("CHECK_ORDERS", 800) {
                break;
            }
        }
        let (histories, states) = (every.histories, every.states());
        println!("scene {scene}: {histories} histories, {states} states");
    }
    Ok(())
}

/// Takes each rule of repacks away: what is lost then, or left, is found.
#[test]
fn each_rule_of_repacks_that_is_taken_away_is_missed() {
    let most = number("CHECK_RULES", 15_000);
    let only = env::var("CHECK_RULE").ok();
    let wanted = |rule: &Rule| match &only {
        Some(only) => *only == format!("{rule:?}"),
        None => OF_REPACKS.contains(rule),
    };
    let mut missed = Vec::new();
    for rule in Rule::ALL.into_iter().filter(wanted) {
        let lost = |seed| Some(history(seed, Some(rule), false).err()?.0);
        match (1..=most).find_map(|seed| Some((seed, lost(seed)?))) {
            Some((seed, lost)) => println!("without {rule:?}: seed {seed}: {lost}"),
            None => missed.push(rule),
        }
    }
    assert!(
        missed.is_empty(),
        "taken away, and nothing was lost: {missed:?}"
    );
}
