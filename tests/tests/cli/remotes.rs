//! Remotes in directories: answers, exit codes, and what is advised.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::{Cli, noise};

use crate::{Fixture, PAGE, list};

/// A store with `base`, and a bucket that is a remote of it.
pub fn with_remote() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    fixture.commit("base", &noise(1, 20 * PAGE), &[])?;
    let url = format!("file://{}", fixture.path("mnt/bucket"));
    fixture.cli.ok(&["remote", "add", "site", &url])?;
    fixture.cli.ok(&["remote", "init", "site"])?;
    Ok(fixture)
}

fn bucket(fixture: &Fixture) -> PathBuf {
    fixture.dir.path().join("mnt/bucket")
}

/// The one object of its kind.
fn object(fixture: &Fixture, kind: &str) -> anyhow::Result<PathBuf> {
    let found = list(&bucket(fixture).join(kind))?.pop();
    found.with_context(|| format!("no {kind}"))
}

fn flip(path: &std::path::Path) -> anyhow::Result<()> {
    let mut bytes = fs::read(path)?;
    let half = bytes.len() / 2;
    bytes[half] ^= 1;
    Ok(fs::write(path, bytes)?)
}

/// Another store that knows the remote.
fn other(fixture: &Fixture, name: &str, init: &[&str]) -> anyhow::Result<Cli> {
    let cli = Cli::new(&fixture.dir.path().join(name));
    cli.ok(&[&["init"], init].concat())?;
    let url = format!("file://{}", bucket(fixture).display());
    cli.ok(&["remote", "add", "site", &url])?;
    Ok(cli)
}

#[test]
fn what_is_advised_about_damage_in_a_remote_mends_it() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    cli.ok(&["push", "base", "site"])?;
    for kind in ["heads", "packs"] {
        let other = other(&fixture, kind, &[])?;
        flip(&object(&fixture, kind)?)?;
        let error = other.fails(4, &["pull", "site/base"])?;
        ensure!(error.contains("--replace"), "{error}");
        let told = cli.json(&["push", "base", "site", "--replace"])?;
        ensure!(told["already"] == false, "{told}");
        other.ok(&["pull", "site/base"])?;
        let told = cli.json(&["push", "base", "site", "--replace"])?;
        ensure!(told["already"] == true, "{told}");
        cli.ok(&["remote", "gc", "site"])?;
    }
    let other = other(&fixture, "other", &[])?;
    flip(&object(&fixture, "refs/base")?)?;
    let error = other.fails(4, &["pull", "site/base"])?;
    ensure!(error.contains("--replace` writes this tag anew"), "{error}");
    cli.ok(&["push", "base", "site", "--replace"])?;
    other.ok(&["pull", "site/base"])?;
    Ok(())
}

/// Much is called `config`: that of a store, of ssh, of git.
#[test]
fn what_no_remote_wrote_is_not_made_one() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    let home = fixture.dir.path().join("home");
    fs::create_dir(&home)?;
    fs::write(home.join("config"), "precious=1")?;
    // What looks like a store is refused before that.
    let key = fixture.dir.path().join("key").display().to_string();
    cli.ok(&["remote", "key", &key])?;
    let mine = fixture.dir.path().join("mine");
    fs::create_dir(&mine)?;
    fs::copy(cli.store().join("config"), mine.join("config"))?;
    for (number, dir) in [&home, &mine].into_iter().enumerate() {
        let config = fs::read(dir.join("config"))?;
        let url = format!("file://{}", dir.display());
        for more in [&[][..], &["--key", &key]] {
            let name = format!("r{number}{}", more.len());
            cli.ok(&[&["remote", "add", &name, &url], more].concat())?;
            let output = cli.run(&["remote", "init", &name])?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(!output.status.success(), "{}: {output:?}", dir.display());
            ensure!(said.lines().count() == 1, "{said}");
            ensure!(
                fs::read(dir.join("config"))? == config,
                "{} has changed",
                dir.display()
            );
        }
    }
    cli.ok(&["tags"]).map(drop)
}

