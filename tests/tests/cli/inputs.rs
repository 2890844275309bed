//! What `commit` takes: whole images, diffs and attached files, together in one
//! snapshot, and inputs that are not what they seem.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use snapstore_store::Store;
use snapstore_tests::harness::{noise, skipped};

use crate::{Fixture, PAGE};

const PAGES: usize = 16;

/// A store that holds `base`: memory, the disk `root` and a state.
fn with_base() -> anyhow::Result<Fixture> {
    let fixture = Fixture::new()?;
    let disk = format!("root={}", fixture.file("disk", &noise(2, PAGES * PAGE))?);
    let state = fixture.file("state", b"the old state")?;
    let more = ["--disk", &disk, "--vmstate", &state];
    fixture.commit("base", &noise(1, PAGES * PAGE), &more)?;
    Ok(fixture)
}

/// The bytes of an image; `None` if the snapshot has none of this name.
fn image(fixture: &Fixture, tag: &str, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
    let store = Store::open(fixture.cli.store())?;
    let manifest = store.manifest(store.resolve(tag)?)?;
    let image = manifest.image(name);
    let bytes = image.map(|image| store.read_file_image(image, 1 << 30));
    Ok(bytes.transpose()?)
}

/// A diff of sixteen pages of which one is data.
fn diff(fixture: &Fixture, name: &str, page: u64, seed: u64) -> anyhow::Result<String> {
    let size_bytes = (PAGES * PAGE) as u64;
    fixture.sparse(name, size_bytes, &[(page, &noise(seed, PAGE))])
}

/// `bytes` with one page of other noise.
fn changed(mut bytes: Vec<u8>, page: usize, seed: u64) -> Vec<u8> {
    bytes[page * PAGE..(page + 1) * PAGE].copy_from_slice(&noise(seed, PAGE));
    bytes
}

#[test]
fn whole_images_and_diffs_go_together() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let memory_diff = diff(&fixture, "memory-diff", 3, 30)?;
    let disk_diff = format!("root={}", diff(&fixture, "disk-diff", 5, 50)?);
    // Holes of a whole disk are zeros.
    let disk = fixture.sparse("whole", (PAGES * PAGE) as u64, &[(1, &noise(9, PAGE))])?;
    let disk = format!("root={disk}");
    let memory = fixture.file("memory", &noise(11, PAGES * PAGE))?;
    let old_memory = || noise(1, PAGES * PAGE);
    let mut whole_disk = vec![0; PAGES * PAGE];
    whole_disk[PAGE..2 * PAGE].copy_from_slice(&noise(9, PAGE));
    let diffed_disk = changed(noise(2, PAGES * PAGE), 5, 50);
    for (tag, arguments, memory, disk) in [
        (
            "both-diffs",
            ["--memory-diff", &memory_diff, "--disk-diff", &disk_diff],
            changed(old_memory(), 3, 30),
            diffed_disk.clone(),
        ),
        (
            "memory-diff",
            ["--memory-diff", &memory_diff, "--disk", &disk],
            changed(old_memory(), 3, 30),
            whole_disk.clone(),
        ),
        (
            "disk-diff",
            ["--memory", &memory, "--disk-diff", &disk_diff],
            noise(11, PAGES * PAGE),
            diffed_disk,
        ),
        (
            "neither",
            ["--memory", &memory, "--disk", &disk],
            noise(11, PAGES * PAGE),
            whole_disk,
        ),
    ] {
        let commit = [&["commit", tag, "--parent", "base"], &arguments[..]].concat();
        fixture.cli.ok(&commit)?;
        assert!(image(&fixture, tag, "memory")? == Some(memory), "{tag}");
        assert!(image(&fixture, tag, "root")? == Some(disk), "{tag}");
    }
    Ok(())
}

