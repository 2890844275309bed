//! What commands print.

use std::io;

use anyhow::Context as _;
use serde_json::Value;
use snapstore_tests::harness::{copy_program, noise, skipped};

use crate::{Fixture, PAGE};

const COMMANDS: [&str; 14] = [
    "init", "commit", "mount", "umount", "tag", "tags", "rm", "log", "show", "diff", "gc",
    "verify", "repair", "stats",
];

/// A store with `one` and its child `two`.
fn with_two() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let mut bytes = noise(1, 8 * PAGE);
    fixture.commit("one", &bytes, &[])?;
    bytes[5] ^= 1;
    fixture.commit("two", &bytes, &["--parent", "one"])?;
    Ok(fixture)
}

fn object(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<Value> {
    let value = fixture.cli.json(arguments)?;
    anyhow::ensure!(value.is_object(), "{arguments:?} prints {value}");
    Ok(value)
}

#[test]
fn init_as_json() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let value = object(&fixture, &["init", "--page-size", "16K"])?;
    assert_eq!(value["page_size_bytes"], 16384);
    Ok(())
}

#[test]
fn commit_as_json() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let value = fixture.commit("three", &noise(3, 2 * PAGE), &["--label", "os=none"])?;
    assert_eq!(value["tag"], "three");
    assert_eq!(value["images"][0]["nonzero_pages"], 2);
    let seconds = |stage: &str| value["timings"][stage].as_f64().context("timings");
    let mut stages = 0.0;
    for stage in ["prepare", "pages", "seal", "publish"] {
        stages += seconds(&format!("{stage}_seconds"))?;
    }
    assert!(
        (stages - seconds("total_seconds")?).abs() < 1e-6 && stages > 0.0,
        "{value}"
    );
    Ok(())
}

#[test]
fn names_alone_and_commands_by_other_names() -> anyhow::Result<()> {
    let fixture = with_two()?;
    assert_eq!(fixture.cli.ok(&["tags", "--quiet"])?, "one\ntwo\n");
    assert_eq!(fixture.cli.ok(&["ls", "-q"])?, "one\ntwo\n");
    assert_eq!(fixture.cli.ok(&["ls"])?, fixture.cli.ok(&["tags"])?);
    let show = fixture.cli.ok(&["show", "one"])?;
    assert_eq!(fixture.cli.ok(&["inspect", "one"])?, show);
    // Machines of nobody else.
    let mut ps = fixture.cli.command(&["ps", "--quiet"])?;
    let ps = ps
        .env("SNAPSTORE_RUNTIME_DIR", fixture.path("run"))
        .output()?;
    assert!(ps.status.success() && ps.stdout.is_empty(), "{ps:?}");
    let empty = Fixture::new()?;
    assert_eq!(empty.cli.ok(&["tags", "-q"])?, "");
    Ok(())
}

#[test]
fn lists_as_json() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let tags = object(&fixture, &["tags"])?;
    let names: Vec<_> = tags["tags"].as_array().context("tags")?.iter().collect();
    assert_eq!(names.len(), 2);
    assert_eq!(names[0]["tag"], "one");
    assert_eq!(names[1]["parent"], names[0]["id"]);
    let log = object(&fixture, &["log"])?;
    assert_eq!(log["snapshots"].as_array().map(Vec::len), Some(2));
    Ok(())
}

#[test]
fn show_and_diff_as_json() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let shown = object(&fixture, &["show", "two"])?;
    assert_eq!(shown["tags"][0], "two");
    assert_eq!(shown["manifest"]["images"][0]["size_bytes"], 8 * PAGE);
    let diff = object(&fixture, &["diff", "one", "two"])?;
    assert_eq!(diff["images"][0]["changed_pages"], 1);
    assert_eq!(diff["images"][0]["ranges"][0]["length_bytes"], PAGE);
    Ok(())
}

#[test]
fn changes_as_json() -> anyhow::Result<()> {
    let fixture = with_two()?;
    assert_eq!(object(&fixture, &["tag", "two", "deux"])?["tag"], "deux");
    assert_eq!(object(&fixture, &["rm", "deux"])?["removed"][0], "deux");
    let rm = object(&fixture, &["rm", "--dry-run", "two"])?;
    assert!(rm["frees_at_least_bytes"].as_u64() > Some(0), "{rm}");
    object(&fixture, &["rm", "one", "two"])?;
    let plan = object(&fixture, &["gc", "--dry-run"])?;
    assert_eq!(plan["deleted_packs"], 0);
    assert_eq!(plan["plan"]["packs"].as_array().map(Vec::len), Some(2));
    assert_eq!(object(&fixture, &["gc"])?["deleted_packs"], 2);
    Ok(())
}

