//! What the files of a mount hold.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, names};

/// Ten pages of data, a long hole, one page of data, a short hole.
fn memory() -> Vec<u8> {
    let mut bytes = vec![0; 600 * PAGE];
    bytes[..10 * PAGE].copy_from_slice(&noise(1, 10 * PAGE));
    bytes[550 * PAGE..551 * PAGE].copy_from_slice(&noise(2, PAGE));
    bytes
}

/// `base`, with memory, a disk and a VM state of odd length, mounted on `mnt`.
fn mounted(test: &str) -> anyhow::Result<Option<Fixture>> {
    let Some(mut fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    let disk = format!("root={}", fixture.file("disk", &noise(3, 20 * PAGE))?);
    let state = fixture.file("state", &noise(4, 12_345))?;
    let more = ["--disk", &disk, "--vmstate", &state, "--label", "os=none"];
    fixture.commit("base", &memory(), &more)?;
    fixture.mount(Some("base"), "mnt")?;
    Ok(Some(fixture))
}

#[test]
fn files_are_what_was_committed() -> anyhow::Result<()> {
    let Some(fixture) = mounted("files_are_what_was_committed")? else {
        return Ok(());
    };
    let dir = fixture.path("mnt");
    assert_eq!(
        names(&dir)?,
        ["manifest.json", "memory.bin", "root.img", "vmstate"]
    );
    ensure!(fs::read(dir.join("memory.bin"))? == memory(), "memory.bin");
    ensure!(
        fs::read(dir.join("root.img"))? == noise(3, 20 * PAGE),
        "root.img"
    );
    ensure!(
        fs::read(dir.join("vmstate"))? == noise(4, 12_345),
        "vmstate"
    );
    Ok(())
}

#[test]
fn the_manifest_can_be_parsed() -> anyhow::Result<()> {
    let Some(fixture) = mounted("the_manifest_can_be_parsed")? else {
        return Ok(());
    };
    let text = fs::read_to_string(fixture.path("mnt/manifest.json"))?;
    let manifest: serde_json::Value = serde_json::from_str(&text)?;
    let shown = fixture.cli.json(&["show", "base"])?;
    assert_eq!(manifest["id"], shown["id"]);
    assert_eq!(manifest["first_tag"], "base");
    assert_eq!(manifest["labels"]["os"], "none");
    assert_eq!(manifest["images"], shown["manifest"]["images"]);
    Ok(())
}

#[test]
fn sizes_and_blocks() -> anyhow::Result<()> {
    let Some(fixture) = mounted("sizes_and_blocks")? else {
        return Ok(());
    };
    let stat = |name: &str| fs::metadata(fixture.path("mnt").join(name));
    let memory = stat("memory.bin")?;
    assert_eq!(memory.len(), 600 * PAGE as u64);
    assert_eq!(
        memory.blocks(),
        11 * PAGE as u64 / 512,
        "eleven pages are data"
    );
    assert_eq!(stat("root.img")?.blocks(), 20 * PAGE as u64 / 512);
    let state = stat("vmstate")?;
    assert_eq!(
        (state.len(), state.blocks()),
        (12_345, 12_345_u64.div_ceil(512))
    );
    assert_eq!(memory.mode() & 0o222, 0, "nobody may write");
    Ok(())
}

/// The runs of data of a file, as the kernel tells them.
fn extents(path: &Path) -> anyhow::Result<Vec<(u64, u64)>> {
    let file = File::open(path)?;
    let mut found = Vec::new();
    let mut position = 0;
    loop {
        let start = match seek(&file, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => return Ok(found),
            other => other?,
        };
        position = seek(&file, SeekFrom::Hole(start))?;
        found.push((start, position));
    }
}

#[test]
fn holes_are_where_zeros_are() -> anyhow::Result<()> {
    let Some(fixture) = mounted("holes_are_where_zeros_are")? else {
        return Ok(());
    };
    let page = PAGE as u64;
    let dir = fixture.path("mnt");
    let expected = [(0, 10 * page), (550 * page, 551 * page)];
    assert_eq!(extents(&dir.join("memory.bin"))?, expected);
    assert_eq!(extents(&dir.join("root.img"))?, [(0, 20 * page)]);
    assert_eq!(extents(&dir.join("vmstate"))?, [(0, 12_345)]);
    let file = File::open(dir.join("memory.bin"))?;
    assert_eq!(seek(&file, SeekFrom::Data(5))?, 5);
    assert_eq!(seek(&file, SeekFrom::Hole(11 * page + 7))?, 11 * page + 7);
    assert_eq!(seek(&file, SeekFrom::Data(11 * page))?, 550 * page);
    assert_eq!(seek(&file, SeekFrom::Data(551 * page)), Err(Errno::NXIO));
    Ok(())
}

#[test]
fn several_readers_at_once() -> anyhow::Result<()> {
    let Some(fixture) = mounted("several_readers_at_once")? else {
        return Ok(());
    };
    let (path, expected) = (fixture.path("mnt/memory.bin"), memory());
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8_usize)
            .map(|reader| {
                let (path, expected) = (&path, &expected);
                scope.spawn(move || -> anyhow::Result<()> {
                    let file = File::open(path)?;
                    for step in 0..40 {
                        let at = (reader * 7919 + step * 104_729) % (expected.len() - 9000);
                        let mut bytes = vec![0; 9000];
                        file.read_exact_at(&mut bytes, at as u64)?;
                        ensure!(bytes == expected[at..at + 9000], "at {at}");
                    }
                    Ok(())
                })
            })
            .collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().expect("no reader panics"))
    })
}