#[test]
fn diffs_need_a_parent_that_has_the_image() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = diff(&fixture, "diff", 3, 30)?;
    let other = format!("data={path}");
    // A disk of the memory's name is no change of the memory.
    let memory = format!("memory={path}");
    for (option, value) in [("--memory-diff", &path), ("--disk-diff", &other)] {
        fixture.refused(2, "--parent", &["commit", "new", option, value])?;
    }
    for value in [&other, &memory] {
        let arguments = ["commit", "new", "--disk-diff", value, "--parent", "base"];
        fixture.refused(1, "needs a parent that has this image", &arguments)?;
    }
    let both = [
        "commit",
        "new",
        "--memory",
        &path,
        "--memory-diff",
        &path,
        "--parent",
        "base",
    ];
    fixture.refused(2, "cannot be used with", &both)
}

#[test]
fn a_diff_says_nothing_of_a_disk() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = diff(&fixture, "diff", 3, 30)?;
    let disk = format!("root={path}");
    let arguments = [
        "commit", "new", "--memory", &path, "--disk", &disk, "--diff", "--parent", "base",
    ];
    fixture.refused(2, "--disk-diff", &arguments)?;
    let alone = [
        "commit", "new", "--disk", &disk, "--diff", "--parent", "base",
    ];
    fixture.refused(2, "--disk-diff", &alone)
}

#[test]
fn a_diff_without_holes_is_refused_unless_all_of_it_is_meant() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let dense = fixture.file("dense", &noise(7, PAGES * PAGE))?;
    let disk = format!("root={dense}");
    for arguments in [
        ["--memory", &dense, "--diff"],
        ["--memory-diff", &dense, "--inherit"],
        ["--disk-diff", &disk, "--inherit"],
    ] {
        let commit = [&["commit", "new", "--parent", "base"], &arguments[..]].concat();
        fixture.refused(1, "has no holes", &commit)?;
        fixture
            .cli
            .ok(&[&commit[..], &["--dense-diff", "--replace"]].concat())?;
        let name = if arguments[0] == "--disk-diff" {
            "root"
        } else {
            "memory"
        };
        assert!(image(&fixture, "new", name)? == Some(noise(7, PAGES * PAGE)));
        fixture.cli.ok(&["rm", "new"])?;
    }
    let pointless = [
        "commit",
        "new",
        "--memory",
        &dense,
        "--dense-diff",
        "--parent",
        "base",
    ];
    fixture.refused(2, "none is given", &pointless)
}

#[test]
fn a_diff_among_huge_pages_is_refused() -> anyhow::Result<()> {
    const TEST: &str = "a_diff_among_huge_pages_is_refused";
    let fixture = with_base()?;
    let dir = fixture.path("huge");
    std::fs::create_dir(&dir)?;
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "huge=always,size=64M", "none", &dir])
        .output()?;
    if !mounted.status.success() {
        skipped(TEST, "no tmpfs with huge pages can be mounted");
        return Ok(());
    }
    let _mount = Unmounted(&dir);
    let size_bytes = 8 << 20;
    fixture.commit("large", &noise(1, size_bytes), &[])?;
    let page: (u64, &[u8]) = (1030, &noise(3, PAGE));
    let path = fixture.sparse("huge/diff", size_bytes as u64, &[page])?;
    let held = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path)?) * 512;
    if held <= PAGE as u64 {
        skipped(TEST, "the kernel took no huge page");
        return Ok(());
    }
    let commit = ["commit", "new", "--memory-diff", &path, "--parent", "large"];
    fixture.refused(1, "do not tell which pages changed", &commit)?;
    // A copy has lost what the holes did not tell; that is said.
    fixture.refused(1, "A copy has lost the same", &commit)
}

/// A mount that ends with the test.
struct Unmounted<'a>(&'a str);

