//! What the documents say of each other, and of the program, is so.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::program;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every document: those of the root, of `docs` and of the directories below it.
fn documents() -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![root().join("docs")];
    for entry in fs::read_dir(root())? {
        found.push(entry?.path());
    }
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found.sort();
    ensure!(
        found.len() > 10,
        "the documents are not where they should be"
    );
    Ok(found)
}

/// What comes between `before` and `after`, everywhere in a text.
fn between<'a>(text: &'a str, before: &str, after: char) -> Vec<&'a str> {
    let parts = text.split(before).skip(1);
    parts
        .filter_map(|part| Some(part.split_once(after)?.0))
        .collect()
}

/// The names of a document's headings, as links give them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    let name = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(name).collect()
}

/// The links of a document that lead nowhere.
fn broken_links(document: &Path, text: &str) -> anyhow::Result<Vec<String>> {
    let mut broken = Vec::new();
    for link in between(text, "](", ')') {
        if link.contains("://") {
            continue;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let dir = document.parent().context("a document is in a directory")?;
        let target = match path {
            "" => document.to_owned(),
            path => dir.join(path),
        };
        let is_there = match target.is_file() && !anchor.is_empty() {
            true => anchors(&fs::read_to_string(&target)?).contains(anchor),
            false => target.exists(),
        };
        if !is_there {
            broken.push(format!("{}: {link}", document.display()));
        }
    }
    Ok(broken)
}

#[test]
fn links_lead_somewhere() -> anyhow::Result<()> {
    let mut broken = Vec::new();
    for document in documents()? {
        broken.extend(broken_links(&document, &fs::read_to_string(&document)?)?);
    }
    ensure!(
        broken.is_empty(),
        "links that lead nowhere:\n{}",
        broken.join("\n")
    );
    Ok(())
}

#[test]
fn a_link_that_leads_nowhere_is_found() -> anyhow::Result<()> {
    let readme = root().join("README.md");
    let text = "[a](docs/FORMAT.md) [b](docs/no-such.md) [c](#no-such) [d](https://x.example)";
    assert_eq!(broken_links(&readme, text)?.len(), 2);
    Ok(())
}

/// The paths that a document names in code spans.
fn named_paths(text: &str) -> impl Iterator<Item = &str> {
    const PLACES: [&str; 10] = [
        "store/src/",
        "overlay/src/",
        "remote/src/",
        "fuse/src/",
        "vmm/src/",
        "host/src/",
        "cli/src/",
        "tests/",
        "bench/src/",
        "scripts/",
    ];
    let spans = text
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2));
    spans.filter(|named| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        // Capitals stand for a name.
        let stands_for = named
            .split(&['/', '.'][..])
            .any(|part| part.len() > 1 && part.chars().all(|c| c.is_ascii_uppercase()));
        let is_path = PLACES.iter().any(|place| named.starts_with(place));
        is_path && !stands_for && named.chars().all(plain)
    })
}

/// The files that documents name by their path exist.
#[test]
fn files_that_are_named_are_there() -> anyhow::Result<()> {
    let is_there = |named: &str| {
        let path = root().join(named);
        path.exists() || path.with_extension("rs").exists()
    };
    let text = "`store/src/lib.rs`, or `store/src/gone.rs`; `cli/src/NAME.rs`, `gc`";
    let (known, gone) = ("store/src/lib.rs", "store/src/gone.rs");
    ensure!(named_paths(text).eq([known, gone]) && is_there(known) && !is_there(gone));
    let mut missing = Vec::new();
    let mut named_in_all = 0;
    for document in documents()? {
        for named in named_paths(&fs::read_to_string(&document)?) {
            named_in_all += 1;
            if !is_there(named) {
                missing.push(format!("{}: {named}", document.display()));
            }
        }
    }
    ensure!(named_in_all > 50, "{named_in_all} files are named");
    ensure!(
        missing.is_empty(),
        "files that are not there:\n{}",
        missing.join("\n")
    );
    Ok(())
}

/// The commands that a document shows: lines of indented blocks that begin with the
/// program's name, without their comments.
fn shown_commands(text: &str) -> Vec<Vec<String>> {
    let lines = text.lines().filter(|line| line.starts_with("    "));
    let mut shown = Vec::new();
    for line in lines {
        let line = line.trim().trim_start_matches("$ ");
        let line = line.split(" # ").next().unwrap_or(line);
        for part in line
            .split(&['|', ';'][..])
            .flat_map(|part| part.split("&&"))
        {
            let words: Vec<_> = part.split_whitespace().map(str::to_owned).collect();
            if words.first().is_some_and(|word| word == "snapstore") {
                shown.push(words);
            }
        }
    }
    shown
}

/// Why the program does not know a command that is shown; none if it does.
fn unknown(words: &[String]) -> anyhow::Result<Option<String>> {
    let Some(command) = words.get(1).filter(|word| !word.starts_with(['-', '['])) else {
        return Ok(None);
    };
    let output = Command::new(program()?)
        .args([command, "--help"])
        .output()?;
    if !output.status.success() {
        return Ok(Some(format!("there is no command {command}")));
    }
    let help = String::from_utf8(output.stdout)?;
    let known: BTreeSet<&str> = help
        .split(|c: char| c.is_whitespace() || ",=[]<>".contains(c))
        .filter(|word| word.starts_with('-'))
        .collect();
    // What comes after is the guest's.
    let ours = words.iter().skip(2).take_while(|word| *word != "--");
    let options = ours.filter(|word| word.starts_with('-') && word.len() > 1);
    for option in options {
        let name = option.split(['=', ']']).next().unwrap_or(option);
        if !known.contains(name) {
            return Ok(Some(format!("{command} has no option {name}")));
        }
    }
    Ok(None)
}

