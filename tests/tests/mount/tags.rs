//! Several snapshots in one mount, and several mounts of one store.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::ensure;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, names};

#[test]
fn tags_come_and_go() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("tags_come_and_go")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount(None, "mnt")?;
    assert!(names(&dir)?.is_empty());
    assert!(!dir.join("one").exists());
    fixture.commit("one", &noise(1, 8 * PAGE), &[])?;
    fixture.commit("two", &noise(2, 8 * PAGE), &[])?;
    assert_eq!(names(&dir)?, ["one", "two"]);
    ensure!(
        fs::read(dir.join("one/memory.bin"))? == noise(1, 8 * PAGE),
        "one"
    );
    fixture.cli.ok(&["rm", "one"])?;
    assert_eq!(names(&dir)?, ["two"]);
    assert!(!dir.join("one").exists());
    ensure!(
        fs::read(dir.join("two/memory.bin"))? == noise(2, 8 * PAGE),
        "two"
    );
    Ok(())
}

#[test]
fn a_moved_tag_shows_its_new_snapshot() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("a_moved_tag_shows_its_new_snapshot")? else {
        return Ok(());
    };
    fixture.commit("now", &noise(1, 8 * PAGE), &[])?;
    let (dir, _) = fixture.mount(None, "mnt")?;
    ensure!(
        fs::read(dir.join("now/memory.bin"))? == noise(1, 8 * PAGE),
        "before"
    );
    fixture.commit("now", &noise(2, 8 * PAGE), &["--replace"])?;
    ensure!(
        fs::read(dir.join("now/memory.bin"))? == noise(2, 8 * PAGE),
        "after"
    );
    Ok(())
}

#[test]
fn equal_files_are_one_inode() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("equal_files_are_one_inode")? else {
        return Ok(());
    };
    fixture.commit("one", &noise(1, 8 * PAGE), &[])?;
    fixture.commit("same", &noise(1, 8 * PAGE), &["--no-parent"])?;
    fixture.commit("other", &noise(2, 8 * PAGE), &[])?;
    let (dir, _) = fixture.mount(None, "mnt")?;
    let inode = |tag: &str| fs::metadata(dir.join(tag).join("memory.bin")).map(|m| m.ino());
    assert_eq!(inode("one")?, inode("same")?);
    assert_ne!(inode("one")?, inode("other")?);
    Ok(())
}

#[test]
fn one_store_can_be_mounted_twice() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("one_store_can_be_mounted_twice")? else {
        return Ok(());
    };
    fixture.commit("one", &noise(1, 8 * PAGE), &[])?;
    let (one, _) = fixture.mount(Some("one"), "mnt")?;
    let (all, _) = fixture.mount(None, "all")?;
    ensure!(
        fs::read(one.join("memory.bin"))? == noise(1, 8 * PAGE),
        "one"
    );
    fixture.umount(&one)?;
    ensure!(
        fs::read(all.join("one/memory.bin"))? == noise(1, 8 * PAGE),
        "all"
    );
    Ok(())
}

#[test]
fn what_is_mounted_stays_until_it_is_unmounted() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("what_is_mounted_stays_until_it_is_unmounted")? else {
        return Ok(());
    };
    fixture.commit("one", &noise(1, 300 * PAGE), &[])?;
    let (dir, pid) = fixture.mount(Some("one"), "mnt")?;
    fixture.cli.ok(&["rm", "one"])?;
    assert_eq!(fixture.cli.json(&["gc"])?["deleted_packs"], 0);
    ensure!(
        fs::read(dir.join("memory.bin"))? == noise(1, 300 * PAGE),
        "pinned"
    );
    fixture.umount(&dir)?;
    crate::lifecycle::wait_for_end(pid)?;
    assert_eq!(fixture.cli.json(&["gc"])?["deleted_packs"], 1);
    assert!(names(&fixture.path("store/packs"))?.is_empty());
    Ok(())
}

#[test]
fn a_damaged_tag_hides_itself_only() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("a_damaged_tag_hides_itself_only")? else {
        return Ok(());
    };
    fixture.commit("one", &noise(1, 8 * PAGE), &[])?;
    fixture.commit("two", &noise(2, 8 * PAGE), &[])?;
    let (dir, _) = fixture.mount(None, "mnt")?;
    fs::write(fixture.path("store/tags/two"), "damaged")?;
    assert_eq!(names(&dir)?, ["one"]);
    ensure!(
        fs::read(dir.join("one/memory.bin"))? == noise(1, 8 * PAGE),
        "one"
    );
    Ok(())
}