impl Drop for Unmounted<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn what_is_the_parents_is_said() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = diff(&fixture, "diff", 3, 30)?;
    let commit = ["commit", "new", "--memory-diff", &path, "--parent", "base"];
    let text = fixture.cli.ok(&commit)?;
    ensure!(
        text.contains("disk root is inherited from base, unchanged"),
        "{text}"
    );
    ensure!(
        text.contains("not carried over from base: vmstate\n"),
        "{text}"
    );
    let value = fixture.cli.json(&[&commit[..], &["--replace"]].concat())?;
    assert_eq!(value["inherited"], serde_json::json!(["root"]));
    assert_eq!(value["left_out"], serde_json::json!(["vmstate"]));
    assert!(image(&fixture, "new", "root")? == Some(noise(2, PAGES * PAGE)));
    assert!(image(&fixture, "new", "vmstate")?.is_none());
    Ok(())
}

#[test]
fn what_is_left_out_is_said_and_can_be_carried_over() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let memory = fixture.file("memory", &noise(11, PAGES * PAGE))?;
    let commit = ["commit", "new", "--memory", &memory, "--parent", "base"];
    let text = fixture.cli.ok(&commit)?;
    ensure!(
        text.contains("not carried over from base: root, vmstate; --inherit"),
        "{text}"
    );
    assert!(image(&fixture, "new", "root")?.is_none());
    let again = [&commit[..], &["--replace", "--inherit"]].concat();
    let text = fixture.cli.ok(&again)?;
    ensure!(text.contains("disk root is inherited from base"), "{text}");
    assert!(image(&fixture, "new", "root")? == Some(noise(2, PAGES * PAGE)));
    assert!(image(&fixture, "new", "memory")? == Some(noise(11, PAGES * PAGE)));
    fixture.refused(
        2,
        "--parent",
        &["commit", "x", "--memory", &memory, "--inherit"],
    )
}

#[test]
fn a_new_state_alone_keeps_memory_and_disks() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let state = fixture.file("state", b"the new state")?;
    for option in ["--diff", "--inherit"] {
        let commit = [
            "commit",
            "new",
            "--vmstate",
            &state,
            option,
            "--parent",
            "base",
        ];
        let text = fixture.cli.ok(&commit)?;
        ensure!(text.contains("  memory is inherited from base"), "{text}");
        assert!(image(&fixture, "new", "memory")? == Some(noise(1, PAGES * PAGE)));
        assert!(image(&fixture, "new", "root")? == Some(noise(2, PAGES * PAGE)));
        assert_eq!(
            image(&fixture, "new", "vmstate")?,
            Some(b"the new state".to_vec())
        );
        fixture.cli.ok(&["rm", "new"])?;
    }
    Ok(())
}

#[test]
fn what_is_carried_over_has_a_file_name_of_its_own() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let path = fixture.file("any", b"any")?;
    let named = format!("root.img={path}");
    let commit = [
        "commit",
        "new",
        "--file",
        &named,
        "--inherit",
        "--parent",
        "base",
    ];
    fixture.refused(1, "the parent's \"root.img\" is carried over", &commit)
}