/// The directory is below a mount point where nothing is mounted, or is one.
#[test]
fn a_remote_that_is_not_mounted_does_not_answer() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    cli.ok(&["push", "base", "site"])?;
    let new = other(&fixture, "new", &[])?;
    // To have read it is to have used it.
    let reads = [
        "remote tags site",
        "remote verify site",
        "remote leases site",
        "remote gc site",
    ];
    let mut readers = Vec::new();
    for (number, command) in reads.into_iter().enumerate() {
        let reader = other(&fixture, &format!("reader{number}"), &[])?;
        reader.ok(&command.split(' ').collect::<Vec<_>>())?;
        readers.push(reader);
    }
    let away = fixture.dir.path().join("away");
    fs::rename(bucket(&fixture), &away)?;
    for is_made in [false, true] {
        if is_made {
            fs::create_dir(bucket(&fixture))?;
        }
        for command in ["push base site", "pull site/base", "remote tags site"] {
            let command: Vec<&str> = command.split(' ').collect();
            let error = cli.fails(6, &command)?;
            ensure!(error.contains("mounted?"), "{error}");
            ensure!(error.contains("remote add"), "{error}");
        }
        // There was a remote, so none is made.
        let error = cli.fails(6, &["remote", "init", "site"])?;
        ensure!(error.contains("mounted?"), "{error}");
        for reader in &readers {
            let error = reader.fails(6, &["remote", "init", "site"])?;
            ensure!(error.contains("mounted?"), "{error}");
        }
        // Who has not used it cannot know.
        let error = new.fails(6, &["remote", "tags", "site"])?;
        ensure!(
            error.contains("mounted?") && error.contains("remote init"),
            "{error}"
        );
        ensure!(fs::read_dir(bucket(&fixture)).is_ok() == is_made);
    }
    fs::remove_dir(bucket(&fixture))?;
    fs::rename(&away, bucket(&fixture))?;
    new.ok(&["pull", "site/base"])?;
    cli.ok(&["push", "base", "site"])?;
    // To begin anew.
    fs::remove_dir_all(bucket(&fixture))?;
    new.fails(6, &["remote", "init", "site"])?;
    let url = format!("file://{}", bucket(&fixture).display());
    cli.ok(&["remote", "add", "site", &url])?;
    cli.ok(&["remote", "init", "site"])?;
    cli.ok(&["push", "base", "site"])?;
    let listed = cli.json(&["remote", "list"])?;
    ensure!(
        listed["remotes"] == serde_json::json!([{"name": "site", "url": url}]),
        "{listed}"
    );
    Ok(())
}

#[test]
fn a_remote_whose_configuration_is_damaged_or_lost_is_made_whole_again() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    cli.ok(&["push", "base", "site"])?;
    let large = other(&fixture, "large", &["--page-size", "64K"])?;
    let config = bucket(&fixture).join("config");
    for is_lost in [false, true] {
        match is_lost {
            false => flip(&config)?,
            true => fs::remove_file(&config)?,
        }
        let code = if is_lost { 3 } else { 4 };
        for command in ["pull site/base", "remote verify site", "push base site"] {
            let command: Vec<&str> = command.split(' ').collect();
            let error = cli.fails(code, &command)?;
            ensure!(error.contains("remote init"), "{error}");
        }
        let error = large.fails(1, &["remote", "init", "site"])?;
        ensure!(error.contains("4096") && error.contains("65536"), "{error}");
        cli.ok(&["remote", "init", "site"])?;
        let name = format!("pulled-{is_lost}");
        cli.ok(&["pull", "site/base", "--as", &name])?;
        cli.fails(1, &["remote", "init", "site"])?;
    }
    Ok(())
}

#[test]
fn tags_of_a_remote_are_removed_all_or_those_that_are_told() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    let tags = ["base", "b", "c"];
    for tag in &tags[1..] {
        cli.ok(&["tag", "base", tag])?;
    }
    for tag in tags {
        cli.ok(&["push", tag, "site"])?;
    }
    let left = || cli.ok(&["remote", "tags", "site", "-o", "{tag}"]);
    let error = cli.fails(3, &["remote", "rm", "site", "base", "nope"])?;
    ensure!(error.contains("nope"), "{error}");
    ensure!(left()? == "b\nbase\nc\n", "{}", left()?);
    // Nothing comes after the last number that there is.
    let record = object(&fixture, "refs/b")?;
    let name = record.file_name().context("a name")?.to_string_lossy();
    let (_, rest) = name.split_once('-').context("a number")?;
    fs::rename(
        &record,
        record.with_file_name(format!("ffffffffffffffff-{rest}")),
    )?;
    let output = cli.run(&["remote", "rm", "site", "base", "b", "c", "--json"])?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(told == serde_json::json!({"removed": ["base"]}), "{told}");
    // This record is under another name than it was written.
    let output = cli.run(&["remote", "tags", "site", "-o", "{tag}"])?;
    ensure!(output.stdout == b"b\nc\n", "{output:?}");
    Ok(())
}