#[test]
fn upkeep_as_json() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let verified = object(&fixture, &["verify"])?;
    assert_eq!(verified["findings"], serde_json::json!([]));
    let read = object(&fixture, &["verify", "--read-data"])?;
    assert!(read["chunks_read"].as_u64() > Some(8), "{read}");
    assert_eq!(object(&fixture, &["stats"])?["snapshots"], 2);
    let repaired = object(&fixture, &["repair"])?;
    assert!(repaired["indexed_chunks"].as_u64() > Some(8), "{repaired}");
    Ok(())
}

#[test]
fn an_id_can_be_cut_short() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let shown = object(&fixture, &["show", "one"])?;
    let id = shown["id"].as_str().context("id")?;
    for name in [id, &id[..12], &id[..8]] {
        assert_eq!(object(&fixture, &["show", name])?["id"], shown["id"]);
    }
    fixture.refused(3, "no tag or snapshot", &["show", &id[..3]])?;
    fixture.refused(3, "no tag or snapshot", &["show", &format!("{id}0")])
}

#[test]
fn every_help_has_an_example() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    for command in COMMANDS {
        let help = fixture.cli.ok(&[command, "--help"])?;
        anyhow::ensure!(help.contains("Example"), "{command} --help has none");
    }
    let help = fixture.cli.ok(&["--help"])?;
    for command in COMMANDS {
        anyhow::ensure!(
            help.contains(&format!("\n  {command} ")),
            "{command} is not listed"
        );
    }
    assert!(help.contains("Exit codes"), "{help}");
    Ok(())
}

#[test]
fn a_reader_that_went_away_is_no_failure() -> anyhow::Result<()> {
    let fixture = with_two()?;
    for arguments in [
        &["tags"][..],
        &["log", "--graph"],
        &["show", "one"],
        &["stats", "--json"],
        &["gc", "--dry-run"],
        &["verify"],
        &["--help"],
    ] {
        let (reader, writer) = io::pipe()?;
        drop(reader);
        let output = fixture.cli.command(arguments)?.stdout(writer).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{arguments:?}: {error}");
        anyhow::ensure!(output.stderr.is_empty(), "{arguments:?}: {error}");
    }
    Ok(())
}

#[test]
fn a_disk_that_is_full_is_a_failure() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
    let status = fixture.cli.command(&["tags"])?.stdout(full).status()?;
    assert_eq!(status.code(), Some(1));
    Ok(())
}

#[test]
fn the_environment_names_the_store() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let output = std::process::Command::new(snapstore_tests::harness::program()?)
        .arg("tags")
        .env("SNAPSTORE_DIR", fixture.cli.store())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("one") && text.contains("two"), "{text}");
    Ok(())
}

#[test]
fn the_default_store_is_created_when_first_needed() -> anyhow::Result<()> {
    let fixture = Fixture::without_store()?;
    let image = fixture.file("image", &noise(1, PAGE))?;
    let run = |arguments: &[&str]| {
        std::process::Command::new(snapstore_tests::harness::program()?)
            .args(arguments)
            .env_remove("SNAPSTORE_DIR")
            .env("XDG_DATA_HOME", fixture.dir.path())
            .output()
            .map_err(anyhow::Error::from)
    };
    assert_eq!(run(&["tags"])?.status.code(), Some(3));
    let output = run(&["commit", "base", "--memory", &image])?;
    assert!(output.status.success(), "{output:?}");
    assert!(run(&["show", "base"])?.status.success());
    assert!(fixture.dir.path().join("snapstore/config").is_file());
    Ok(())
}

