//! The forms of listings: tables, JSON, and lines of the user's own.

use std::collections::BTreeSet;

use anyhow::Context as _;
use serde_json::Value;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

/// A store with `one` and its child `two`.
fn with_two() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let mut bytes = noise(1, 8 * PAGE);
    fixture.commit(
        "one",
        &bytes,
        &["--label", "os=none", "--label", "env=test"],
    )?;
    bytes[5] ^= 1;
    fixture.commit("two", &bytes, &["--parent", "one"])?;
    Ok(fixture)
}

/// Every command with `-o` whose answer needs no machine, and what its rows are called.
const LISTINGS: [(&[&str], &str); 8] = [
    (&["tags"], "tags"),
    (&["log"], "snapshots"),
    (&["show", "two"], ""),
    (&["diff", "one", "two"], "images"),
    (&["stats"], "per_snapshot"),
    (&["forget", "--keep-last", "9", "--dry-run"], "tags"),
    (&["doctor"], "checks"),
    (&["verify"], "findings"),
];

/// `doctor` ends with 1 on a host that lacks something.
fn printed(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<String> {
    let output = fixture.cli.run(arguments)?;
    let ended = matches!(output.status.code(), Some(0 | 1));
    anyhow::ensure!(ended, "{arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn json_and_table_are_what_they_are_without() -> anyhow::Result<()> {
    let fixture = with_two()?;
    for (command, _) in LISTINGS {
        if command == ["doctor"] {
            continue;
        }
        let with = |form: &[&str]| printed(&fixture, &[command, form].concat());
        assert_eq!(with(&["-o", "json"])?, with(&["--json"])?, "{command:?}");
        assert_eq!(with(&["-o", "table"])?, with(&[])?, "{command:?}");
        assert_eq!(with(&["--json", "-o", "json"])?, with(&["--json"])?);
    }
    Ok(())
}

/// What is refused names the fields, and they are those of the JSON.
#[test]
fn a_field_that_there_is_not_is_told_which_there_are() -> anyhow::Result<()> {
    let fixture = with_two()?;
    for (command, rows) in LISTINGS {
        let error = fixture
            .cli
            .fails(2, &[command, &["-o", "{tag} {nobody}"]].concat());
        let error = match error {
            Ok(error) if error.contains("\"nobody\"") => error,
            // Not every row has a tag.
            _ => fixture
                .cli
                .fails(2, &[command, &["-o", "{nobody}"]].concat())?,
        };
        let known = error.split("there are ").nth(1).context("no fields")?;
        let (of_row, of_answer) = known.split_once("; once: ").unwrap_or((known, ""));
        let names = |list: &str| -> BTreeSet<String> {
            let names = list.trim().split(", ").filter(|name| !name.is_empty());
            names.map(str::to_owned).collect()
        };
        let value: Value =
            serde_json::from_str(&printed(&fixture, &[command, &["--json"]].concat())?)?;
        let keys = |value: &Value| -> BTreeSet<String> {
            value
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, _)| name.clone())
                .collect()
        };
        let row = match rows {
            "" => Some(&value),
            rows => value[rows].get(0),
        };
        if let Some(row) = row {
            assert_eq!(names(of_row), keys(row), "{command:?}");
            fields_of_fields(&fixture, command, row)?;
        }
        if !rows.is_empty() {
            let mut whole = keys(&value);
            whole.remove(rows);
            // What rows have, too, is a row's.
            let named: BTreeSet<_> = names(of_row).union(&names(of_answer)).cloned().collect();
            assert!(whole.is_subset(&named), "{command:?}: {whole:?}");
            assert!(
                names(of_answer).is_subset(&whole),
                "{command:?}: {of_answer}"
            );
        }
    }
    Ok(())
}

/// Only objects, and lists of them, have fields of their own.
fn fields_of_fields(fixture: &Fixture, command: &[&str], row: &Value) -> anyhow::Result<()> {
    for (name, value) in row.as_object().into_iter().flatten() {
        let first = value.as_array().map_or(Some(value), |list| list.first());
        let form = format!("{{{name}.nobody}}");
        let arguments = [command, &["-o", &form]].concat();
        match first {
            None | Some(Value::Null) => {}
            Some(Value::Object(_)) => drop(printed(fixture, &arguments)?),
            Some(_) => {
                let error = fixture.cli.fails(2, &arguments)?;
                anyhow::ensure!(error.contains("no fields of its own"), "{error}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_line_for_each_with_the_fields_that_are_named() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let ok = |arguments: &[&str]| fixture.cli.ok(arguments);
    let id = |tag: &str| -> anyhow::Result<String> {
        let shown = fixture.cli.json(&["show", tag])?;
        Ok(shown["id"].as_str().context("no id")?.to_owned())
    };
    let (one, two) = (id("one")?, id("two")?);
    assert_eq!(
        ok(&["tags", "-o", "{tag} {id} {parent}"])?,
        format!("one {one} -\ntwo {two} {one}\n")
    );
    assert_eq!(
        ok(&["ls", "--format", r"{tag}\t{labels}\t{labels.os}"])?,
        "one\tenv=test,os=none\tnone\ntwo\t-\t-\n"
    );
    assert_eq!(
        ok(&["log", "-o", "{tags}={images.name}"])?,
        "one=memory\ntwo=memory\n"
    );
    assert_eq!(
        ok(&["show", "two", "-o", "{manifest.parent}"])?,
        format!("{one}\n")
    );
    assert_eq!(
        ok(&["diff", "one", "two", "-o", "{name}: {changed_pages}"])?,
        "memory: 1\n"
    );
    assert_eq!(
        ok(&["stats", "-o", "{tag} {nonzero_bytes}"])?,
        "one 32768\ntwo 32768\n"
    );
    assert_eq!(ok(&["stats", "-o", "in all {snapshots}"])?, "in all 2\n");
    assert_eq!(ok(&["verify", "-o", "{damage}"])?, "");
    let empty = Fixture::new()?;
    assert_eq!(empty.cli.ok(&["tags", "-o", "{tag}"])?, "");
    Ok(())
}

/// The same on a store with nothing in it, and where there is none.
#[test]
fn a_wrong_form_is_refused_before_anything_is_done() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    for (form, says) in [
        (
            "{nobody}",
            "there is no field \"nobody\"; there are tag, id",
        ),
        ("{tag", "has no }"),
        ("jsn", "it is json, table, or a line with fields"),
        ("", "it is json, table, or a line with fields"),
    ] {
        let error = fixture.cli.fails(2, &["tags", "-o", form])?;
        assert!(error.contains(says), "{form}: {error}");
    }
    for arguments in [
        &["tags", "--json", "-o", "{tag}"][..],
        &["tags", "--json", "-o", "table"],
        &["tags", "--quiet", "-o", "json"],
        &["log", "--graph", "-o", "{id}"],
    ] {
        fixture.cli.fails(2, arguments)?;
    }
    Ok(())
}
