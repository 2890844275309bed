//! QEMU, under its own emulator: it needs no rights but those to mount.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::skipped;

use crate::{Fixture, Process, ask};

/// QEMU, and what a guest is booted from.
struct Bed {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    root: PathBuf,
}

/// QEMU's program. `None`, and a line that says so, without one.
pub fn program(test: &str) -> Option<PathBuf> {
    let named = std::env::var_os("QEMU").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64"));
    let found = named.or_else(|| found.find(|path| path.is_file()));
    if found.is_none() {
        skipped(test, "there is no qemu-system-x86_64 in PATH");
    }
    found
}

impl Bed {
    fn find(test: &str) -> Option<Self> {
        let qemu = program(test)?;
        let bed = std::env::var_os("SNAPSTORE_BED").map(PathBuf::from);
        let Some(bed) = bed.filter(|bed| bed.join("guest/root.img").is_file()) else {
            skipped(
                test,
                "no Debian guest (SNAPSTORE_BED, see scripts/bed.sh prepare)",
            );
            return None;
        };
        Some(Self {
            qemu,
            kernel: bed.join("6.1/vmlinuz"),
            initrd: bed.join("6.1/initrd.gz"),
            root: bed.join("guest/root.img"),
        })
    }
}

fn fixture(test: &str) -> anyhow::Result<Option<(Fixture, Bed)>> {
    let Some(bed) = Bed::find(test) else {
        return Ok(None);
    };
    Ok(Fixture::new(test)?.map(|fixture| (fixture, bed)))
}