/// Runs the program with nothing of this process's environment that names a place.
fn with_environment(
    fixture: &Fixture,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> anyhow::Result<std::process::Output> {
    let mut command = std::process::Command::new(snapstore_tests::harness::program()?);
    command.args(arguments);
    for name in ["SNAPSTORE_DIR", "XDG_DATA_HOME", "HOME", "XDG_RUNTIME_DIR"] {
        command.env_remove(name);
    }
    command.env("SNAPSTORE_RUNTIME_DIR", fixture.path("run"));
    Ok(command.envs(variables.iter().copied()).output()?)
}

#[test]
fn empty_variables_count_as_unset() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let store = fixture.path("store");
    let empty = [("SNAPSTORE_DIR", ""), ("XDG_DATA_HOME", ""), ("HOME", "")];
    let output = with_environment(&fixture, &empty, &["tags"])?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("neither HOME nor XDG_DATA_HOME"), "{error}");
    let output = with_environment(&fixture, &empty, &["--store", &store, "tags"])?;
    assert!(output.status.success(), "{output:?}");
    let home = fixture.path("home");
    let with_home = [
        ("SNAPSTORE_DIR", ""),
        ("XDG_DATA_HOME", ""),
        ("HOME", &*home),
    ];
    let output = with_environment(&fixture, &with_home, &["tags"])?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("home/.local/share/snapstore"), "{error}");
    let named = [("SNAPSTORE_DIR", &*store)];
    assert!(
        with_environment(&fixture, &named, &["tags"])?
            .status
            .success()
    );
    let runtime = [("SNAPSTORE_RUNTIME_DIR", ""), ("XDG_RUNTIME_DIR", "")];
    let output = with_environment(&fixture, &runtime, &["ps"])?;
    assert!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn tags_that_are_removed_are_told() -> anyhow::Result<()> {
    let fixture = with_two()?;
    fixture.cli.ok(&["tag", "two", "deux"])?;
    let dry = object(&fixture, &["rm", "--dry-run", "deux"])?;
    assert_eq!(dry["would_remove"], serde_json::json!(["deux"]));
    let removed = object(&fixture, &["rm", "deux", "one"])?;
    assert_eq!(removed["removed"], serde_json::json!(["deux", "one"]));
    fixture.refused(3, "no tag or snapshot", &["show", "deux"])?;
    // None is removed if one is not there.
    fixture.refused(3, "no tag or snapshot", &["rm", "two", "none"])?;
    // An id is no tag, also in a rehearsal.
    let id = object(&fixture, &["show", "two"])?["id"].clone();
    let id = id.as_str().context("id")?;
    fixture.refused(3, "no tag or snapshot", &["rm", "--dry-run", id])
}

#[test]
fn times_that_cannot_be() -> anyhow::Result<()> {
    let fixture = with_two()?;
    for time in ["nan", "inf", "-inf", "-1", "-0.5", "1e19", "1e300", "x", ""] {
        for arguments in [
            vec!["tags".to_owned(), format!("--lock-timeout={time}")],
            vec![
                "exec".into(),
                "vm".into(),
                format!("--wait={time}"),
                "--".into(),
                "x".into(),
            ],
            vec![
                "exec".into(),
                "vm".into(),
                format!("--timeout={time}"),
                "--".into(),
                "x".into(),
            ],
        ] {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let error = fixture.cli.fails(2, &arguments)?;
            assert!(!error.contains("panicked"), "{error}");
        }
    }
    fixture.cli.ok(&["tags", "--lock-timeout=1000000000"])?;
    Ok(())
}

/// A tag's file as a later version could write it.
fn newer_tag(name: &str, version: u32) -> Vec<u8> {
    let mut bytes = b"SNAPTAG1".to_vec();
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&40_u32.to_le_bytes());
    bytes.extend_from_slice(&[7; 40]);
    let mut hasher = blake3::Hasher::new();
    hasher.update(name.as_bytes()).update(&[0]).update(&bytes);
    bytes.extend_from_slice(hasher.finalize().as_bytes());
    bytes
}

#[test]
fn a_tag_of_a_newer_version_is_told_and_left_alone() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let path = fixture.cli.store().join("tags/later");
    std::fs::write(&path, newer_tag("later", 2))?;
    let says = "has format version 2, made by a newer snapstore";
    for arguments in [&["tags"][..], &["log"], &["log", "--graph"]] {
        let output = fixture.cli.run(arguments)?;
        let text = String::from_utf8([output.stdout, output.stderr].concat())?;
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("one") && text.contains("two"), "{text}");
        assert!(
            text.contains("later cannot be read") && text.contains(says),
            "{text}"
        );
    }
    let tags = object(&fixture, &["tags"])?;
    assert_eq!(tags["tags"].as_array().map(Vec::len), Some(2));
    assert_eq!(tags["unreadable"][0]["tag"], "later");
    let shown = object(&fixture, &["show", "two"])?;
    assert_eq!(shown["tags"], serde_json::json!(["two"]));
    let id = shown["id"].as_str().context("id")?.to_owned();
    object(&fixture, &["show", &id])?;
    object(&fixture, &["show", &id[..10]])?;
    fixture.commit("three", &noise(3, 8 * PAGE), &[])?;
    fixture.commit("four", &noise(3, 8 * PAGE), &["--parent", &id])?;
    object(&fixture, &["tag", &id, "deux"])?;
    object(&fixture, &["diff", "one", "two"])?;
    for arguments in [&["show", "later"][..], &["tag", "later", "x"], &["gc"]] {
        let error = fixture.cli.fails(1, arguments)?;
        assert!(error.contains(says), "{error}");
    }
    let error = fixture
        .cli
        .fails(1, &["commit", "later", "--memory", &fixture.path("memory")])?;
    assert!(error.contains(says), "{error}");
    assert_eq!(std::fs::read(&path)?, newer_tag("later", 2));
    // What is damaged is still damage.
    std::fs::write(&path, b"nothing like a tag")?;
    let output = fixture.cli.run(&["tags"])?;
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8(output.stdout)?.contains("two"));
    Ok(())
}

