//! `mount --layout`: a snapshot's files under the names that monitors look for.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, Process, double, http, set};

const MIB: usize = 1 << 20;

/// A view at a directory of its own, which is undone in the end.
struct View<'a> {
    fixture: &'a Fixture,
    dir: PathBuf,
}

impl<'a> View<'a> {
    fn new(fixture: &'a Fixture, name: &str, options: &[&str], tag: &str) -> anyhow::Result<Self> {
        let dir = fixture.path(name);
        fs::create_dir(&dir)?;
        let shown = dir.display().to_string();
        let all = [&["mount"], options, &[tag, &shown]].concat();
        fixture.cli.ok(&all)?;
        Ok(Self { fixture, dir })
    }

    fn names(&self, clone: &str) -> anyhow::Result<Vec<String>> {
        let entries = fs::read_dir(self.dir.join(clone))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<anyhow::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        let dir = self.dir.display().to_string();
        if let Err(error) = self.fixture.cli.ok(&["umount", "--lazy", &dir]) {
            println!("a mount is left: {error}");
        }
    }
}

/// A snapshot of files, as any monitor may have written them.
fn with_files(test: &str) -> anyhow::Result<Option<Fixture>> {
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(None);
    };
    fs::write(fixture.path("mem"), noise(1, 16 * PAGE))?;
    fs::write(fixture.path("disk"), noise(2, 8 * PAGE))?;
    fs::write(fixture.path("state"), b"as it was")?;
    let (memory, state) = (fixture.text("mem"), fixture.text("state"));
    let disk = format!("root={}", fixture.text("disk"));
    let of_all = ["--memory", &memory, "--vmstate", &state, "--disk", &disk];
    let commit = |tag: &str, more: &[&str]| fixture.cli.ok(&[&["commit", tag], more].concat());
    commit("base", &of_all)?;
    commit("stateless", &["--memory", &memory])?;
    commit("disks", &["--disk", &disk])?;
    let config = format!("config.json={}", fixture.text("state"));
    commit("configured", &[&of_all[..], &["--file", &config]].concat())?;
    for name in ["mem_file", "devices"] {
        let other = format!("{name}={}", fixture.text("disk"));
        commit(name, &[&of_all[..], &["--file", &other]].concat())?;
    }
    Ok(Some(fixture))
}

#[test]
fn each_layout_has_the_names_that_its_monitor_looks_for() -> anyhow::Result<()> {
    let test = "each_layout_has_the_names_that_its_monitor_looks_for";
    let Some(fixture) = with_files(test)? else {
        return Ok(());
    };
    let layouts: [(&str, &str, &str, &[&str]); 3] = [
        ("firecracker", "mem_file", "snapshot_file", &[]),
        (
            "cloud-hypervisor",
            "memory-ranges",
            "state.json",
            &["config.json"],
        ),
        ("qemu", "ram", "devices", &[]),
    ];
    for (layout, memory, state, more) in layouts {
        let tag = if more.is_empty() {
            "base"
        } else {
            "configured"
        };
        let view = View::new(&fixture, layout, &["--layout", layout], tag)?;
        let mut names = [&[memory, state, "root.img", "manifest.json"], more].concat();
        names.sort_unstable();
        assert_eq!(view.names("")?, names);
        assert_eq!(fs::read(view.dir.join(memory))?, noise(1, 16 * PAGE));
        assert_eq!(fs::read(view.dir.join(state))?, b"as it was");
        let usual = fs::metadata(view.dir.join("memory.bin"));
        assert!(usual.is_err(), "it has two names");
    }
    Ok(())
}

#[test]
fn what_a_layout_lacks_is_told_before_anything_is_mounted() -> anyhow::Result<()> {
    let test = "what_a_layout_lacks_is_told_before_anything_is_mounted";
    let Some(fixture) = with_files(test)? else {
        return Ok(());
    };
    let dir = fixture.path("mnt");
    fs::create_dir(&dir)?;
    let shown = dir.display().to_string();
    for (layout, tag, why) in [
        ("firecracker", "stateless", "no state"),
        ("firecracker", "disks", "no memory"),
        ("qemu", "stateless", "no state"),
        ("cloud-hypervisor", "base", "neither config.json"),
        (
            "firecracker",
            "mem_file",
            "its file mem_file is not its memory",
        ),
        ("qemu", "devices", "its file devices is not its state"),
        ("bhyve", "base", "cloud-hypervisor"),
    ] {
        for more in [&[][..], &["--rw"]] {
            let all = [&["mount", "--layout", layout], more, &[tag, &shown]].concat();
            let said = fixture.cli.fails(2, &all)?;
            assert!(said.contains(why), "{layout} of {tag}: {said}");
        }
    }
    let all_tags = ["mount", "--layout", "qemu", &shown];
    let said = fixture.cli.fails(2, &all_tags)?;
    assert!(said.contains("one snapshot"), "{said}");
    ensure!(fs::read_dir(&dir)?.next().is_none(), "something is mounted");
    Ok(())
}