#[test]
fn a_server_is_reached_in_clear_only_with_leave() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let cli = fixture.cli.clone();
    let cli = cli.with_env("AWS_ACCESS_KEY_ID", "a");
    let cli = cli.with_env("AWS_SECRET_ACCESS_KEY", "b");
    let add = ["remote", "add", "x", "s3://bucket", "--endpoint"];
    let clear = [&add[..], &["http://127.0.0.1:1"]].concat();
    let error = cli.fails(2, &clear)?;
    ensure!(error.contains("--allow-http"), "{error}");
    let listed = cli.json(&["remote", "list"])?;
    ensure!(listed["remotes"] == serde_json::json!([]), "{listed}");
    cli.ok(&[&clear[..], &["--allow-http"]].concat())?;
    // One that an older program was told of.
    let path = fixture.path("store/remotes.json");
    let known = fs::read_to_string(&path)?;
    fs::write(
        &path,
        known.replace("\"allow_http\": true", "\"allow_http\": false"),
    )?;
    let error = cli.fails(2, &["remote", "tags", "x"])?;
    ensure!(error.contains("--allow-http"), "{error}");
    // Or that the environment names.
    fs::remove_file(&path)?;
    cli.ok(&add[..4])?;
    let cli = cli.with_env("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
    let error = cli.fails(2, &["remote", "tags", "x"])?;
    ensure!(error.contains("--allow-http"), "{error}");
    Ok(())
}

/// Each writes the whole list.
#[test]
fn remotes_that_are_added_at_once_are_all_known() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    std::thread::scope(|scope| {
        let add = |number: usize| {
            let cli = fixture.cli.clone();
            scope.spawn(move || {
                let (name, url) = (format!("site{number}"), format!("s3://bucket/{number}"));
                cli.ok(&["remote", "add", &name, &url]).map(|_| ())
            })
        };
        let threads: Vec<_> = (0..12).map(add).collect();
        let mut joined = threads.into_iter().map(|thread| thread.join());
        joined.try_for_each(|added| added.expect("no panic"))
    })?;
    let listed = fixture.cli.json(&["remote", "list"])?;
    let listed = listed["remotes"].as_array().map(Vec::len);
    ensure!(listed == Some(12), "{listed:?}");
    Ok(())
}

#[test]
fn lists_of_nothing_say_so_and_hints_are_whole_commands() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let cli = &fixture.cli;
    let said = cli.ok(&["remote", "list"])?;
    ensure!(said.contains("No remotes yet"), "{said}");
    let url = format!("file://{}", fixture.path("bucket"));
    std::fs::create_dir_all(fixture.path("bucket/lost+found"))?;
    cli.ok(&["remote", "add", "site", &url])?;
    let error = cli.fails(3, &["remote", "tags", "site"])?;
    ensure!(error.contains("`snapstore remote init NAME`"), "{error}");
    cli.ok(&["remote", "init", "site"])?;
    let said = cli.ok(&["remote", "leases", "site"])?;
    ensure!(said.contains("Nobody"), "{said}");
    let said = cli.ok(&["remote", "tags", "site"])?;
    ensure!(said.contains("No tags there yet"), "{said}");
    Ok(())
}

/// Of two leases that nothing can be read of, one is older than a day.
#[test]
fn damaged_leases_are_listed_beside_the_others_and_cleared_after_a_day() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    cli.ok(&["push", "base", "site"])?;
    let lease = |number: u32| format!("lease/{number:032x}/00000000");
    let write = |number: u32| -> anyhow::Result<fs::File> {
        let path = bucket(&fixture).join(lease(number));
        fs::create_dir_all(path.parent().context("a directory")?)?;
        fs::write(&path, b"nothing")?;
        Ok(fs::File::options().write(true).open(&path)?)
    };
    let two_days = std::time::Duration::from_secs(2 * 24 * 60 * 60);
    write(1)?.set_modified(std::time::SystemTime::now() - two_days)?;
    drop(write(2)?);
    for (command, left) in [(None, &[1, 2][..]), (Some("gc"), &[2])] {
        if let Some(command) = command {
            let error = cli.fails(4, &["remote", command, "site"])?;
            ensure!(error.contains(&lease(2)), "{error}");
        }
        let output = cli.run(&["remote", "leases", "site", "--json"])?;
        ensure!(output.status.code() == Some(4), "{:?}", output.status);
        let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let leases = told["leases"].as_array().context("leases")?;
        ensure!(leases.len() == left.len(), "{told}");
        for (one, number) in leases.iter().zip(left) {
            let problem = one["problem"].as_str().context("a problem")?;
            ensure!(problem.contains(&lease(*number)), "{told}");
            ensure!(
                one["kind"] == "unknown" && one["last_seen"].is_u64(),
                "{told}"
            );
        }
    }
    write(2)?.set_modified(std::time::SystemTime::now() - two_days)?;
    let told = cli.ok(&["remote", "gc", "site", "--dry-run"])?;
    ensure!(told.contains("would be given up"), "{told}");
    let told = cli.json(&["remote", "gc", "site"])?;
    ensure!(
        told["given_up"] == serde_json::json!([format!("{:032x}", 2)]),
        "{told}"
    );
    let told = cli.ok(&["remote", "leases", "site"])?;
    ensure!(told.contains("Nobody"), "{told}");
    Ok(())
}

