//! What `forget`, `tag --protect` and `commit --expires` keep and remove.

use crate::{Fixture, PAGE};
use snapstore_tests::harness::noise;

/// Tags `t1` to `t5`; `t1` to `t3` are a chain, each with its number as the label `n`.
fn five() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    for number in 1..=5_u64 {
        let parent = format!("t{}", number - 1);
        let label = format!("n={number}");
        let mut more = vec!["--label", &label];
        match number {
            2 | 3 => more.extend(["--parent", &parent]),
            _ => more.push("--no-parent"),
        }
        fixture.commit(&format!("t{number}"), &noise(number, 4 * PAGE), &more)?;
    }
    Ok(fixture)
}

fn tags(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let value = fixture.cli.json(&["tags"])?;
    let tags = value["tags"].as_array().cloned().unwrap_or_default();
    let mut names: Vec<_> = tags
        .iter()
        .filter_map(|it| it["tag"].as_str().map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

#[test]
fn forget_removes_what_no_rule_keeps() -> anyhow::Result<()> {
    let fixture = five()?;
    let plan = fixture.cli.json(&[
        "forget",
        "--keep-tag",
        "t5",
        "--keep-label",
        "n=2",
        "--keep-tag",
        "*1",
        "--dry-run",
    ])?;
    assert!(plan["frees_at_least_bytes"].as_u64() > Some(0), "{plan}");
    assert_eq!(tags(&fixture)?.len(), 5);
    let text = fixture.cli.ok(&[
        "forget",
        "--keep-tag",
        "t5",
        "--keep-label",
        "n=2",
        "--keep-tag",
        "*1",
    ])?;
    assert!(
        text.contains("label n=2") && text.contains("tag *1"),
        "{text}"
    );
    assert!(text.contains("no rule keeps it"), "{text}");
    assert_eq!(tags(&fixture)?, ["t1", "t2", "t5"]);
    fixture.cli.ok(&["gc"])?;
    fixture.cli.ok(&["verify", "--read-data"])?;
    assert!(
        fixture.memory("t2")? == noise(2, 4 * PAGE),
        "t2 has changed"
    );
    Ok(())
}

#[test]
fn forget_counts_each_group() -> anyhow::Result<()> {
    let fixture = five()?;
    let text = fixture
        .cli
        .ok(&["forget", "--keep-last", "1", "--group-by", "chain"])?;
    assert!(text.contains("among the last"), "{text}");
    assert_eq!(tags(&fixture)?, ["t3", "t4", "t5"]);
    fixture
        .cli
        .ok(&["forget", "--keep-last", "1", "--group-by", "label:n"])?;
    assert_eq!(tags(&fixture)?, ["t3", "t4", "t5"]);
    Ok(())
}

#[test]
fn forget_without_a_rule_removes_nothing() -> anyhow::Result<()> {
    let fixture = five()?;
    fixture.refused(2, "--keep", &["forget"])?;
    fixture.refused(2, "12h or 7d", &["forget", "--keep-within", "soon"])?;
    fixture.refused(
        2,
        "chain or label:KEY",
        &["forget", "--expired", "--group-by", "x"],
    )?;
    fixture.refused(2, "matches no tag", &["forget", "--keep-tag", ""])?;
    fixture.refused(2, "keeps nothing", &["forget", "--keep-last", "0"])?;
    let memory = fixture.path("memory");
    let odd = [
        "commit",
        "x",
        "--memory",
        &memory,
        "--label",
        "expires=2020-01-01T02:00:00+02:00",
    ];
    fixture.refused(2, "UTC", &odd)?;
    fixture.cli.ok(&["forget", "--expired"])?;
    fixture.cli.ok(&["forget", "--keep-within", "1h"])?;
    assert_eq!(tags(&fixture)?.len(), 5);
    // The newest is as young as itself.
    fixture.cli.ok(&["forget", "--keep-within", "0d"])?;
    assert!(tags(&fixture)?.contains(&"t5".to_owned()));
    Ok(())
}

#[test]
fn what_has_expired_is_forgotten() -> anyhow::Result<()> {
    let fixture = five()?;
    let memory = noise(6, 4 * PAGE);
    fixture.commit("gone", &memory, &["--no-parent", "--expires", "0s"])?;
    fixture.commit("here", &memory, &["--no-parent", "--expires", "7d"])?;
    let plan = fixture.cli.json(&["forget", "--expired"])?;
    assert_eq!(plan["removed"], serde_json::json!(["gone"]), "{plan}");
    fixture.cli.ok(&["forget", "--keep-tag", "none"])?;
    assert_eq!(tags(&fixture)?, ["here"]);
    fixture.refused(
        2,
        "expires",
        &[
            "commit",
            "x",
            "--memory",
            &fixture.path("memory"),
            "--expires",
            "1d",
            "--label",
            "expires=never",
        ],
    )?;
    Ok(())
}

/// Rules beside `--expired` keep more, and not less.
#[test]
fn only_what_has_expired_goes_whatever_rules_there_are() -> anyhow::Result<()> {
    let fixture = five()?;
    let memory = noise(6, 4 * PAGE);
    for name in ["gone", "kept"] {
        fixture.commit(name, &memory, &["--no-parent", "--expires", "0s"])?;
    }
    let rules = ["--keep-tag", "kept", "--keep-last", "1"];
    let plan = fixture
        .cli
        .json(&[&["forget", "--expired"][..], &rules].concat())?;
    assert_eq!(plan["removed"], serde_json::json!(["gone"]), "{plan}");
    assert_eq!(tags(&fixture)?, ["kept", "t1", "t2", "t3", "t4", "t5"]);
    fixture.cli.ok(&["forget", "--expired"])?;
    assert_eq!(tags(&fixture)?, ["t1", "t2", "t3", "t4", "t5"]);
    Ok(())
}

#[test]
fn a_protected_tag_is_neither_removed_nor_moved() -> anyhow::Result<()> {
    let fixture = five()?;
    fixture.cli.ok(&["tag", "--protect", "t1"])?;
    let says = "tag --unprotect";
    fixture.refused(1, says, &["rm", "t1"])?;
    // All or nothing.
    fixture.refused(1, says, &["rm", "t5", "t1"])?;
    fixture.refused(1, says, &["tag", "t2", "t1", "--replace"])?;
    let memory = fixture.path("memory");
    fixture.refused(1, says, &["commit", "t1", "--memory", &memory, "--replace"])?;
    fixture.refused(3, "no tag", &["tag", "--protect", "none"])?;
    fixture.cli.ok(&["forget", "--keep-tag", "none"])?;
    assert_eq!(tags(&fixture)?, ["t1"]);
    let listed = fixture.cli.json(&["tags"])?;
    assert_eq!(listed["tags"][0]["protected"], true, "{listed}");
    fixture.cli.ok(&["tag", "--unprotect", "t1"])?;
    fixture.cli.ok(&["rm", "t1"])?;
    assert!(tags(&fixture)?.is_empty());
    Ok(())
}

#[test]
fn a_tag_can_be_made_protected() -> anyhow::Result<()> {
    let fixture = five()?;
    fixture.cli.ok(&["tag", "t1", "release", "--protect"])?;
    fixture.refused(1, "protected", &["rm", "release"])?;
    fixture.cli.ok(&["rm", "t1"])?;
    Ok(())
}

#[test]
fn gc_says_what_would_have_to_go() -> anyhow::Result<()> {
    let fixture = five()?;
    let budget = |arguments: &[&str]| -> anyhow::Result<serde_json::Value> {
        let output = fixture.cli.run(&[&["gc", "--json"], arguments].concat())?;
        let mut value: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        value["code"] = output.status.code().into();
        Ok(value)
    };
    let roomy = budget(&["--max-store", "1G"])?;
    assert_eq!(roomy["code"], 0, "{roomy}");
    assert_eq!(roomy["budget"]["over_bytes"], 0, "{roomy}");
    // One byte too much: the oldest that is not protected would do.
    let most = roomy["budget"]["store_bytes"].as_u64().unwrap_or(0) - 1;
    fixture.cli.ok(&["tag", "--protect", "t1"])?;
    let tight = budget(&["--max-store", &most.to_string()])?;
    assert_eq!(tight["code"], 1, "{tight}");
    let tags: Vec<_> = tight["budget"]["to_remove"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    assert_eq!(tags.len(), 1, "{tight}");
    assert_ne!(tags[0]["tag"], "t1", "{tight}");
    let frees = tags[0]["freed_stored_bytes"].as_u64().unwrap_or(0);
    assert!(frees > 3 * PAGE as u64, "{tight}");
    // What it says is what comes free: the pages, their node, the manifest.
    let tag = tags[0]["tag"].as_str().unwrap_or_default().to_owned();
    let plan = fixture.cli.json(&["rm", &tag, "--dry-run"])?;
    assert_eq!(plan["frees_at_least_bytes"], frees, "{plan}");
    // Nothing that is kept was removed.
    assert_eq!(self::tags(&fixture)?.len(), 5);
    let never = budget(&["--reserve", "900T"])?;
    assert_eq!(never["code"], 1, "{never}");
    assert_eq!(never["budget"]["enough"], false, "{never}");
    assert_eq!(
        never["budget"]["to_remove"].as_array().map(Vec::len),
        Some(4),
        "{never}"
    );
    Ok(())
}