/// Boots a guest as anybody would: with no option for the sake of snapshots but the socket.
fn boot(fixture: &Fixture, bed: &Bed, more: &[&str]) -> anyhow::Result<Process> {
    let disk = fixture.path("root.img");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([&bed.root, &disk])
        .status()?;
    ensure!(copied.success(), "the disk cannot be copied");
    let mut process = Process::start(
        Command::new(&bed.qemu)
            .current_dir(fixture.dir.path())
            .args([
                "-nographic",
                "-nodefaults",
                "-machine",
                "q35",
                "-accel",
                "tcg",
            ])
            .args(["-cpu", "max", "-m", "192", "-name", "first", "-append"])
            .arg("console=ttyS0 idle=poll")
            .arg("-kernel")
            .arg(&bed.kernel)
            .arg("-initrd")
            .arg(&bed.initrd)
            .args(["-qmp", "unix:qmp.sock,server=on,wait=off"])
            .args(["-serial", "chardev:con", "-chardev"])
            .arg("socket,id=con,path=con.sock,server=on,wait=off,logfile=con.log")
            .args(["-drive", "file=root.img,format=raw,if=virtio"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null()),
    )?;
    let log = fixture.path("con.log");
    process.wait_for(&log, "guest ready")?;
    process.wait_for(&log, "guest# ")?;
    Ok(process)
}

impl Fixture {
    fn restore(&self, bed: &Bed, more: &[&str]) -> anyhow::Result<()> {
        let qemu = bed.qemu.to_str().context("no text")?;
        let arguments = [&["restore"], more, &["--with", "qemu", "--exec", qemu]].concat();
        self.cli.ok(&arguments).map(drop)
    }

    fn ask(&self, machine: &str, line: &str) -> anyhow::Result<String> {
        ask(&self.of_machine(machine, "con.sock"), line)
    }

    fn commit(&self, tag: &str, machine: &str) -> anyhow::Result<serde_json::Value> {
        let socket = self.of_machine(machine, "qmp.sock");
        self.cli.json(&["commit", tag, "--qmp", &socket])
    }

    /// The disk of a snapshot is whole, journal and all.
    fn check_disk(&self, tag: &str) -> anyhow::Result<()> {
        let dir = self.path(&format!("{tag}.mnt"));
        fs::create_dir(&dir)?;
        self.cli.ok(&["mount", tag, &dir.display().to_string()])?;
        let copy = self.path("checked.img");
        fs::copy(dir.join("disk0.img"), &copy)?;
        self.cli.ok(&["umount", &dir.display().to_string()])?;
        // The first run replays the journal, the second finds nothing.
        Command::new("e2fsck").args(["-fy"]).arg(&copy).output()?;
        let checked = Command::new("e2fsck").args(["-fn"]).arg(&copy).output()?;
        ensure!(
            checked.status.success(),
            "the disk of {tag} is not whole: {}",
            String::from_utf8_lossy(&checked.stdout)
        );
        Ok(())
    }
}

fn changed_pages(answer: &serde_json::Value, image: &str) -> u64 {
    let images = answer["images"].as_array();
    let found = images.and_then(|images| images.iter().find(|it| it["name"] == image));
    found
        .and_then(|image| image["changed_pages"].as_u64())
        .unwrap_or(u64::MAX)
}

#[test]
fn a_guest_of_qemu_goes_on_in_three_layers_and_ten_clones() -> anyhow::Result<()> {
    let test = "a_guest_of_qemu_goes_on_in_three_layers_and_ten_clones";
    let Some((fixture, bed)) = fixture(test)? else {
        return Ok(());
    };
    let first = boot(&fixture, &bed, &["-device", "virtio-rng-pci"])?;
    let console = fixture.text("con.sock");
    // The kernel's messages would come between the answers.
    ask(&console, "dmesg -n 1")?;
    ask(&console, "word=layer0; echo disk0 > /root/zero; sync")?;
    let base = fixture
        .cli
        .json(&["commit", "l0", "--qmp", &fixture.text("qmp.sock")])?;
    assert!(base["pause_seconds"].as_f64() > Some(0.0), "{base}");
    // It goes on, and what it does now is in no clone.
    ask(&console, "word=later; echo later > /root/zero; sync")?;
    for layer in 1..=2 {
        let (from, tag) = (format!("l{}", layer - 1), format!("l{layer}"));
        fixture.restore(&bed, &[&from, "--name", "m"])?;
        let said = fixture.ask("m", "echo $word; cat /root/zero")?;
        assert_eq!(said, format!("layer{}\ndisk0\n", layer - 1));
        fixture.ask(
            "m",
            &format!("word=layer{layer}; echo x > /root/layer{layer}; sync"),
        )?;
        let answer = fixture.commit(&tag, "m")?;
        assert_eq!(answer["parent_tag"], from.as_str(), "{answer}");
        // Only what was written.
        assert!(changed_pages(&answer, "memory") < 8000, "{answer}");
        assert!(changed_pages(&answer, "disk0") < 800, "{answer}");
        fixture.ask("m", "word=after; rm /root/layer*; sync")?;
        fixture.cli.ok(&["stop", "m"])?;
        fixture.check_disk(&tag)?;
    }
    drop(first);
    fs::remove_file(fixture.path("root.img"))?;
    fixture.restore(&bed, &["l2", "-n", "10"])?;
    let machines: Vec<String> = (1..=10).map(|number| format!("l2.{number}")).collect();
    for (number, machine) in machines.iter().enumerate() {
        let said = fixture.ask(machine, "echo $word; cd /root; ls -1; cat zero")?;
        assert_eq!(said, "layer2\nlayer1\nlayer2\nzero\ndisk0\n", "{machine}");
        let own = format!("word=own{number}; echo $word > /root/own; sync");
        fixture.ask(machine, &own)?;
    }
    for (number, machine) in machines.iter().enumerate() {
        let said = fixture.ask(
            machine,
            "echo 3 > /proc/sys/vm/drop_caches; echo $word; cat /root/own",
        )?;
        assert_eq!(said, format!("own{number}\nown{number}\n"), "{machine}");
    }
    let listed = fixture.cli.json(&["ps"])?;
    assert_eq!(
        listed["machines"].as_array().map(Vec::len),
        Some(10),
        "{listed}"
    );
    // A collection leaves what they use, though no tag names it any more.
    fixture.cli.ok(&["rm", "l0", "l1", "l2"])?;
    fixture.cli.ok(&["gc"])?;
    let said = fixture.ask(
        "l2.3",
        "find /usr -type f | head -500 | xargs cat | wc -c | grep -c .",
    )?;
    assert_eq!(said, "1\n");
    fixture.commit("kept", "l2.3")?;
    fixture.cli.ok(&["stop", "--all"])?;
    let listed = fixture.cli.json(&["ps"])?;
    assert_eq!(
        listed["machines"].as_array().map(Vec::len),
        Some(0),
        "{listed}"
    );
    fixture.restore(&bed, &["kept"])?;
    assert_eq!(fixture.ask("kept", "echo $word")?, "own2\n");
    fixture.cli.ok(&["verify"])?;
    Ok(())
}

/// Whether QEMU at this socket says that its guest runs.
fn runs(socket: &str) -> anyhow::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-status\"}\n")?;
    let mut lines = BufReader::new(stream).lines();
    loop {
        let line = lines.next().context("QEMU said nothing")??;
        let said: serde_json::Value = serde_json::from_str(&line)?;
        if let Some(runs) = said["return"]["running"].as_bool() {
            return Ok(runs);
        }
    }
}

