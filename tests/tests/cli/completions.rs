//! What a shell is offered, and the manual pages.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use snapstore_tests::harness::{noise, program, skipped};

use crate::{Fixture, PAGE};

/// What bash is offered for the last of these words.
fn offered(fixture: &Fixture, words: &[&str]) -> anyhow::Result<Vec<String>> {
    offered_beside(fixture, words, fixture.cli.store())
}

/// The same if the environment names that store.
fn offered_beside(fixture: &Fixture, words: &[&str], store: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new(program()?)
        .arg("--")
        .args(words)
        .current_dir(fixture.dir.path())
        .env("SNAPSTORE_DIR", store)
        .env("SNAPSTORE_RUNTIME_DIR", fixture.path("run"))
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
fn ids_are_offered_to_who_begins_to_type_one() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("web", &noise(1, PAGE), &[])?;
    let shown = fixture.cli.json(&["show", "web"])?;
    let id = shown["id"].as_str().context("no id")?;
    for command in ["show", "restore", "tag", "mount", "warm"] {
        let typed = |typed: &str| offered(&fixture, &["snapstore", command, typed]);
        assert_eq!(typed(&id[..2])?, [&id[..12]], "{command}");
        assert_eq!(typed(&id[..13])?, [id], "{command}");
        let all = typed("")?;
        assert!(all.contains(&"web".to_owned()), "{command}: {all:?}");
        assert!(!all.contains(&id[..12].to_owned()), "{command}: {all:?}");
    }
    // Only tags can be removed.
    assert_eq!(offered(&fixture, &["snapstore", "rm", &id[..2]])?, [""; 0]);
    Ok(())
}

#[test]
fn a_mount_is_offered_tags_and_directories() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("web", &noise(1, PAGE), &[])?;
    fs::create_dir(fixture.path("wet"))?;
    fixture.file("wefile", b"")?;
    let words = offered(&fixture, &["snapstore", "mount", "we"])?;
    assert_eq!(words, ["web", "wet/"]);
    let words = offered(&fixture, &["snapstore", "mount", "web", "wet"])?;
    assert_eq!(words, ["wet/"]);
    Ok(())
}

#[test]
fn remotes_and_words_of_options_are_offered_by_name() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let url = format!("file://{}", fixture.path("bucket"));
    fixture.cli.ok(&["remote", "add", "site", &url])?;
    for (words, says) in [
        (&["snapstore", "push", "web", "si"][..], "site"),
        (&["snapstore", "pull", "si"], "site/"),
        (&["snapstore", "remote", "gc", "si"], "site"),
        (&["snapstore", "remote", "tags", "si"], "site"),
        (&["snapstore", "mount", "si"], "site/"),
        (&["snapstore", "restore", "si"], "site/"),
        (&["snapstore", "restore", "x", "--with", "q"], "qemu"),
        (&["snapstore", "forget", "--group-by", "c"], "chain"),
    ] {
        assert_eq!(offered(&fixture, words)?, [says], "{words:?}");
    }
    Ok(())
}

#[test]
fn the_store_of_the_line_counts() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.commit("web", &noise(1, PAGE), &[])?;
    let (store, elsewhere) = (fixture.path("store"), fixture.path("nowhere"));
    let equals = format!("--store={store}");
    for words in [
        &["snapstore", "--store", &store, "show", "w"][..],
        &["snapstore", &equals, "show", "w"],
        &["snapstore", "show", "--store", &store, "w"],
    ] {
        let offered = offered_beside(&fixture, words, Path::new(&elsewhere))?;
        assert_eq!(offered, ["web"], "{words:?}");
    }
    assert_eq!(
        offered_beside(&fixture, &["snapstore", "show", "w"], Path::new(&elsewhere))?,
        [""; 0]
    );
    Ok(())
}

/// The script as bash runs it at a tab.
#[test]
fn bash_is_answered_through_its_script() -> anyhow::Result<()> {
    const TEST: &str = "bash_is_answered_through_its_script";
    let fixture = Fixture::new()?;
    fixture.commit("web-1", &noise(1, PAGE), &[])?;
    let script = fixture.file(
        "script",
        fixture.cli.ok(&["completions", "bash"])?.as_bytes(),
    )?;
    let dir = program()?
        .parent()
        .context("it is in a directory")?
        .display()
        .to_string();
    let path = format!("{dir}:{}", std::env::var("PATH").unwrap_or_default());
    let asks = format!(
        "source {script}; COMP_WORDS=(snapstore show we); COMP_CWORD=2; COMP_LINE='snapstore show we'; \
         COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; \
         words=($(complete -p snapstore)); for ((i = 0; i < ${{#words[@]}}; i++)); do \
         [ \"${{words[i]}}\" = -F ] && name=${{words[i + 1]}}; done; \
         $name snapstore we show; printf '%s\n' \"${{COMPREPLY[@]}}\""
    );
    let bash = Command::new("bash")
        .args(["--norc", "-c", &asks])
        .env("PATH", path)
        .env("SNAPSTORE_DIR", fixture.cli.store())
        .output();
    let Ok(output) = bash else {
        skipped(TEST, "there is no bash");
        return Ok(());
    };
    let text = String::from_utf8(output.stdout)?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.trim(), "web-1", "{error}");
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
