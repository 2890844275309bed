//! Remotes in directories: answers, exit codes, and what is advised.

use std::fs;

use anyhow::ensure;

use crate::Fixture;

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
