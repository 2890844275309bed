//! Metrics of a store, and that their names are those of the documents and the dashboard.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE};

fn text_of(path: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Of each metric that is printed, its type and labels.
fn printed(fixture: &Fixture) -> anyhow::Result<BTreeMap<String, (String, Vec<String>)>> {
    let page = fixture.cli.json(&["metrics"])?;
    let families = page["metrics"].as_array().context("a list")?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("a text");
    let mut found = BTreeMap::new();
    for family in families {
        let labels = family["labels"].as_array().context("labels")?;
        let labels = labels.iter().map(text).collect::<anyhow::Result<_>>()?;
        found.insert(text(&family["name"])?, (text(&family["type"])?, labels));
    }
    Ok(found)
}

/// The same of those in the tables of a document.
fn documented(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| `snapstore_"));
    let rows = rows.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let rows = rows.filter_map(|cells| {
        let [_, name, kind, _, labels, ..] = cells[..] else {
            return None;
        };
        let labels = labels.split(", ").filter(|label| !label.is_empty());
        let labels = labels.map(|label| label.trim_matches('`').to_owned());
        let name = name.trim_matches('`').to_owned();
        Some((name, (kind.to_owned(), labels.collect())))
    });
    rows.collect()
}

#[test]
fn what_is_printed_is_documented_and_nothing_else_is() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let printed = printed(&fixture)?;
    ensure!(printed.len() > 30, "only {}", printed.len());
    assert_eq!(printed, documented(&text_of("docs/METRICS.md")?));
    // Also as text, where each is named once.
    let text = fixture.cli.ok(&["metrics"])?;
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let types: Vec<_> = types.filter_map(|line| line.split(' ').next()).collect();
    ensure!(types.len() == printed.len());
    ensure!(types.iter().all(|name| printed.contains_key(*name)));
    Ok(())
}

#[test]
fn a_name_that_differs_is_found() {
    let row = "| `snapstore_a_total` | counter | bytes | `x`, `y` | It. |\n| other | x |";
    let found = documented(row);
    let expected = ("counter".to_owned(), vec!["x".to_owned(), "y".to_owned()]);
    assert_eq!(found.get("snapstore_a_total"), Some(&expected));
    assert_eq!(found.len(), 1);
}

/// The metrics that a query names.
fn named(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("snapstore_"))
}

/// Why a query cannot be answered with these metrics; none if it can.
fn wrong(query: &str, known: &BTreeMap<String, (String, Vec<String>)>) -> Option<String> {
    for name in named(query) {
        let suffixes: &[&str] = &["_bucket", "_sum", "_count"];
        let base = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        let (kind, is_whole) = match (known.get(name), base.and_then(|base| known.get(base))) {
            (Some((kind, _)), _) => (kind, true),
            (None, Some((kind, _))) => (kind, false),
            (None, None) => return Some(format!("there is no {name}")),
        };
        let has_parts = ["histogram", "summary"].contains(&kind.as_str());
        if is_whole == has_parts || name.ends_with("_bucket") && kind != "histogram" {
            return Some(format!("{name} is a {kind}"));
        }
        let after = query.split(name).nth(1).unwrap_or_default();
        let labels = after.strip_prefix('{').and_then(|it| it.split_once('}'));
        let labels = labels.map_or("", |(labels, _)| labels);
        // Of its own labels, or one that a scrape adds.
        for label in labels.split(',').filter_map(|one| one.split('=').next()) {
            let own = known
                .get(name)
                .is_some_and(|(_, own)| own.iter().any(|it| it == label));
            if !own && !["", "instance", "job"].contains(&label) {
                return Some(format!("{name} has no label {label}"));
            }
        }
    }
    None
}

/// All that a dashboard asks for.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if ["expr", "query", "definition"].contains(&&**name) => {
                        found.push(text.clone());
                    }
                    value => queries(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_asks_for_what_there_is() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let known = printed(&fixture)?;
    let dashboard: Value = serde_json::from_str(&text_of("packaging/grafana/snapstore.json")?)?;
    let mut found = Vec::new();
    queries(&dashboard, &mut found);
    let count = found.iter().flat_map(|query| named(query)).count();
    ensure!(count > 20, "only {count} metrics are asked for");
    let wrong: Vec<_> = found
        .iter()
        .filter_map(|query| wrong(query, &known))
        .collect();
    ensure!(wrong.is_empty(), "{wrong:?}");
    // What is documented is shown, but for what is of no use in a picture.
    let shown: BTreeSet<_> = found.iter().flat_map(|query| named(query)).collect();
    let shown = |name: &String| shown.iter().any(|it| it.starts_with(name.as_str()));
    let left_out: Vec<_> = known.keys().filter(|name| !shown(name)).collect();
    ensure!(left_out.len() < 12, "{left_out:?}");
    Ok(())
}

