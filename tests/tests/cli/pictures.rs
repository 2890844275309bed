//! `map` and `report`: what is drawn, what is said of damage, and the page in a browser.

mod browser;

use std::fs;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use snapstore_store::{Seen, Store, WorkingSet};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, list};

/// A page of noise that depends on the number only; zero is zero.
fn page(number: u64) -> Vec<u8> {
    match number {
        0 => vec![0; PAGE],
        number => noise(number, PAGE),
    }
}

fn pages(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| page(*number)).collect()
}

/// `one`, its child `two`, and `other`, which has a page of `two`.
fn with_three() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("one", &pages(&[1, 2, 0, 0]), &["--no-parent"])?;
    fixture.commit("two", &pages(&[1, 3, 4, 0]), &["--parent", "one"])?;
    fixture.commit("other", &pages(&[9, 8, 4]), &["--no-parent"])?;
    Ok(fixture)
}

fn counts(map: &Value) -> Vec<u64> {
    let kinds = ["zero", "shared_with_parent", "shared", "own"];
    let pages = kinds.map(|kind| map[kind]["pages"].as_u64().unwrap_or(u64::MAX));
    pages.to_vec()
}

#[test]
fn a_map_says_who_has_which_page() -> anyhow::Result<()> {
    let fixture = with_three()?;
    let map = fixture.cli.json(&["map", "two"])?;
    assert_eq!(counts(&map), [1, 1, 1, 1], "{map}");
    assert_eq!(map["image"], "memory");
    assert_eq!(map["working_set"], Value::Null);
    let runs = map["runs"].as_array().context("runs")?;
    let kinds: Vec<_> = runs.iter().map(|run| run["kind"].as_str()).collect();
    let expected = ["parent", "own", "shared", "zero"].map(Some);
    assert_eq!(kinds, expected);
    assert_eq!(runs[2]["address"], 2 * PAGE);
    // No colours in what is piped, one letter a page.
    let text = fixture.cli.ok(&["map", "two"])?;
    assert!(text.contains("0x0000000000  pos.\n"), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    assert!(text.contains("shared with the parent, one"), "{text}");
    Ok(())
}

#[test]
fn a_map_shows_what_was_recorded_of_restores() -> anyhow::Result<()> {
    let fixture = with_three()?;
    let store = Store::open(fixture.cli.store())?;
    let seen = Seen {
        touched: vec![1, 3],
        ..Seen::default()
    };
    let set = WorkingSet::merged(None, &seen, std::time::SystemTime::now());
    store.keep_working_set(store.resolve("two")?, "memory", &set)?;
    let map = fixture.cli.json(&["map", "two"])?;
    assert_eq!(map["working_set"]["pages"], 2);
    let text = fixture.cli.ok(&["map", "two", "--width", "40"])?;
    assert!(text.contains("0x0000000000  pOs:\n"), "{text}");
    Ok(())
}

#[test]
fn a_map_of_several_images_is_of_the_one_that_is_named() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.file("memory", &pages(&[1, 2]))?;
    let disk = format!("root={}", fixture.file("disk", &pages(&[5, 6, 7]))?);
    fixture
        .cli
        .ok(&["commit", "vm", "--memory", &memory, "--disk", &disk])?;
    assert_eq!(fixture.cli.json(&["map", "vm"])?["image"], "memory");
    for name in ["root", "root.img"] {
        let map = fixture.cli.json(&["map", "vm", "--image", name])?;
        assert_eq!(
            (&map["image"], counts(&map)),
            (&"root".into(), vec![0, 0, 0, 3])
        );
    }
    let said = fixture.cli.fails(3, &["map", "vm", "--image", "swap"])?;
    assert!(
        said.contains("swap") && said.contains("`snapstore show vm` lists"),
        "{said}"
    );
    fixture.cli.fails(3, &["map", "nobody"])?;
    fixture.cli.fails(2, &["map", "vm", "--width", "3"])?;
    Ok(())
}