#[test]
fn what_is_written_under_other_names_is_committed_under_the_usual_ones() -> anyhow::Result<()> {
    let test = "what_is_written_under_other_names_is_committed_under_the_usual_ones";
    let Some(fixture) = with_files(test)? else {
        return Ok(());
    };
    let overlays = fixture.text("overlays");
    fs::create_dir(&overlays)?;
    let rw = [
        "--rw",
        "-n",
        "2",
        "--overlay-dir",
        &overlays,
        "--layout",
        "firecracker",
    ];
    let view = View::new(&fixture, "vms", &rw, "base")?;
    assert_eq!(view.names("1")?, ["mem_file", "root.img", "snapshot_file"]);
    let clone = view.dir.join("1");
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(clone.join("mem_file"))?;
    memory.write_all_at(&[7; PAGE], 0)?;
    drop(memory);
    // As a monitor that writes its state into it.
    fs::write(clone.join("state.new"), b"as it is")?;
    fs::rename(clone.join("state.new"), clone.join("snapshot_file"))?;
    let refused = fs::write(clone.join("vmstate"), b"twice");
    assert!(refused.is_err(), "one file under two names");
    assert!(fs::metadata(clone.join("vmstate")).is_err());
    fixture
        .cli
        .ok(&["commit", "next", "--mount", &clone.display().to_string()])?;
    assert_eq!(fixture.shown("next", "vmstate")?, b"as it is");
    assert_eq!(fixture.shown("next", "memory.bin")?[..PAGE], [7; PAGE]);
    let other = fs::read(view.dir.join("0/snapshot_file"))?;
    assert_eq!(other, b"as it was");
    let shown = fixture.cli.json(&["show", "next"])?;
    assert!(!shown.to_string().contains("snapshot_file"), "{shown}");
    // What was not committed is found again under the same names.
    fs::write(clone.join("snapshot_file"), b"later")?;
    let dir = view.dir.display().to_string();
    fixture.cli.ok(&["umount", "--keep", &dir])?;
    fixture.cli.ok(&[
        "mount",
        "--rw",
        "--overlay-dir",
        &overlays,
        "--resume",
        &dir,
    ])?;
    assert_eq!(fs::read(clone.join("snapshot_file"))?, b"later");
    assert_eq!(view.names("0")?, ["mem_file", "root.img", "snapshot_file"]);
    Ok(())
}

/// A process of a monitor, with the clone's directory as its working directory.
fn start(program: &Path, option: &str, socket: &str, dir: &Path) -> anyhow::Result<Process> {
    let mut process = Process::start(
        Command::new(program)
            .args([option, socket])
            .current_dir(dir),
    )?;
    process.wait_for_socket(Path::new(socket))?;
    Ok(process)
}

#[test]
fn firecracker_goes_on_from_its_layout_and_no_disk_is_copied() -> anyhow::Result<()> {
    let test = "firecracker_goes_on_from_its_layout_and_no_disk_is_copied";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "firecracker", &[])? else {
        return Ok(());
    };
    fs::write(fixture.path("vm.img"), noise(3, 64 * PAGE))?;
    let config = json!({
        "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
        "drives": [{"drive_id": "root", "path_on_host": "./vm.img", "is_read_only": false}],
        "network-interfaces": [], "vsock": null,
    });
    fs::write(fixture.path("config.json"), config.to_string())?;
    let socket = fixture.text("api.sock");
    let mut booted = Process::start(
        Command::new(&program)
            .args(["--api-sock", &socket, "--boot", "config.json"])
            .current_dir(fixture.dir.path()),
    )?;
    booted.wait_for_socket(Path::new(&socket))?;
    let commit =
        |tag: &str, socket: &str| fixture.cli.json(&["commit", tag, "--firecracker", socket]);
    commit("t0", &socket)?;
    let overlays = fixture.text("overlays");
    fs::create_dir(&overlays)?;
    let rw = [
        "--rw",
        "-n",
        "2",
        "--overlay-dir",
        &overlays,
        "--layout",
        "firecracker",
    ];
    let view = View::new(&fixture, "vms", &rw, "t0")?;
    // The disk has the name that the state leads to.
    assert!(view.names("0")?.contains(&"vm.img".to_owned()));
    let mut parent = "t0".to_owned();
    let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
    let clone = fixture.text("clone.sock");
    let _process = start(&program, "--api-sock", &clone, &view.dir.join("0"))?;
    let load = json!({
        "snapshot_path": "snapshot_file",
        "mem_backend": {"backend_type": "File", "backend_path": "mem_file"},
        "resume_vm": true,
    });
    http(&clone, "PUT", "/snapshot/load", &load)?;
    for (layer, page) in [(1, 7), (2, 9)] {
        http(
            &clone,
            "PUT",
            "/test/write",
            &json!({"page": page, "fill": layer}),
        )?;
        set(&mut memory, page, layer);
        set(&mut disk, page, layer);
        let tag = format!("t{layer}");
        let answer = commit(&tag, &clone)?;
        // The process maps what t0 has, whatever was committed since.
        assert_eq!(answer["parent_tag"], "t0", "{answer}");
        ensure!(fixture.shown(&tag, "memory.bin")? == memory, "other memory");
        ensure!(fixture.shown(&tag, "disk0.img")? == disk, "another disk");
        parent = tag;
    }
    assert_eq!(fs::read(view.dir.join("1/vm.img"))?, noise(3, 64 * PAGE));
    // Machines that are restored by the store itself need the usual names.
    drop(view);
    let _layout = View::new(&fixture, "ro", &["--layout", "firecracker"], &parent)?;
    let exec = program.display().to_string();
    let restore = ["restore", &parent, "--with", "firecracker", "--exec", &exec];
    fixture.cli.ok(&restore)?;
    Ok(())
}