#[test]
fn a_query_that_cannot_be_answered_is_found() {
    let row = |kind: &str, labels: &[&str]| {
        let labels = labels.iter().map(|it| (*it).to_owned()).collect();
        (kind.to_owned(), labels)
    };
    let known = BTreeMap::from([
        ("snapstore_a_total".to_owned(), row("counter", &["mount"])),
        ("snapstore_b_seconds".to_owned(), row("histogram", &[])),
        ("snapstore_c_seconds".to_owned(), row("summary", &[])),
    ]);
    for right in [
        "rate(snapstore_a_total{mount=\"x\",instance=~\"y\"}[5m])",
        "snapstore_b_seconds_bucket / snapstore_c_seconds_sum",
    ] {
        assert_eq!(wrong(right, &known), None);
    }
    for bad in [
        "rate(snapstore_d_total[5m])",
        "snapstore_a_total{machine=\"x\"}",
        "snapstore_b_seconds",
        "snapstore_c_seconds_bucket",
    ] {
        assert!(wrong(bad, &known).is_some(), "{bad}");
    }
}

/// The number of this name.
fn number(page: &Value, name: &str) -> Option<f64> {
    let families = page["metrics"].as_array()?;
    let family = families.iter().find(|family| family["name"] == name)?;
    family["samples"][0]["value"].as_f64()
}

#[test]
fn a_store_is_counted() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let told = |options: &[&str], name: &str| -> anyhow::Result<Option<f64>> {
        let page = fixture.cli.json(&[&["metrics"], options].concat())?;
        Ok(number(&page, &format!("snapstore_store_{name}")))
    };
    ensure!(told(&[], "tags")? == Some(0.0) && told(&[], "packs")? == Some(0.0));
    fixture.commit("one", &noise(1, 16 * PAGE), &[])?;
    fixture.commit("two", &noise(2, 16 * PAGE), &["--no-parent"])?;
    ensure!(told(&[], "tags")? == Some(2.0) && told(&[], "packs")? == Some(2.0));
    let bytes = told(&[], "pack_bytes")?.context("bytes")?;
    ensure!(bytes > (32 * PAGE) as f64, "{bytes}");
    ensure!(told(&[], "bytes")?.context("bytes")? > bytes);
    // Not looked for unless it is wanted.
    ensure!(told(&[], "unreferenced_bytes")?.is_none());
    ensure!(told(&["--full"], "logical_bytes")? == Some((32 * PAGE) as f64));
    let dead = told(&["--full"], "unreferenced_bytes")?.context("known")?;
    fixture.cli.ok(&["rm", "one"])?;
    let more = told(&["--full"], "unreferenced_bytes")?.context("known")?;
    ensure!(more > dead + (15 * PAGE) as f64, "{dead}, then {more}");
    ensure!(told(&[], "last_collection_timestamp_seconds")?.is_none());
    fixture.cli.ok(&["gc"])?;
    ensure!(told(&[], "packs")? == Some(1.0));
    ensure!(told(&[], "last_collection_timestamp_seconds")?.is_some());
    Ok(())
}

#[test]
fn what_is_damaged_is_absent_and_the_rest_is_counted() -> anyhow::Result<()> {
    for (name, absent) in [
        ("collector", "condemned_packs"),
        ("rewrites", "rewritten_bytes_total"),
    ] {
        let fixture = Fixture::new()?;
        fixture.commit("one", &noise(1, 16 * PAGE), &[])?;
        fixture.commit("two", &noise(2, 16 * PAGE), &["--no-parent"])?;
        fixture.cli.ok(&["rm", "two"])?;
        fixture.cli.ok(&["gc"])?;
        fixture.cli.ok(&["gc", "--optimize"])?;
        let of = |page: &Value, name: &str| number(page, &format!("snapstore_store_{name}"));
        let page = fixture.cli.json(&["metrics"])?;
        ensure!(of(&page, absent).is_some(), "{name}");
        let file = fixture.cli.store().join(name);
        let mut bytes = std::fs::read(&file)?;
        bytes[20] ^= 1;
        std::fs::write(&file, bytes)?;
        let page = fixture.cli.json(&["metrics"])?;
        ensure!(of(&page, absent).is_none(), "{name}");
        ensure!(of(&page, "tags") == Some(1.0), "{name}");
    }
    Ok(())
}

#[test]
fn a_file_is_replaced_at_once() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let path = fixture.file("snapstore.prom", b"old")?;
    ensure!(fixture.cli.ok(&["metrics", "--output", &path])?.is_empty());
    let text = fs::read_to_string(&path)?;
    ensure!(
        text.starts_with("# HELP ") && text.ends_with('\n'),
        "{text}"
    );
    let others = fs::read_dir(fixture.dir.path())?.count();
    ensure!(others == 2, "a store and that file, but {others}");
    let nowhere = fixture.path("no/such.prom");
    let said = fixture.cli.fails(1, &["metrics", "--output", &nowhere])?;
    ensure!(said.contains("no/such.prom"), "{said}");
    Ok(())
}
