//! What the server of a mount has of whoever called `mount`: nothing.

use anyhow::Context as _;
use snapstore_tests::harness::noise;
use snapstore_tests::inherited::{has_nothing_of_its_caller, run_from_a_bad_caller};

use crate::{Fixture, PAGE};

#[test]
fn a_server_has_nothing_of_its_caller() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("a_server_has_nothing_of_its_caller")? else {
        return Ok(());
    };
    fixture.commit("base", &noise(1, 8 * PAGE), &[])?;
    let dir = fixture.mountpoint("mnt")?.display().to_string();
    let file = fixture.path("callers-file");
    let mut command = fixture.cli.command(&["mount", "base", &dir, "--json"])?;
    let answer = run_from_a_bad_caller(&mut command, &file)?;
    let answer: serde_json::Value = serde_json::from_slice(&answer)?;
    let pid = answer["server_pid"].as_u64().context("no server_pid")?;
    has_nothing_of_its_caller(u32::try_from(pid)?, &file)
}