/// A terminal gets colours, unless NO_COLOR is set.
#[test]
fn colours_are_for_terminals() -> anyhow::Result<()> {
    let fixture = with_three()?;
    let program = snapstore_tests::harness::program()?;
    let command = format!(
        "stty cols 60; {} --store {} map two",
        program.display(),
        fixture.cli.store().display()
    );
    let on_terminal = |no_color: Option<&str>| -> anyhow::Result<String> {
        let mut script = Command::new("script");
        script.args(["-q", "-e", "-c", &command, "/dev/null"]);
        script.env_remove("NO_COLOR");
        script.envs(no_color.map(|value| ("NO_COLOR", value)));
        let output = script.stdin(std::process::Stdio::null()).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    if Command::new("script").arg("--version").output().is_err() {
        let name = "colours_are_for_terminals";
        snapstore_tests::harness::skipped(name, "there is no script(1)");
        return Ok(());
    }
    assert!(on_terminal(None)?.contains("\x1b[0;94mp\x1b[0;93mo"));
    assert!(on_terminal(Some(""))?.contains('\x1b'));
    let plain = on_terminal(Some("1"))?;
    assert!(!plain.contains('\x1b') && plain.contains("pos."), "{plain}");
    Ok(())
}

/// The data of a page.
fn data(page: &str) -> anyhow::Result<Value> {
    let begun = page.split_once("id=\"data\">").context("it has data")?.1;
    let data = begun.split_once("</script>").context("the data ends")?.0;
    Ok(serde_json::from_str(data)?)
}

/// The one of a list that is of this tag.
fn of_tag<'a>(list: &'a Value, tag: &str) -> anyhow::Result<&'a Value> {
    let list = list.as_array().context("a list")?;
    let found = list
        .iter()
        .find(|it| it["tag"] == tag || it["tags"][0] == tag);
    found.with_context(|| format!("{tag} is not in {list:?}"))
}

#[test]
fn a_report_is_one_whole_file() -> anyhow::Result<()> {
    let fixture = with_three()?;
    let path = fixture.path("report.html");
    fs::write(&path, "what was there before")?;
    let told = fixture.cli.json(&["report", "-o", &path])?;
    assert_eq!((&told["snapshots"], &told["maps"]), (&3.into(), &2.into()));
    let page = fs::read_to_string(&path)?;
    assert_eq!(told["bytes"], page.len());
    let left: Vec<_> = list(fixture.dir.path())?;
    ensure!(
        left.iter()
            .all(|path| path.extension().is_none_or(|it| it != "part")),
        "{left:?}"
    );
    let shown = data(&page)?;
    let two = of_tag(&shown["snapshots"], "two")?;
    let parent = two["parent"].as_u64().context("a parent")?;
    let parent = &shown["snapshots"][usize::try_from(parent)?];
    assert_eq!(parent["tags"][0], "one");
    assert_eq!(shown["chains"].as_array().map(Vec::len), Some(2));
    let map = of_tag(&shown["maps"], "two")?;
    assert_eq!(map["parent"], "one");
    assert_eq!(map["counts"], serde_json::json!([1, 1, 1, 1]));
    assert_eq!(map["runs"], serde_json::json!([1, 1, 1, 3, 1, 2, 1, 0]));

    // On standard output it is the same, for the snapshot that is named.
    let page = fixture.cli.ok(&["report", "one", "-o", "-"])?;
    assert_eq!(data(&page)?["maps"][0]["tag"], "one");
    fixture.cli.fails(2, &["report", "-o", "-", "--json"])?;
    fixture.cli.fails(3, &["report", "nobody", "-o", &path])?;
    fixture
        .cli
        .fails(1, &["report", "-o", &fixture.path("no/such/dir")])?;
    // What is no regular file is written to, and stays what it is.
    let null = fixture.path("null");
    std::os::unix::fs::symlink("/dev/null", &null)?;
    fixture.cli.ok(&["report", "-o", &null])?;
    ensure!(fs::symlink_metadata(&null)?.is_symlink(), "it was replaced");
    Ok(())
}

#[test]
fn a_report_of_a_damaged_store_names_what_is_damaged() -> anyhow::Result<()> {
    let fixture = with_three()?;
    // The pack of `other`, which has only what it alone needs.
    let packs = fixture.packs()?;
    fs::write(packs.last().context("packs")?, "")?;
    let path = fixture.path("report.html");
    let said = fixture.cli.fails(4, &["report", "-o", &path])?;
    assert!(said.contains("other"), "{said}");
    let shown = data(&fs::read_to_string(&path)?)?;
    assert_eq!(shown["unreadable"][0]["tag"], "other");
    assert_eq!(shown["snapshots"].as_array().map(Vec::len), Some(2));
    // So does one of the damaged snapshot itself.
    fixture.cli.fails(4, &["report", "other", "-o", &path])?;
    let shown = data(&fs::read_to_string(&path)?)?;
    assert_eq!(shown["unreadable"][0]["tag"], "other");
    // A map of another one is drawn, and says that it may not be all.
    let output = fixture.cli.run(&["map", "two"])?;
    assert_eq!(output.status.code(), Some(4));
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("  poo.\n"), "{text}");
    fixture.cli.fails(4, &["map", "other"])?;
    Ok(())
}
