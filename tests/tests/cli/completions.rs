//! What a shell is offered, and the manual pages.

use std::fs;

use crate::{Fixture, PAGE};
use snapstore_tests::harness::noise;

/// What bash is offered for the last of these words.
fn offered(fixture: &Fixture, words: &[&str]) -> anyhow::Result<Vec<String>> {
    let output = fixture
        .cli
        .command(&[])?
        .arg("--")
        .args(words)
        .env("SNAPSTORE_DIR", fixture.cli.store())
        .env("SNAPSTORE_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string())
        .env("_CLAP_IFS", "\n")
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    assert!(output.status.success(), "{text}");
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

#[test]
fn tags_are_offered_where_a_tag_is_meant() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("web-1", &noise(1, PAGE), &[])?;
    fixture.commit("web-2", &noise(2, PAGE), &[])?;
    for words in [
        &["snapstore", "restore", "web"][..],
        &["snapstore", "diff", "web-1", "web"],
        &["snapstore", "rm", "web"],
        &["snapstore", "tag", "web"],
        &["snapstore", "warm", "web"],
        &["snapstore", "push", "web"],
        &["snapstore", "inspect", "web"],
        &["snapstore", "commit", "new", "--parent", "web"],
    ] {
        assert_eq!(offered(&fixture, words)?, ["web-1", "web-2"], "{words:?}");
    }
    let commands = offered(&fixture, &["snapstore", "rest"])?;
    assert_eq!(commands, ["restore"]);
    Ok(())
}

#[test]
fn each_shell_has_a_script_that_calls_the_program() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    for shell in ["bash", "zsh", "fish"] {
        let script = fixture.cli.ok(&["completions", shell])?;
        assert!(script.contains("SNAPSTORE_COMPLETE"), "{shell}: {script}");
    }
    fixture.cli.fails(2, &["completions", "dos"])?;
    Ok(())
}

#[test]
fn each_command_has_a_manual_page() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let dir = fixture.path("man1");
    fixture.cli.ok(&["generate", &dir])?;
    let help = fixture.cli.ok(&["--help"])?;
    let list = help.split("Commands:\n").nth(1).unwrap_or_default();
    let list = list.split("\n\n").next().unwrap_or_default();
    let mut pages = 0;
    for command in list
        .lines()
        .filter_map(|line| line.split_whitespace().next())
    {
        if command == "help" {
            continue;
        }
        let page = fs::read_to_string(format!("{dir}/snapstore-{command}.1"))?;
        assert!(page.contains(".SH SYNOPSIS"), "{command}: {page}");
        pages += 1;
    }
    assert!(pages > 20, "{pages}");
    Ok(())
}
