//! Whether a mount is read lazily, as `show --mount` tells.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use serde_json::Value;
use snapstore_tests::harness::{noise, skipped};

use crate::{Fixture, PAGE};

/// Pages of the image: more than two huge pages.
const PAGES: usize = 4096;

/// Maps a file as a monitor does, with an advice, and touches a few pages of it.
const TOUCH: &str = "
import mmap, sys
file = open(sys.argv[1], 'rb')
memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
if sys.argv[2] == 'huge':
    memory.madvise(mmap.MADV_HUGEPAGE)
for page in map(int, sys.argv[3:]):
    memory[page * 4096]
";

fn touch(file: &Path, advice: &str, pages: [&str; 3]) -> anyhow::Result<()> {
    let mut python = Command::new("python3");
    let python = python.args(["-c", TOUCH]).arg(file).arg(advice);
    let status = python.args(pages).status()?;
    ensure!(status.success(), "python3 has failed");
    Ok(())
}

fn told(fixture: &Fixture, dir: &Path) -> anyhow::Result<Value> {
    fixture
        .cli
        .json(&["show", "--mount", &dir.display().to_string()])
}

fn of_memory(told: &Value, what: &str) -> u64 {
    let files = told["files"].as_array();
    let memory = files.and_then(|files| files.iter().find(|it| it["name"] == "memory.bin"));
    memory.and_then(|it| it[what].as_u64()).unwrap_or(u64::MAX)
}

#[test]
fn huge_pages_are_told_from_reading_lazily() -> anyhow::Result<()> {
    let test = "huge_pages_are_told_from_reading_lazily";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    if Command::new("python3").arg("--version").output().is_err() {
        skipped(test, "there is no python3 to map files");
        return Ok(());
    }
    fixture.commit("base", &noise(1, PAGES * PAGE), &[])?;
    let (dir, pid) = fixture.mount(Some("base"), "lazy")?;
    let memory = dir.join("memory.bin");
    touch(&memory, "none", ["3000", "40", "2000"])?;
    let lazy = told(&fixture, &dir)?;
    assert_eq!(lazy["reads_large"], false, "{lazy}");
    assert_eq!(lazy["counters"]["large_reads"], 0, "{lazy}");
    assert_eq!(lazy["counters"]["pid"], pid, "{lazy}");
    let size = (PAGES * PAGE) as u64;
    assert_eq!(of_memory(&lazy, "size_bytes"), size, "{lazy}");
    // Three faults, with what the kernel reads around each.
    let cached = of_memory(&lazy, "cached_bytes");
    assert!((3 * PAGE as u64..=64 << 10).contains(&cached), "{lazy}");
    let said = fixture
        .cli
        .ok(&["show", "--mount", &dir.display().to_string()])?;
    assert!(!said.contains("huge pages"), "{said}");

    touch(&memory, "huge", ["1000", "3500", "2500"])?;
    let huge = told(&fixture, &dir)?;
    if huge["counters"]["large_reads"] == 0 {
        skipped(test, "this kernel has no huge pages");
    } else {
        assert_eq!(huge["reads_large"], true, "{huge}");
        assert!(of_memory(&huge, "cached_bytes") >= 2 << 20, "{huge}");
        let said = fixture
            .cli
            .ok(&["show", "--mount", &dir.display().to_string()])?;
        assert!(said.contains("huge pages"), "{said}");
    }
    Ok(())
}

#[test]
fn a_file_that_is_read_from_end_to_end_is_not_read_lazily() -> anyhow::Result<()> {
    let test = "a_file_that_is_read_from_end_to_end_is_not_read_lazily";
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    fixture.commit("base", &noise(1, PAGES * PAGE), &[])?;
    let (dir, _) = fixture.mount(Some("base"), "whole")?;
    std::fs::read(dir.join("memory.bin"))?;
    let whole = told(&fixture, &dir)?;
    assert_eq!(whole["reads_large"], true, "{whole}");
    // The kernel may have given up some of it again.
    let cached = of_memory(&whole, "cached_bytes");
    assert!(cached > (PAGES * PAGE / 2) as u64, "{whole}");
    let nowhere = fixture.path("nowhere");
    std::fs::create_dir(&nowhere)?;
    let said = fixture
        .cli
        .fails(3, &["show", "--mount", &nowhere.display().to_string()])?;
    assert!(said.contains("in no mount"), "{said}");
    let deeper = nowhere.join("deeper").display().to_string();
    let said = fixture.cli.fails(3, &["show", "--mount", &deeper])?;
    assert!(said.contains("there is no directory"), "{said}");
    Ok(())
}
