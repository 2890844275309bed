//! What the server of a mount logs as JSON.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// Damages what is mounted, has it read, and looks at what the server says of that.
fn damage_is_logged(fixture: &mut Fixture, option: &[&str]) -> anyhow::Result<()> {
    const PAGES: usize = 64;
    fixture.commit("base", &noise(1, PAGES * PAGE), &[])?;
    let dir = fixture.mountpoint("mnt")?;
    let shown = dir.display().to_string();
    let mount = [&["mount", "base", &shown, "--no-prefetch"], option].concat();
    fixture.cli.ok(&mount)?;
    for entry in fs::read_dir(fixture.cli.store().join("packs"))? {
        let file = OpenOptions::new().write(true).open(entry?.path())?;
        for at in (PAGE..PAGES * PAGE / 2).step_by(PAGE / 2) {
            file.write_all_at(&[0x55; 64], at as u64)?;
        }
    }
    // Each page that is damaged is another message.
    let file = fs::File::open(dir.join("memory.bin"))?;
    let mut page = vec![0; PAGE];
    for number in 0..PAGES {
        let _ = file.read_exact_at(&mut page, (number * PAGE) as u64);
    }
    drop(file);
    fixture.umount(&dir)?;
    let log = fs::read_to_string(fixture.cli.store().join("mounts.log"))?;
    let mut errors = 0;
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["timestamp"].is_string(), "{line}");
        ensure!(event["fields"]["message"].is_string(), "{line}");
        errors += u32::from(event["level"] == "ERROR");
    }
    ensure!(errors > 1, "{log}");
    Ok(())
}

#[test]
fn each_line_of_a_servers_json_parses() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("each_line_of_a_servers_json_parses")? else {
        return Ok(());
    };
    fixture.cli = fixture.cli.clone().with_env("RUST_LOG", "debug");
    damage_is_logged(&mut fixture, &["--log-format", "json"])
}

#[test]
fn the_environment_asks_for_json_too() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("the_environment_asks_for_json_too")? else {
        return Ok(());
    };
    fixture.cli = fixture.cli.clone().with_env("SNAPSTORE_LOG_FORMAT", "json");
    damage_is_logged(&mut fixture, &[])
}
