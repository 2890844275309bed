//! What is said on standard error, as JSON.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// Every line of what a command says; each has to be an object of this shape.
fn events(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
    let output = fixture.cli.run(arguments)?;
    let said = String::from_utf8(output.stderr)?;
    let lines = said.lines().map(|line| {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["timestamp"].is_string(), "{line}");
        ensure!(event["level"].is_string(), "{line}");
        ensure!(event["fields"].is_object(), "{line}");
        Ok(event)
    });
    lines.collect()
}

#[test]
fn each_line_parses() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let verbose = ["--log-format", "json", "-vv"];
    let memory = fixture.file("memory", &noise(1, 8 * PAGE))?;
    let commit = ["commit", "one", "--memory", &memory];
    let said = events(&fixture, &[&verbose[..], &commit].concat())?;
    ensure!(!said.is_empty(), "nothing was logged, so nothing was tried");

    // What a command says to its user, too, of however many lines.
    let odd = ["rm", "--log-format=json", "no-such"];
    let said = events(&fixture, &odd)?;
    let [error] = &said[..] else {
        anyhow::bail!("{said:?}");
    };
    ensure!(error["level"] == "ERROR", "{error}");
    let message = error["fields"]["message"].as_str().context("a text")?;
    ensure!(
        message.contains("no-such") && !message.starts_with("error"),
        "{message}"
    );
    Ok(())
}

#[test]
fn the_environment_is_overruled_by_the_option() -> anyhow::Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.cli = fixture.cli.clone().with_env("SNAPSTORE_LOG_FORMAT", "json");
    ensure!(events(&fixture, &["rm", "no-such"])?.len() == 1);
    let said = fixture
        .cli
        .fails(3, &["--log-format", "text", "rm", "no-such"])?;
    ensure!(said.starts_with("error: "), "{said}");
    let said = fixture.cli.fails(2, &["--log-format", "yaml", "tags"])?;
    ensure!(said.contains("text, json"), "{said}");
    Ok(())
}

/// What takes long tells its stages to who asks for more.
#[test]
fn a_collection_tells_of_its_stages() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("one", &noise(1, 4 * PAGE), &[])?;
    fixture.commit("two", &noise(2, 4 * PAGE), &[])?;
    fixture.cli.ok(&["rm", "one"])?;
    let output = fixture.cli.run(&["gc", "-vv"])?;
    let said = String::from_utf8(output.stderr)?;
    for stage in ["marked", "planned", "condemned", "deleted", "collected"] {
        anyhow::ensure!(said.contains(stage), "{stage} is not in {said}");
    }
    let quiet = fixture.cli.run(&["gc"])?;
    anyhow::ensure!(quiet.stderr.is_empty(), "{quiet:?}");
    Ok(())
}