#[test]
fn attached_files_have_any_length_and_name() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let mut arguments = vec!["commit".to_owned(), "files".to_owned()];
    let lengths = [1, 511, 4095, 4096, 4097, 5000, 70_000];
    for length in lengths {
        let path = fixture.file("any", &noise(length as u64, length))?;
        let copy = format!("{path}.{length}");
        std::fs::copy(&path, &copy)?;
        arguments.extend(["--file".to_owned(), format!("f{length}.json={copy}")]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fixture.cli.ok(&arguments)?;
    for length in lengths {
        let bytes = image(&fixture, "files", &format!("f{length}.json"))?;
        assert!(bytes == Some(noise(length as u64, length)), "{length}");
    }
    fixture.cli.ok(&["verify", "--read-data"])?;
    let path = fixture.file("any", b"any")?;
    for name in ["manifest.json", "memory.bin", "vmstate", "a/b", ".."] {
        let named = format!("{name}={path}");
        let memory = fixture.file("memory", &noise(11, PAGES * PAGE))?;
        let commit = [
            "commit",
            "new",
            "--memory",
            &memory,
            "--vmstate",
            &path,
            "--file",
            &named,
        ];
        fixture.cli.fails(2, &commit).context(name)?;
    }
    Ok(())
}

#[test]
fn a_disk_is_as_long_as_it_has_sectors() -> anyhow::Result<()> {
    let fixture = with_base()?;
    for length in [512, 2048, PAGE + 512, 5 * PAGE - 512] {
        let bytes = noise(length as u64, length);
        let disk = format!("d={}", fixture.file("odd", &bytes)?);
        fixture
            .cli
            .ok(&["commit", "odd", "--disk", &disk, "--replace"])?;
        assert!(
            image(&fixture, "odd", "d")? == Some(bytes.clone()),
            "{length}"
        );
        let size = length as u64;
        let changes = fixture.sparse("odd-diff", size, &[])?;
        let file = std::fs::File::options().write(true).open(&changes)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], size - 512)?;
        let disk = format!("d={changes}");
        let commit = [
            "commit",
            "next",
            "--disk-diff",
            &disk,
            "--parent",
            "odd",
            "--replace",
            "--dense-diff",
        ];
        fixture.cli.ok(&commit)?;
        let mut expected = bytes;
        // The filesystem keeps blocks, of which the rest is zeros.
        let block = (length - 512) / PAGE * PAGE;
        expected[block..].fill(0);
        expected[length - 512..].fill(7);
        assert!(image(&fixture, "next", "d")? == Some(expected), "{length}");
    }
    fixture.cli.ok(&["verify", "--read-data"])?;
    let disk = format!("d={}", fixture.file("odd", &noise(1, 1000))?);
    fixture.refused(
        1,
        "nearest are 512 and 1024",
        &["commit", "no", "--disk", &disk],
    )
}

#[test]
fn a_path_can_have_any_bytes() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let name = OsStr::from_bytes(b"lat\xe9in,= x");
    let path = Path::new(&fixture.path("")).join(name);
    std::fs::write(&path, noise(4, PAGES * PAGE))?;
    let named = |name: &str| {
        let mut text = std::ffi::OsString::from(name);
        text.push("=");
        text.push(&path);
        text
    };
    let output = fixture
        .cli
        .command(&["commit", "odd"])?
        .arg("--memory")
        .arg(&path)
        .arg("--disk")
        .arg(named("d"))
        .arg("--file")
        .arg(named("f"))
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{error}");
    for name in ["memory", "d", "f"] {
        assert!(image(&fixture, "odd", name)? == Some(noise(4, PAGES * PAGE)));
    }
    Ok(())
}

#[test]
fn inputs_that_are_no_files_are_named_for_what_they_are() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let pipe = fixture.path("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status()?;
    ensure!(made.success(), "mkfifo(1)");
    let socket = fixture.path("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let directory = fixture.path("");
    let empty = fixture.file("empty", b"")?;
    for (path, says) in [
        (directory.as_str(), "but a directory"),
        (&pipe, "but a named pipe"),
        (&socket, "but a socket"),
        ("/dev/null", "but a device"),
        (&empty, "is empty; there is nothing to store"),
    ] {
        let named = format!("x={path}");
        for arguments in [
            ["--memory", path],
            ["--vmstate", path],
            ["--disk", &named],
            ["--file", &named],
        ] {
            fixture.refused(1, says, &[&["commit", "new"], &arguments[..]].concat())?;
        }
    }
    Ok(())
}

#[test]
fn more_labels_than_a_manifest_holds() -> anyhow::Result<()> {
    let fixture = with_base()?;
    let memory = fixture.file("memory", &noise(11, PAGES * PAGE))?;
    let mut arguments = vec!["commit".into(), "new".into(), "--memory".into(), memory];
    for number in 0..300 {
        arguments.push("--label".to_owned());
        arguments.push(format!("l{number}={}", "x".repeat(4000)));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fixture.refused(1, "its labels are longer than 512 KiB", &arguments)
}
