//! `snapstore doctor` beside mounts and stores: it says what is wrong, and clears away only
//! what has no server any more.

use std::fs;

use crate::lifecycle::kill;
use crate::{Fixture, PAGE};
use snapstore_tests::harness::noise;

fn level(answer: &serde_json::Value, name: &str) -> Option<String> {
    let checks = answer["checks"].as_array()?;
    let check = checks.iter().find(|check| check["name"] == name)?;
    Some(check["level"].as_str()?.to_owned())
}

/// What it found about the mount at `dir`, if anything.
fn told(answer: &serde_json::Value, dir: &std::path::Path) -> bool {
    answer["checks"]
        .to_string()
        .contains(&dir.display().to_string())
}

#[test]
fn doctor_finds_and_clears_a_mount_without_a_server() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("doctor_finds_and_clears_a_mount_without_a_server")?
    else {
        return Ok(());
    };
    fixture.commit("base", &noise(1, 4 * PAGE), &[])?;
    let (dead, server) = fixture.mount(Some("base"), "dead")?;
    let (alive, _) = fixture.mount(Some("base"), "alive")?;
    let answer = fixture.cli.json(&["doctor"])?;
    assert_eq!(level(&answer, "store").as_deref(), Some("ok"), "{answer}");
    assert!(!told(&answer, &dead), "{answer}");
    kill(server)?;
    let answer = fixture.cli.json(&["doctor"])?;
    assert!(told(&answer, &dead) && !told(&answer, &alive), "{answer}");
    assert_eq!(level(&answer, "mounts").as_deref(), Some("warning"));
    let answer = fixture.cli.json(&["doctor", "--fix"])?;
    assert!(answer["fixed"].to_string().contains("dead"), "{answer}");
    assert!(fs::read_dir(&dead)?.next().is_none(), "still mounted");
    assert!(fs::read_dir(&alive)?.next().is_some(), "no more mounted");
    Ok(())
}

#[test]
fn doctor_ends_with_1_for_a_store_that_cannot_be_opened() -> anyhow::Result<()> {
    let Some(fixture) = Fixture::new("doctor_ends_with_1_for_a_store_that_cannot_be_opened")?
    else {
        return Ok(());
    };
    for name in ["config", "config-copy"] {
        fs::write(fixture.cli.store().join(name), "not a configuration")?;
    }
    let output = fixture.cli.run(&["doctor", "--json"])?;
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(output.status.code(), Some(1), "{answer}");
    assert_eq!(
        level(&answer, "store").as_deref(),
        Some("error"),
        "{answer}"
    );
    Ok(())
}
