//! Upgrades of them, in place.

use std::fs;

use anyhow::{Context as _, ensure};
use snapstore_store::{Error, Store, StoreFormat};

use crate::OF_FORMAT_1;
use crate::fixture::{Fixture, list};

#[test]
fn they_are_upgraded() -> anyhow::Result<()> {
    for name in OF_FORMAT_1.into_iter().chain(["store-v2/upgrading"]) {
        let fixture = Fixture::unpack(name)?;
        let ids = fixture.ids()?;
        let plan = fixture.cli.json(&["upgrade", "--dry-run"])?;
        ensure!(plan["nothing_to_do"] == false, "{name}: {plan}");
        let resumes = name == "store-v2/upgrading";
        let is_one = Store::open(fixture.cli.store())?.format() == StoreFormat::One;
        ensure!(is_one != resumes, "{name}");
        let report = fixture.cli.json(&["upgrade"])?;
        ensure!(report["packs"] == plan["packs"], "{name}: {report}");
        ensure!(report["resumed"] == resumes, "{name}: {report}");
        let store = Store::open(fixture.cli.store())?;
        ensure!(store.format() == StoreFormat::Two && !store.is_upgrading());
        for pack in list(&fixture.cli.store().join("packs"))? {
            let of_two = fs::read(&pack)?[8..12] == [2, 0, 0, 0];
            // What a commit has not finished is nobody's.
            ensure!(
                of_two || pack.extension().is_some_and(|it| it == "open"),
                "{pack:?}"
            );
        }
        ensure!(fixture.ids()? == ids, "{name}: ids have changed");
        fixture.holds_all().context(name)?;
        fixture.is_undamaged().context(name)?;
        let verified = fixture.cli.json(&["verify"])?;
        ensure!(verified["stale_index_entries"] == 0, "{name}: {verified}");
        let again = fixture.cli.json(&["upgrade"])?;
        ensure!(again["nothing_to_do"] == true, "{name}: {again}");
        fixture.can_be_committed_to().context(name)?;
        fixture.cli.ok(&["rm", "new"])?;
        for _ in 0..2 {
            fixture.cli.ok(&["gc"]).context(name)?;
        }
        fixture.holds_all().context(name)?;
        fs::remove_dir_all(fixture.cli.store().join("index"))?;
        fixture.cli.ok(&["repair"])?;
        fixture.holds_all().context(name)?;
        fixture.is_undamaged().context(name)?;
        fixture.is_refused_by_the_first_program(name)?;
    }
    Ok(())
}

/// What a repair would mend must not be lost by an upgrade.
#[test]
fn what_cannot_be_read_is_repaired_before_it_is_upgraded() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/delta-on-delta-collected")?;
    let refused = fixture.cli.fails(4, &["upgrade"])?;
    let plan = fixture.cli.fails(4, &["upgrade", "--dry-run"])?;
    ensure!(plan == refused, "{plan}");
    ensure!(Store::open(fixture.cli.store())?.format() == StoreFormat::One);
    fixture.cli.ok(&["repair"])?;
    fixture.cli.ok(&["upgrade", "--dry-run"])?;
    fixture.cli.ok(&["upgrade"])?;
    fixture.holds_all()?;
    fixture.is_undamaged()
}

/// Programs that know format 1 only would not understand what comes.
#[test]
fn an_upgrade_does_not_begin_beside_others() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/chain")?;
    let before = Store::open(fixture.cli.store())?;
    let (id, pin) = before.pin("base")?;
    let plan = fixture.cli.json(&["upgrade", "--dry-run"])?;
    ensure!(
        plan["in_the_way"]
            .as_array()
            .is_some_and(|it| it.len() == 1),
        "{plan}"
    );
    let refused = fixture.cli.fails(5, &["upgrade"])?;
    ensure!(refused.contains("mounts to be undone"), "{refused}");
    ensure!(Store::open(fixture.cli.store())?.format() == StoreFormat::One);
    drop(pin);
    fixture.cli.ok(&["upgrade"])?;
    // Who has opened it before is told to open it again.
    let late = before.pin("base");
    ensure!(matches!(late, Err(Error::Upgraded { .. })), "{late:?}");
    // Without a lease, too, where nothing can be found by the names it had.
    let late = before.manifest(id);
    ensure!(matches!(late, Err(Error::Upgraded { .. })), "{late:?}");
    fixture.holds_all()
}

/// What no repair finds stops it, and who is told how goes on.
#[test]
fn an_upgrade_that_damage_stops_goes_on_without_what_is_broken() -> anyhow::Result<()> {
    let fixture = Fixture::unpack("store-v1/chain")?;
    let tags: Vec<String> = fixture.ids()?.into_keys().collect();
    let packs = list(&fixture.cli.store().join("packs"))?;
    let first = packs.iter().min().context("a pack")?;
    let mut bytes = fs::read(first)?;
    // Of the first chunk, a page: nothing but reading all of it finds that.
    bytes[64] ^= 0xff;
    fs::write(first, bytes)?;
    fixture.cli.fails(4, &["upgrade"])?;
    fixture.cli.fails(4, &["repair"])?;
    let stopped = fixture.cli.fails(4, &["upgrade"])?;
    ensure!(stopped.contains("is missing from the store"), "{stopped}");
    ensure!(stopped.contains("snapstore rm"), "{stopped}");
    let found = fixture.cli.run(&["repair"])?;
    let found = String::from_utf8(found.stdout)? + &String::from_utf8(found.stderr)?;
    let broken = |tag: &&String| found.contains(&format!("snapshot {tag} lacks chunks"));
    let broken: Vec<&String> = tags.iter().filter(broken).collect();
    ensure!(!broken.is_empty(), "{found}");
    for tag in &broken {
        fixture.cli.ok(&["rm", tag])?;
    }
    fixture.cli.ok(&["upgrade"])?;
    ensure!(!Store::open(fixture.cli.store())?.is_upgrading());
    fixture.holds(|tag| !broken.iter().any(|it| *it == tag))?;
    fixture.is_undamaged()
}
