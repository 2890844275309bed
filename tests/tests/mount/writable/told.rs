//! What `umount` says of what was written and is in no commit.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use snapstore_tests::shared_map::SharedMap;

use super::{PAGES, open_both, with_machine};
use crate::{Fixture, PAGE};

fn umount(fixture: &Fixture, options: &[&str], dir: &Path) -> anyhow::Result<String> {
    let shown = dir.display().to_string();
    fixture.cli.ok(&[&["umount"], options, &[&shown]].concat())
}

fn write(dir: &Path) -> anyhow::Result<()> {
    let file = open_both(&dir.join("memory.bin"))?;
    Ok(file.write_all_at(&[7; 3 * PAGE], 0)?)
}

/// The command that goes on with a view, as it is told.
fn again(fixture: &Fixture, dir: &Path) -> String {
    let overlays = fixture.path("overlays");
    format!(
        "`snapstore mount --rw --overlay-dir {} --resume {}`",
        overlays.display(),
        dir.display()
    )
}

#[test]
fn umount_tells_what_becomes_of_what_was_written() -> anyhow::Result<()> {
    let Some(mut fixture) = with_machine("umount_tells_what_becomes_of_what_was_written")? else {
        return Ok(());
    };
    let (dir, _) = fixture.mount_rw("view", &[])?;
    let shown = dir.display().to_string();
    umount(&fixture, &[], &dir)?;
    for options in [&[][..], &["--keep"], &["--lazy"]] {
        fixture.writable_on(&["base", &shown])?;
        let said = umount(&fixture, options, &dir)?;
        assert_eq!(
            said,
            format!("Unmounted {}.\n", dir.display()),
            "{options:?}"
        );
    }
    fixture.writable_on(&["base", &shown])?;
    let given_up = format!(
        "Unmounted {}. What was written and not committed is given up: ",
        dir.display()
    );
    write(&dir)?;
    let said = umount(&fixture, &[], &dir)?;
    assert_eq!(
        said,
        format!("{given_up}12.0 KiB of images. (--keep keeps it.)\n")
    );
    fixture.writable_on(&["base", &shown])?;
    fs::write(dir.join("note"), "noted")?;
    let said = umount(&fixture, &[], &dir)?;
    let files = "files that were written, made, renamed or removed there";
    assert_eq!(said, format!("{given_up}{files}. (--keep keeps it.)\n"));
    fixture.writable_on(&["base", &shown])?;
    write(&dir)?;
    let said = umount(&fixture, &["--keep"], &dir)?;
    let again = again(&fixture, &dir);
    assert!(
        said.contains("What was not committed is kept in "),
        "{said}"
    );
    assert!(
        said.ends_with(&format!(", on the disk; {again} goes on with it.\n")),
        "{said}"
    );
    // Goes on with it, commits it, and nothing is to be said any more.
    fixture.resume(&dir)?;
    fixture.commit_view("kept", &dir)?;
    let said = umount(&fixture, &["--keep"], &dir)?;
    assert_eq!(said, format!("Unmounted {}.\n", dir.display()));
    Ok(())
}

/// What was stored through a mapping is with the kernel alone until it is asked for it.
#[test]
fn umount_tells_of_stores_that_the_kernel_still_holds() -> anyhow::Result<()> {
    let test = "umount_tells_of_stores_that_the_kernel_still_holds";
    let Some(mut fixture) = with_machine(test)? else {
        return Ok(());
    };
    for (name, options, clone) in [("one", &[][..], ""), ("many", &["-n", "2"], "1")] {
        let (dir, _) = fixture.mount_rw(name, options)?;
        let file = open_both(&dir.join(clone).join("memory.bin"))?;
        let map = SharedMap::new(&file, PAGES * PAGE)?;
        // A file that is closed anywhere, as when a program is started, is written out.
        drop(file);
        map.store(5 * PAGE, b"stored");
        let said = umount(&fixture, &["--keep", "--lazy"], &dir)?;
        let kept = "What is not committed is kept in ";
        let last = " when the last process that uses it has ended; ";
        assert!(said.contains(kept) && said.contains(last), "{said}");
        assert!(said.contains(&again(&fixture, &dir)), "{said}");
        drop(map);
        is_kept(&fixture, &dir, clone)?;
    }
    Ok(())
}

/// Once its server has ended, the view can be gone on with, and has what was stored.
fn is_kept(fixture: &Fixture, dir: &Path, clone: &str) -> anyhow::Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while let Err(error) = fixture.resume(dir) {
        anyhow::ensure!(std::time::Instant::now() < deadline, "{error}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let memory = fs::read(dir.join(clone).join("memory.bin"))?;
    assert!(memory[5 * PAGE..].starts_with(b"stored"));
    umount(fixture, &[], dir).map(drop)
}
