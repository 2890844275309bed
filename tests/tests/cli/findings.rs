//! What is said of findings beside the answer.

use crate::list;
use crate::remotes::with_remote;

/// Whatever becomes of the answer, standard error says why the exit code is not 0.
#[test]
fn what_was_found_is_said_on_standard_error_too() -> anyhow::Result<()> {
    let fixture = with_remote()?;
    let cli = &fixture.cli;
    let bucket = fixture.dir.path().join("mnt/bucket");
    cli.ok(&["push", "base", "site"])?;
    let refused = |code, says: &str, arguments: &[&str]| -> anyhow::Result<()> {
        for more in [&[][..], &["--json"]] {
            let all = [more, arguments].concat();
            let output = cli.run(&all)?;
            let said = String::from_utf8(output.stderr)?;
            anyhow::ensure!(output.status.code() == Some(code), "{all:?}: {said}");
            anyhow::ensure!(said == format!("error: {says}\n"), "{all:?}: {said}");
            anyhow::ensure!(!output.stdout.is_empty(), "{all:?} has no answer");
            if !more.is_empty() {
                serde_json::from_slice::<serde_json::Value>(&output.stdout)?;
            }
        }
        Ok(())
    };
    let cut = |path: &std::path::Path| std::fs::File::options().write(true).open(path)?.set_len(20);
    cut(&list(&bucket.join("refs/base"))?[0])?;
    refused(4, "1 damaged tag", &["remote", "tags", "site"])?;
    refused(4, "1 finding", &["remote", "verify", "site"])?;
    let lease = bucket.join(format!("lease/{}", "1".repeat(32)));
    std::fs::create_dir_all(&lease)?;
    std::fs::write(lease.join("00000000"), "nothing")?;
    refused(4, "1 damaged lease", &["remote", "leases", "site"])?;
    let output = cli.run(&["--json", "gc", "--max-store", "1K"])?;
    let said = String::from_utf8(output.stderr)?;
    anyhow::ensure!(output.status.code() == Some(1), "{said}");
    anyhow::ensure!(
        said.starts_with("error: ") && said.contains("too much"),
        "{said}"
    );
    // The second half of the only pack.
    let pack = &fixture.packs()?[0];
    let half = std::fs::metadata(pack)?.len() / 2;
    std::fs::File::options()
        .write(true)
        .open(pack)?
        .set_len(half)?;
    let output = cli.run(&["--json", "verify"])?;
    let said = String::from_utf8(output.stderr)?;
    anyhow::ensure!(output.status.code() == Some(4), "{said}");
    anyhow::ensure!(
        said.starts_with("error: ") && said.contains("of damage"),
        "{said}"
    );
    let output = cli.run(&["--json", "repair"])?;
    let said = String::from_utf8(output.stderr)?;
    anyhow::ensure!(output.status.code() == Some(4), "{said}");
    anyhow::ensure!(said == "error: 1 broken snapshot\n", "{said}");
    Ok(())
}