#[test]
fn descriptors_that_run_out_are_told_and_a_commit_that_fails_is_none() -> anyhow::Result<()> {
    let fixture = with_two()?;
    let path = fixture.file("memory", &noise(5, 8 * PAGE))?;
    let program = snapstore_tests::harness::program()?;
    let (mut refused, mut done) = (0, 0);
    for limit in 4..48 {
        let tag = format!("t{limit}");
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -n $0 && exec \"$@\"", &limit.to_string()])
            .arg(&program)
            .arg("--store")
            .arg(fixture.cli.store())
            .args(["commit", &tag, "--memory", &path])
            .args(["--label", &format!("limit={limit}")])
            .output();
        let output = output.context("sh")?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let there = fixture.cli.run(&["show", &tag])?.status.success();
        match output.status.code() {
            Some(0) => done += 1,
            Some(1) => {
                refused += 1;
                anyhow::ensure!(error.contains("Too many open files"), "{limit}: {error}");
            }
            other => anyhow::bail!("{limit}: {other:?}: {error}"),
        }
        anyhow::ensure!(there == output.status.success(), "{limit}: {error}");
    }
    anyhow::ensure!(refused > 3 && done > 3, "{refused} refused, {done} done");
    Ok(())
}

#[test]
fn threads_that_run_out_are_told() -> anyhow::Result<()> {
    const TEST: &str = "threads_that_run_out_are_told";
    // The limit is a user's, and root has none.
    if !rustix::process::geteuid().is_root() {
        skipped(TEST, "it takes root to be another user");
        return Ok(());
    }
    let fixture = with_two()?;
    fixture.file("memory", &noise(5, 8 * PAGE))?;
    let program = fixture.path("snapstore");
    copy_program(&snapstore_tests::harness::program()?, program.as_ref())?;
    let directory = fixture.path("");
    let run = |command: &[&str]| -> anyhow::Result<Option<std::process::Output>> {
        match std::process::Command::new(command[0])
            .args(&command[1..])
            .output()
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => Ok(Some(other?)),
        }
    };
    run(&["chown", "-R", "65534:65534", &directory])?;
    let mut refused = 0;
    for limit in ["1", "3", "6", "9", "12", "15", "18", "200"] {
        for command in [
            &["tags"][..],
            &["stats"],
            &["verify", "--read-data"],
            &["commit", "new", "--replace", "--memory", "memory"],
            &["gc"],
            &["repair"],
        ] {
            let limited = [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "prlimit",
            ];
            let processes = format!("--nproc={limit}");
            let mut all = [&["timeout", "60", "env", "-C", &directory][..], &limited].concat();
            all.extend([&*processes, &program, "--store", "store"]);
            all.extend(command);
            let Some(output) = run(&all)? else {
                skipped(TEST, "there is no timeout(1), setpriv(1) or prlimit(1)");
                return Ok(());
            };
            let error = String::from_utf8_lossy(&output.stderr);
            let all_of_it = format!("{limit} {command:?}: {}: {error}", output.status);
            match output.status.code() {
                Some(0) => {}
                Some(1) => {
                    refused += 1;
                    let says = "Resource temporarily unavailable";
                    anyhow::ensure!(error.contains(says), "{all_of_it}");
                }
                Some(127) if error.contains("No such file") => {
                    skipped(TEST, "there is no setpriv(1) or prlimit(1)");
                    return Ok(());
                }
                _ => anyhow::bail!(all_of_it),
            }
        }
    }
    anyhow::ensure!(refused > 5, "{refused} were refused");
    let report = fixture.cli.ok(&["verify", "--read-data"])?;
    anyhow::ensure!(report.contains("Nothing is damaged"), "{report}");
    Ok(())
}
