//! What a view does not have, and views that nobody went on with.

use std::fs;
use std::io::ErrorKind;

use serde_json::Value;

use super::{open_both, with_machine};
use crate::PAGE;

#[test]
fn a_view_has_no_other_directories() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("a_view_has_no_other_directories")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("views", &["-n", "2"])?;
    for made in [dir.join("2"), dir.join("0/logs")] {
        let error = fs::create_dir(&made).expect_err("a directory was made");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        // EPERM: it is not a question of rights (EACCES).
        assert_eq!(error.raw_os_error(), Some(1), "{error}");
    }
    let error = fs::remove_dir(dir.join("1")).expect_err("a clone was removed");
    assert_eq!(error.raw_os_error(), Some(1), "{error}");
    fixture.umount(&dir)
}

/// The same exit code however many are too many.
#[test]
fn more_files_than_a_snapshot_has_are_refused_and_stay() -> anyhow::Result<()> {
    let test = "more_files_than_a_snapshot_has_are_refused_and_stay";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    // Beside memory, disk and state.
    let make = |files: std::ops::Range<u32>| -> std::io::Result<()> {
        let mut files = files;
        files.try_for_each(|at| fs::write(dir.join(format!("f{at}")), "a file"))
    };
    make(0..253)?;
    fixture.commit_view("most", &dir)?;
    for files in [253..256, 256..300] {
        make(files)?;
        let said = fixture
            .cli
            .fails(1, &["commit", "more", "--mount", &shown])?;
        assert!(said.contains("more than 256 images and files"), "{said}");
    }
    for at in 253..300 {
        fs::remove_file(dir.join(format!("f{at}")))?;
    }
    fixture.commit_view("more", &dir)?;
    fixture.umount(&dir)
}

#[test]
fn an_overlay_that_can_hold_nothing_is_wrong_usage() -> anyhow::Result<()> {
    let Some(fixture) = with_machine("an_overlay_that_can_hold_nothing_is_wrong_usage")? else {
        return Ok(());
    };
    let dir = fixture.path("view");
    fs::create_dir(&dir)?;
    let shown = dir.display().to_string();
    for limit in ["0", "1K"] {
        let mount = ["mount", "--rw", "--overlay-limit", limit, "base", &shown];
        let said = fixture.cli.fails(2, &mount)?;
        assert!(said.contains("4K or more"), "{said}");
    }
    Ok(())
}

#[test]
fn a_view_that_is_kept_is_told_by_doctor_until_it_is_gone_on_with() -> anyhow::Result<()> {
    let test = "a_view_that_is_kept_is_told_by_doctor_until_it_is_gone_on_with";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    // Where views are kept unless somebody wants it otherwise, and `doctor` looks.
    let dir = fixture.mountpoint("view")?;
    let shown = dir.display().to_string();
    let is_told = || -> anyhow::Result<bool> {
        let output = fixture.cli.run(&["doctor", "--json"])?;
        let told: Value = serde_json::from_slice(&output.stdout)?;
        let checks = told["checks"].as_array().cloned().unwrap_or_default();
        let views = checks.iter().find(|check| check["name"] == "kept_views");
        Ok(views.is_some_and(|check| check["found"].to_string().contains(&shown)))
    };
    fixture.cli.ok(&["mount", "--rw", "base", &shown])?;
    open_both(&dir.join("memory.bin"))?.sync_all()?;
    std::os::unix::fs::FileExt::write_all_at(&open_both(&dir.join("memory.bin"))?, &[1; PAGE], 0)?;
    assert!(!is_told()?, "its server is there");
    fixture.cli.ok(&["umount", "--keep", &shown])?;
    assert!(is_told()?, "it is kept");
    fixture.cli.ok(&["mount", "--rw", "--resume", &shown])?;
    assert!(!is_told()?, "its server is there again");
    fixture.umount(&dir)?;
    assert!(!is_told()?, "it was given up");
    Ok(())
}