/// Kills a commit of `one` at its first step, then at the next one, until it gets through.
/// After each the guest goes on. Returns how many steps there are.
fn killed_everywhere(fixture: &Fixture, variable: &str, socket: &str) -> anyhow::Result<u64> {
    for step in 1.. {
        let cli = fixture.cli.clone();
        let cli = cli.with_env(variable, &step.to_string());
        let output = cli.run(&["commit", "one", "--qmp", socket])?;
        if output.status.success() {
            return Ok(step - 1);
        }
        ensure!(output.status.code().is_none(), "it failed: {output:?}");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !runs(socket)? {
            ensure!(
                Instant::now() < deadline,
                "the guest stands still after step {step}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        // A tag that is there was set by a commit that was durable.
        if fixture.cli.run(&["show", "one"])?.status.success() {
            fixture.cli.ok(&["rm", "one"])?;
        }
    }
    unreachable!("steps come to an end")
}

#[test]
fn a_commit_that_is_killed_leaves_the_guest_running() -> anyhow::Result<()> {
    let test = "a_commit_that_is_killed_leaves_the_guest_running";
    let Some((fixture, bed)) = fixture(test)? else {
        return Ok(());
    };
    let _first = boot(&fixture, &bed, &[])?;
    let socket = fixture.text("qmp.sock");
    let console = fixture.text("con.sock");
    ask(&console, "dmesg -n 1; word=here")?;
    // A raw disk is stored while the guest stands still: so all of these are in the pause.
    let killed = killed_everywhere(&fixture, "SNAPSTORE_KILL_AT_STEP", &socket)?;
    ensure!(killed > 3, "it was killed at {killed} steps only");
    // With every command that QEMU is sent, and before every answer.
    fixture.cli.ok(&["rm", "one"])?;
    let killed = killed_everywhere(&fixture, "SNAPSTORE_KILL_AT_MONITOR_STEP", &socket)?;
    ensure!(killed > 20, "it was killed at {killed} steps only");
    // One that was paused before stays so.
    let mut stream = UnixStream::connect(&socket)?;
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"stop\"}\n")?;
    let mut lines = BufReader::new(stream).lines();
    while !lines.next().context("QEMU said nothing")??.contains("STOP") {}
    drop(lines);
    fixture.cli.ok(&["commit", "two", "--qmp", &socket])?;
    ensure!(!runs(&socket)?, "it was not ours to resume");
    for tag in ["one", "two"] {
        fixture.restore(&bed, &[tag])?;
        assert_eq!(fixture.ask(tag, "echo $word")?, "here\n");
    }
    Ok(())
}

#[test]
fn a_chain_of_a_guest_of_qemu_comes_to_depth_ten() -> anyhow::Result<()> {
    let test = "a_chain_of_a_guest_of_qemu_comes_to_depth_ten";
    let Some((fixture, bed)) = fixture(test)? else {
        return Ok(());
    };
    let first = boot(&fixture, &bed, &[])?;
    let console = fixture.text("con.sock");
    ask(&console, "dmesg -n 1; word=0; echo 0 > /root/layers; sync")?;
    let socket = fixture.text("qmp.sock");
    fixture.cli.ok(&["commit", "c0", "--qmp", &socket])?;
    drop(first);
    fs::remove_file(fixture.path("root.img"))?;
    for layer in 1..=10 {
        let (from, tag) = (format!("c{}", layer - 1), format!("c{layer}"));
        fixture.restore(&bed, &[&from, "--name", "m"])?;
        let said = fixture.ask("m", "echo $word; tail -1 /root/layers")?;
        assert_eq!(said, format!("{0}\n{0}\n", layer - 1));
        let write = format!("word={layer}; echo $word >> /root/layers; sync");
        fixture.ask("m", &write)?;
        let answer = fixture.commit(&tag, "m")?;
        assert_eq!(answer["parent_tag"], from.as_str(), "{answer}");
        fixture.cli.ok(&["stop", "m"])?;
    }
    // Each is complete in itself.
    let all: Vec<String> = (0..10).map(|layer| format!("c{layer}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    fixture.cli.ok(&[&["rm"], &all[..]].concat())?;
    fixture.cli.ok(&["gc"])?;
    fixture.check_disk("c10")?;
    fixture.restore(&bed, &["c10", "--name", "last"])?;
    let said = fixture.ask("last", "echo $word; tr '\\n' ' ' < /root/layers; echo")?;
    assert_eq!(said, "10\n0 1 2 3 4 5 6 7 8 9 10 \n");
    fixture.cli.ok(&["verify"])?;
    Ok(())
}