#[test]
fn another_process_can_map_a_file() -> anyhow::Result<()> {
    let Some(fixture) = mounted("another_process_can_map_a_file")? else {
        return Ok(());
    };
    // A child, so that a fault that is never answered cannot hang this process.
    let script = "import mmap,sys\n\
        f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n\
        sys.exit(0 if m[:]==open(sys.argv[2],'rb').read() else 1)";
    let mapped = fixture.path("mnt/memory.bin");
    let compare = Command::new("cmp")
        .arg(&mapped)
        .arg(fixture.path("memory"))
        .status();
    assert!(compare.context("cmp")?.success());
    let python = Command::new("python3")
        .args(["-c", script])
        .arg(&mapped)
        .arg(fixture.path("memory"))
        .status();
    match python {
        Ok(status) => assert!(status.success(), "{status}"),
        Err(error) => {
            snapstore_tests::harness::skipped("another_process_can_map_a_file", &error.to_string())
        }
    }
    Ok(())
}

#[test]
fn nothing_can_be_written() -> anyhow::Result<()> {
    let Some(fixture) = mounted("nothing_can_be_written")? else {
        return Ok(());
    };
    let dir = fixture.path("mnt");
    let refused = |result: std::io::Result<()>| {
        let kind = result.map_err(|error| error.kind());
        assert!(
            matches!(
                kind,
                Err(ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied)
            ),
            "{kind:?}"
        );
    };
    let file = dir.join("memory.bin");
    refused(OpenOptions::new().write(true).open(&file).map(drop));
    refused(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&file)
            .map(drop),
    );
    refused(File::create(dir.join("new")).map(drop));
    refused(fs::remove_file(&file));
    refused(fs::rename(&file, dir.join("other")));
    refused(fs::create_dir(dir.join("new")));
    refused(fs::set_permissions(
        &file,
        std::os::unix::fs::PermissionsExt::from_mode(0o666),
    ));
    Ok(())
}

#[test]
fn the_filesystem_has_a_size() -> anyhow::Result<()> {
    let Some(fixture) = mounted("the_filesystem_has_a_size")? else {
        return Ok(());
    };
    let here = rustix::fs::statvfs(fixture.path("mnt"))?;
    let disk = rustix::fs::statvfs(fixture.cli.store())?;
    let bytes = |fs: &rustix::fs::StatVfs| fs.f_blocks * fs.f_frsize;
    assert_eq!(bytes(&here) >> 20, bytes(&disk) >> 20);
    assert!(here.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    Ok(())
}

#[test]
fn a_damaged_page_is_an_error_and_the_others_are_not() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("a_damaged_page_is_an_error_and_the_others_are_not")?
    else {
        return Ok(());
    };
    let bytes = noise(1, 400 * PAGE);
    fixture.commit("base", &bytes, &[])?;
    let pack = fs::read_dir(fixture.path("store/packs"))?
        .next()
        .context("no pack")??
        .path();
    // Noise is stored as it is: page 200 can be found in the pack.
    let mut stored = fs::read(&pack)?;
    let wanted = &bytes[200 * PAGE..201 * PAGE];
    let at = stored.windows(PAGE).position(|window| window == wanted);
    stored[at.context("page 200 is not in the pack")? + 99] ^= 0x10;
    fs::write(&pack, stored)?;
    let (dir, _) = fixture.mount(Some("base"), "mnt")?;
    let file = File::open(dir.join("memory.bin"))?;
    let mut page = vec![0; PAGE];
    let error = file
        .read_exact_at(&mut page, 200 * PAGE as u64)
        .expect_err("damaged");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::IO));
    for number in (0..400).filter(|number| *number != 200) {
        file.read_exact_at(&mut page, number * PAGE as u64)
            .with_context(|| format!("page {number}"))?;
        let at = usize::try_from(number)? * PAGE;
        ensure!(page == bytes[at..at + PAGE], "page {number}");
    }
    Ok(())
}

#[test]
fn lengths_are_exact() -> anyhow::Result<()> {
    let Some(mut fixture) = Fixture::new("lengths_are_exact")? else {
        return Ok(());
    };
    let mut expected = Vec::new();
    let mut more = Vec::new();
    for length in [1, 511, 4095, 4097, 5000] {
        let bytes = noise(length as u64, length);
        let path = fixture.file(&format!("f{length}"), &bytes)?;
        more.extend(["--file".to_owned(), format!("f{length}.json={path}")]);
        expected.push((format!("f{length}.json"), bytes));
    }
    for length in [512, 3 * PAGE + 1536] {
        let bytes = noise(length as u64, length);
        let path = fixture.file(&format!("d{length}"), &bytes)?;
        more.extend(["--disk".to_owned(), format!("d{length}={path}")]);
        expected.push((format!("d{length}.img"), bytes));
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    fixture.commit("odd", &noise(1, PAGE), &more)?;
    let (dir, _) = fixture.mount(Some("odd"), "mnt")?;
    for (name, bytes) in expected {
        let path = dir.join(&name);
        assert_eq!(fs::metadata(&path)?.len(), bytes.len() as u64, "{name}");
        ensure!(fs::read(&path)? == bytes, "{name}");
        let file = File::open(&path)?;
        // Nothing is read past the end.
        assert_eq!(file.read_at(&mut [0; 16], bytes.len() as u64)?, 0, "{name}");
        assert_eq!(
            seek(&file, SeekFrom::Hole(0))?,
            bytes.len() as u64,
            "{name}"
        );
    }
    Ok(())
}