#[test]
fn cloud_hypervisor_goes_on_from_its_layout() -> anyhow::Result<()> {
    let test = "cloud_hypervisor_goes_on_from_its_layout";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, "cloud_hypervisor", &[])? else {
        return Ok(());
    };
    fs::write(fixture.path("vm.img"), noise(3, 64 * PAGE))?;
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 4 * MIB, "thp": true, "shared": false},
        "disks": [{"path": "vm.img", "readonly": false, "id": "_disk0"}],
        "net": null, "serial": {"mode": "Tty"}, "console": {"mode": "Off"},
        "payload": {"kernel": "vmlinux"},
    });
    fs::write(fixture.path("config.json"), config.to_string())?;
    let socket = fixture.text("api.sock");
    let mut booted = Process::start(
        Command::new(&program)
            .args(["--api-socket", &socket, "--boot", "config.json"])
            .current_dir(fixture.dir.path()),
    )?;
    booted.wait_for_socket(Path::new(&socket))?;
    let commit = |tag: &str, socket: &str| {
        fixture
            .cli
            .json(&["commit", tag, "--cloud-hypervisor", socket])
    };
    commit("t0", &socket)?;
    let overlays = fixture.text("overlays");
    fs::create_dir(&overlays)?;
    let layout = ["--overlay-dir", &overlays, "--layout", "cloud-hypervisor"];
    let rw = [&["--rw"], &layout[..]].concat();
    let view = View::new(&fixture, "vm", &rw, "t0")?;
    let config: Value = serde_json::from_slice(&fs::read(view.dir.join("config.json"))?)?;
    assert_eq!(config["memory"]["thp"], false, "{config}");
    let clone = fixture.text("clone.sock");
    let _process = start(&program, "--api-socket", &clone, &view.dir)?;
    let url = format!("file://{}", view.dir.display());
    let restore = json!({"source_url": url, "memory_restore_mode": "CopyOnWrite", "resume": true});
    http(&clone, "PUT", "/api/v1/vm.restore", &restore)?;
    http(
        &clone,
        "PUT",
        "/api/v1/test.write",
        &json!({"page": 7, "fill": 1}),
    )?;
    let answer = commit("t1", &clone)?;
    assert_eq!(answer["parent_tag"], "t0", "{answer}");
    let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
    set(&mut memory, 7, 1);
    set(&mut disk, 7, 1);
    ensure!(fixture.shown("t1", "memory.bin")? == memory, "other memory");
    ensure!(fixture.shown("t1", "disk0.img")? == disk, "another disk");
    // What the layout makes is in no commit, unless somebody writes to it.
    let dir = view.dir.display().to_string();
    fixture.cli.ok(&["commit", "t2", "--mount", &dir])?;
    let shown = fixture.cli.json(&["show", "t2"])?;
    assert!(!shown.to_string().contains("config.json"), "{shown}");
    fs::write(view.dir.join("config.json"), b"{}")?;
    fixture.cli.ok(&["commit", "t3", "--mount", &dir])?;
    assert_eq!(fixture.shown("t3", "config.json")?, b"{}");
    // A snapshot of another monitor's machine has no such layout.
    let said = fixture.cli.fails(
        2,
        &["mount", "--layout", "qemu", "t1", &fixture.text("run")],
    )?;
    assert!(said.contains("--layout cloud-hypervisor"), "{said}");
    Ok(())
}