#[test]
fn commands_that_are_shown_are_known() -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    let mut count = 0;
    for name in [
        "README.md",
        "docs/tutorial.md",
        "docs/machines.md",
        "docs/networking.md",
    ] {
        for words in shown_commands(&fs::read_to_string(root().join(name))?) {
            count += 1;
            if let Some(why) = unknown(&words)? {
                wrong.push(format!("{name}: {}: {why}", words.join(" ")));
            }
        }
    }
    ensure!(count > 20, "only {count} commands were found");
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The commands of the program, those of `remote` with it.
fn commands() -> anyhow::Result<Vec<String>> {
    let listed = |of: &[&str]| -> anyhow::Result<Vec<String>> {
        let output = Command::new(program()?).args(of).arg("--help").output()?;
        let help = String::from_utf8(output.stdout)?;
        let (_, list) = help.split_once("Commands:\n").context("no commands")?;
        let lines = list.lines().take_while(|line| !line.is_empty());
        // What goes on in another line is further right.
        let lines = lines.filter(|line| !line.starts_with("   "));
        let names = lines.filter_map(|line| Some(line.split_whitespace().next()?.to_owned()));
        Ok(names.filter(|name| name != "help").collect())
    };
    let mut all = listed(&[])?;
    let of_remote = listed(&["remote"])?.into_iter();
    all.extend(of_remote.map(|name| format!("remote {name}")));
    Ok(all)
}

/// The options of a command that no document names: by `--name` anywhere, or by its
/// letter in a line with the command.
fn untold(command: &str, documents: &str) -> anyhow::Result<Vec<String>> {
    let output = Command::new(program()?)
        .args(command.split(' '))
        .arg("--help")
        .output()?;
    let help = String::from_utf8(output.stdout)?;
    // Those that all commands have are said once.
    let help = help.split("\nGlobal options:").next().unwrap_or(&help);
    let mut missing = Vec::new();
    for line in help.lines().map(str::trim_start) {
        let mut names = line.split(&[' ', ','][..]).filter(|word| !word.is_empty());
        let (letter, long) = match (names.next(), names.next()) {
            (Some(letter), Some(long)) if letter.len() == 2 && long.starts_with("--") => {
                (Some(letter), long)
            }
            (Some(long), _) if long.starts_with("--") => (None, long),
            _ => continue,
        };
        let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
        let named = |text: &str, name: &str| text.split(name).skip(1).any(ends);
        let word = command.split(' ').next_back().unwrap_or(command);
        let by_letter = letter.is_some_and(|letter| {
            let mut lines = documents.lines();
            lines.any(|line| named(line, word) && named(line, letter))
        });
        if long != "--help" && !by_letter && !named(documents, long) {
            missing.push(format!("{command} {long}"));
        }
    }
    Ok(missing)
}

#[test]
fn every_command_and_option_is_told() -> anyhow::Result<()> {
    let mut text = String::new();
    for document in documents()? {
        // What changed once need not be so.
        if !document.ends_with("CHANGELOG.md") {
            text += &fs::read_to_string(document)?;
        }
    }
    let readme = fs::read_to_string(root().join("README.md"))?;
    let mut missing = Vec::new();
    let commands = commands()?;
    ensure!(commands.len() > 40, "{commands:?}");
    for command in &commands {
        let name = command.split(' ').next_back().unwrap_or(command);
        if !readme.contains(name) {
            missing.push(command.clone());
        }
        missing.extend(untold(command, &text)?);
    }
    ensure!(missing.is_empty(), "no document tells of {missing:?}");
    // The check is one.
    let without = text.replace("--keep-within", "");
    ensure!(untold("forget", &without)? == ["forget --keep-within"]);
    Ok(())
}

#[test]
fn a_command_that_is_not_known_is_found() -> anyhow::Result<()> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(unknown(&words("snapstore tags --json"))?, None);
    assert!(unknown(&words("snapstore tagz"))?.is_some());
    assert!(unknown(&words("snapstore tags --jason"))?.is_some());
    Ok(())
}

/// README lists every command that there is.
#[test]
fn readme_lists_all_commands() -> anyhow::Result<()> {
    let output = Command::new(program()?).arg("--help").output()?;
    let help = String::from_utf8(output.stdout)?;
    let list = help
        .split("Commands:\n")
        .nth(1)
        .context("there is a list")?;
    let list = list.split("\n\n").next().unwrap_or(list);
    let readme = fs::read_to_string(root().join("README.md"))?;
    let section = readme
        .split("## Commands")
        .nth(1)
        .context("there is a section")?;
    let section = section.split("\n## ").next().unwrap_or(section);
    let listed: BTreeSet<&str> = section
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .collect();
    for line in list.lines() {
        let command = line.split_whitespace().next().unwrap_or_default();
        ensure!(
            command == "help" || listed.contains(command),
            "README does not list {command}"
        );
    }
    Ok(())
}

/// What README shows of the library is compiled, with the crate's own README.
#[test]
fn the_example_of_the_library_is_one_that_is_compiled() -> anyhow::Result<()> {
    let example = |name: &str| -> anyhow::Result<String> {
        let text = fs::read_to_string(root().join(name))?;
        let begun = text.split_once("```rust").context("an example")?.1;
        Ok(begun.split_once("```").context("its end")?.0.to_owned())
    };
    assert_eq!(example("README.md")?, example("store/README.md")?);
    Ok(())
}
