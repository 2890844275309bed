//! Commits of doubles that are killed at each step of what they say to the monitor.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::noise;

use crate::{Fixture, PAGE, Process, double, http, set};

const MIB: usize = 1 << 20;

/// A monitor's double, and how it is spoken with.
struct Kind {
    name: &'static str,
    double: &'static str,
    socket: &'static str,
    state: &'static str,
    write: &'static str,
}

const FIRECRACKER: Kind = Kind {
    name: "firecracker",
    double: "firecracker",
    socket: "--api-sock",
    state: "/",
    write: "/test/write",
};

const CLOUD_HYPERVISOR: Kind = Kind {
    name: "cloud-hypervisor",
    double: "cloud_hypervisor",
    socket: "--api-socket",
    state: "/api/v1/vm.info",
    write: "/api/v1/test.write",
};

impl Kind {
    fn wait_until_it_runs(&self, socket: &str, step: u64) -> anyhow::Result<()> {
        let began = Instant::now();
        while !http(socket, "GET", self.state, &Value::Null)?.contains("Running") {
            ensure!(
                began.elapsed().as_secs() < 60,
                "the guest stands still after step {step}"
            );
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Ok(())
    }

    /// Kills a commit at each of its steps. After each the guest goes on, and the next commit
    /// has all that was written.
    fn kill_everywhere(
        &self,
        fixture: &Fixture,
        socket: &str,
        memory: &mut [u8],
        disk: &mut [u8],
    ) -> anyhow::Result<u64> {
        let option = format!("--{}", self.name);
        for step in 1.. {
            let page = usize::try_from(step)? % 60;
            let fill = u8::try_from(step % 251)? + 1;
            http(
                socket,
                "PUT",
                self.write,
                &json!({"page": page, "fill": fill}),
            )?;
            set(memory, page, fill);
            set(disk, page, fill);
            let cli = fixture.cli.clone();
            let cli = cli.with_env("SNAPSTORE_KILL_AT_MONITOR_STEP", &step.to_string());
            let output = cli.run(&["commit", "killed", &option, socket])?;
            if output.status.success() {
                fixture.cli.ok(&["rm", "killed"])?;
                return Ok(step - 1);
            }
            ensure!(output.status.code().is_none(), "it failed: {output:?}");
            self.wait_until_it_runs(socket, step)?;
            if fixture.cli.run(&["show", "killed"])?.status.success() {
                fixture.cli.ok(&["rm", "killed"])?;
            }
            fixture.cli.ok(&["commit", "whole", &option, socket])?;
            let store = fixture.cli.store();
            let store = snapstore_store::Store::open(store)?;
            let snapshot = store.snapshot("whole")?;
            for (image, wanted) in [("memory", &*memory), ("disk0", &*disk)] {
                let mut read = vec![0; wanted.len()];
                let reader = snapshot.image(image);
                let reader = reader.ok_or_else(|| anyhow::anyhow!("there is no {image}"))?;
                reader.read_at(&mut read, 0)?;
                ensure!(read == wanted, "another {image} after step {step}");
            }
            fixture.cli.ok(&["rm", "whole"])?;
        }
        unreachable!("steps come to an end")
    }

    fn try_all(&self, test: &str, config: &Value) -> anyhow::Result<()> {
        let Some(fixture) = Fixture::new(test)? else {
            return Ok(());
        };
        let Some(program) = double(&fixture, test, self.double, &[])? else {
            return Ok(());
        };
        let (mut memory, mut disk) = (vec![0; 4 * MIB], noise(3, 64 * PAGE));
        fs::write(fixture.path("root.img"), &disk)?;
        fs::write(fixture.path("config.json"), config.to_string())?;
        let socket = fixture.text("api.sock");
        let mut booted = Process::start(
            Command::new(&program)
                .args([self.socket, &socket, "--boot", "config.json"])
                .current_dir(fixture.dir.path()),
        )?;
        booted.wait_for_socket(Path::new(&socket))?;
        let killed = self.kill_everywhere(&fixture, &socket, &mut memory, &mut disk)?;
        ensure!(killed > 8, "it was killed at {killed} steps only");
        let option = format!("--{}", self.name);
        fixture.cli.ok(&["commit", "base", &option, &socket])?;
        let exec = program.display().to_string();
        let restore = ["restore", "base", "--with", self.name, "--exec", &exec];
        fixture.cli.ok(&restore)?;
        let clone = fixture.of_machine("base", "api.sock");
        let killed = self.kill_everywhere(&fixture, &clone, &mut memory, &mut disk)?;
        ensure!(killed > 8, "it was killed at {killed} steps only");
        Ok(())
    }
}

#[test]
fn a_commit_of_firecracker_may_be_killed_anywhere() -> anyhow::Result<()> {
    let config = json!({
        "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
        "drives": [{"drive_id": "root", "path_on_host": "root.img", "is_read_only": false}],
        "network-interfaces": [], "vsock": null,
    });
    FIRECRACKER.try_all("a_commit_of_firecracker_may_be_killed_anywhere", &config)
}

#[test]
fn a_commit_of_cloud_hypervisor_may_be_killed_anywhere() -> anyhow::Result<()> {
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 4 * MIB, "thp": true, "shared": false},
        "disks": [{"path": "root.img", "readonly": false, "id": "_disk0"}],
        "net": null, "serial": {"mode": "Tty"}, "console": {"mode": "Off"},
        "payload": {"kernel": "vmlinux"},
    });
    let test = "a_commit_of_cloud_hypervisor_may_be_killed_anywhere";
    CLOUD_HYPERVISOR.try_all(test, &config)
}