/// All that stands in the bucket: paths and what is in them.
fn contents(dir: &std::path::Path, found: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
    for path in list(dir)? {
        match path.is_dir() {
            true => contents(&path, found)?,
            false => found.push((path.display().to_string(), fs::read(&path)?)),
        }
    }
    Ok(())
}

#[test]
fn an_encrypted_remote_works_as_another_one_and_tells_nothing() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let cli = &fixture.cli;
    let memory = noise(1, 1200 * PAGE);
    fixture.commit("the-base", &memory, &[])?;
    let url = format!("file://{}", bucket(&fixture).display());
    let key = fixture.path("key");
    let told = cli.ok(&["remote", "key", &key])?;
    ensure!(told.contains("copy"), "{told}");
    let text = fs::read(&key)?;
    let error = cli.fails(2, &["remote", "key", &key])?;
    ensure!(error.contains("exists"), "{error}");
    ensure!(fs::read(&key)? == text);
    cli.ok(&["remote", "add", "site", &url, "--key", &key])?;
    let told = cli.ok(&["remote", "init", "site"])?;
    ensure!(told.contains("encrypted"), "{told}");
    cli.ok(&["remote", "check", "site"])?;
    cli.ok(&["push", "the-base", "site"])?;
    let listed = cli.json(&["remote", "list"])?;
    ensure!(listed["remotes"][0]["key"] == key, "{listed}");
    ensure!(cli.ok(&["remote", "list"])?.contains("encrypted"));
    let known = fs::read_to_string(cli.store().join("remotes.json"))?;
    let digits = std::str::from_utf8(&text)?.trim().rsplit(' ').next();
    ensure!(!known.contains(digits.context("a key")?), "{known}");

    let mut found = Vec::new();
    contents(&bucket(&fixture), &mut found)?;
    ensure!(found.len() >= 4, "{} objects", found.len());
    for (path, bytes) in &found {
        ensure!(!path.contains("the-base"), "{path}");
        let has = |hidden: &[u8]| bytes.windows(hidden.len()).any(|it| it == hidden);
        ensure!(!has(b"the-base") && !has(b"memory"), "{path}");
        for page in memory.chunks(PAGE).step_by(100) {
            ensure!(!has(&page[..32]), "{path}");
        }
    }

    let other = other(&fixture, "other", &[])?;
    for command in ["remote tags site", "pull site/the-base", "remote init site"] {
        let command: Vec<&str> = command.split(' ').collect();
        let error = other.fails(2, &command)?;
        ensure!(error.contains("no key was given"), "{error}");
        ensure!(error.contains("remote add"), "{error}");
    }
    let wrong = fixture.path("wrong");
    other.ok(&["remote", "key", &wrong])?;
    other.ok(&["remote", "add", "site", &url, "--key", &wrong])?;
    let error = other.fails(2, &["pull", "site/the-base"])?;
    ensure!(
        error.contains("another key") && error.contains(&wrong),
        "{error}"
    );
    set_mode(&key, 0o644)?;
    let error = other.fails(2, &["remote", "add", "site", &url, "--key", &key])?;
    ensure!(error.contains(&format!("chmod 600 {key}")), "{error}");
    set_mode(&key, 0o600)?;
    other.ok(&["remote", "add", "site", &url, "--key", &key])?;
    other.ok(&["pull", "site/the-base"])?;
    other.ok(&["verify"])?;

    cli.ok(&["remote", "verify", "site", "--read-data"])?;
    flip(&object(&fixture, "packs")?)?;
    let told = cli.fails(4, &["remote", "verify", "site", "--read-data"])?;
    drop(told);
    cli.ok(&["push", "the-base", "site", "--replace"])?;
    cli.ok(&["remote", "verify", "site", "--read-data"])?;
    cli.ok(&["remote", "rm", "site", "the-base"])?;
    let told = cli.json(&["remote", "gc", "site"])?;
    ensure!(
        told["deleted"].as_array().is_some_and(|it| !it.is_empty()),
        "{told}"
    );
    ensure!(list(&bucket(&fixture).join("packs"))?.is_empty());

    // A key for a remote in clear.
    let clear = format!("file://{}", fixture.path("mnt/clear"));
    cli.ok(&["remote", "add", "clear", &clear])?;
    cli.ok(&["remote", "init", "clear"])?;
    cli.ok(&["remote", "add", "clear", &clear, "--key", &key])?;
    for command in ["push the-base clear", "remote init clear"] {
        let command: Vec<&str> = command.split(' ').collect();
        let error = cli.fails(2, &command)?;
        ensure!(error.contains("not encrypted"), "{error}");
    }
    Ok(())
}

fn set_mode(path: &str, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}