/// Who resumes the guest after a commit that was killed has the lock of its turn. The next commit
/// does not pause the guest before that is over: it would be let go on while it is read.
#[test]
fn a_commit_waits_until_nobody_resumes_the_guest_any_more() -> anyhow::Result<()> {
    let test = "a_commit_waits_until_nobody_resumes_the_guest_any_more";
    let Some(fixture) = Fixture::new(test)? else {
        return Ok(());
    };
    let Some(program) = double(&fixture, test, FIRECRACKER.double, &[])? else {
        return Ok(());
    };
    fs::write(fixture.path("root.img"), noise(3, 64 * PAGE))?;
    let config = json!({
        "machine-config": {"mem_size_mib": 4, "vcpu_count": 1, "track_dirty_pages": false},
        "drives": [{"drive_id": "root", "path_on_host": "root.img", "is_read_only": false}],
        "network-interfaces": [], "vsock": null,
    });
    fs::write(fixture.path("config.json"), config.to_string())?;
    let socket = fixture.text("api.sock");
    let mut booted = Process::start(
        Command::new(&program)
            .args([FIRECRACKER.socket, &socket, "--boot", "config.json"])
            .current_dir(fixture.dir.path()),
    )?;
    booted.wait_for_socket(Path::new(&socket))?;
    let commit = ["commit", "one", "--firecracker", &socket, "--replace"];
    fixture.cli.ok(&commit)?;
    let turns = fixture.path("run/monitors");
    ensure!(fs::read_dir(&turns)?.next().is_none(), "a lock is left");
    let found = fs::metadata(&socket)?;
    let path = turns.join(format!("{:x}-{:x}.lock", found.dev(), found.ino()));
    let held = fs::File::create(&path)?;
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive)?;
    let mut waiting = fixture.cli.command(&commit)?.spawn()?;
    let began = Instant::now();
    while began.elapsed().as_millis() < 700 {
        ensure!(waiting.try_wait()?.is_none(), "it did not wait");
        let state = http(&socket, "GET", FIRECRACKER.state, &Value::Null)?;
        ensure!(state.contains("Running"), "it is paused: {state}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop(held);
    ensure!(waiting.wait()?.success());
    ensure!(!path.exists(), "a lock is left");
    Ok(())
}
