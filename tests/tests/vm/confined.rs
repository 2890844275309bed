//! What a machine's process may do, as the kernel tells of it from outside, and what
//! `ps` says of it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Signal, getrlimit};
use snapstore_guests::{SPIN, TABLE};
use snapstore_tests::harness::skipped;
use snapstore_tests::inherited::{has_nothing_of_its_caller, run_from_a_bad_caller};
use snapstore_tests::vm::{Lab, eventually, names, signal};
use snapstore_vmm::confine::{FIRST_UID, UIDS};

/// A lab, and whether root runs it.
fn lab(test: &str) -> Result<Option<(Lab, bool)>> {
    let lab = Lab::with_mounts(test)?;
    Ok(lab.map(|lab| (lab, rustix::process::geteuid().is_root())))
}

/// A lab of root's, or a line that says why not.
fn roots_lab(test: &str) -> Result<Option<Lab>> {
    Ok(match lab(test)? {
        Some((lab, true)) => Some(lab),
        Some((_, false)) => {
            skipped(test, "only root's machines become another user");
            None
        }
        None => None,
    })
}

fn field(status: &str, name: &str) -> Result<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line
        .and_then(|line| line.strip_prefix(':'))
        .context("no such field")?;
    Ok(value.trim().to_owned())
}

/// The `status` of each thread of a process.
fn threads(pid: u32) -> Result<Vec<String>> {
    let mut statuses = Vec::new();
    for thread in names(&PathBuf::from(format!("/proc/{pid}/task"))) {
        // That of a client that has left may be gone.
        let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
        statuses.extend(status);
    }
    Ok(statuses)
}

#[test]
fn every_thread_of_a_machine_is_confined() -> Result<()> {
    let Some((lab, as_root)) = lab("every_thread_of_a_machine_is_confined")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &["--cpus", "2"])?;
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    lab.restore("base", &["-n", "2"])?;
    lab.commit("other", "base.1")?;
    for name in ["base.1", "base.2"] {
        let threads = threads(lab.pid(name)?)?;
        // Two vCPUs, control, signals, the starter's word while it lasts, and the first.
        ensure!(threads.len() >= 5, "{threads:?}");
        for status in &threads {
            ensure!(field(status, "Seccomp")? == "2", "{status}");
            ensure!(field(status, "NoNewPrivs")? == "1", "{status}");
            if as_root {
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    ensure!(field(status, set)?.trim_matches('0').is_empty(), "{status}");
                }
                let uids = field(status, "Uid")?;
                let uids: BTreeSet<u32> = uids
                    .split_whitespace()
                    .map(str::parse)
                    .collect::<Result<_, _>>()?;
                let uid = *uids.first().context("no user")?;
                ensure!(uids.len() == 1, "{uids:?}");
                ensure!((FIRST_UID..FIRST_UID + UIDS).contains(&uid), "{uid}");
                ensure!(field(status, "Groups")?.is_empty(), "{status}");
            }
        }
    }
    lab.finish()
}

#[test]
fn a_machine_of_roots_sees_its_directory_only() -> Result<()> {
    let Some(lab) = roots_lab("a_machine_of_roots_sees_its_directory_only")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    lab.run("other", SPIN, &[])?;
    let (pid, other) = (lab.pid("web")?, lab.pid("other")?);
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        let seen = [of("self")?, of(&pid.to_string())?, of(&other.to_string())?];
        let different: BTreeSet<_> = seen.iter().collect();
        ensure!(different.len() == 3, "{namespace}: {seen:?}");
    }
    let root = names(&PathBuf::from(format!("/proc/{pid}/root/")));
    ensure!(root == names(&lab.vm_dir("web")), "{root:?}");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts"))?;
    ensure!(mounts.lines().count() == 1, "{mounts}");
    let options = mounts.split(' ').nth(3).context("no options")?;
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        ensure!(options.split(',').any(|it| it == option), "{mounts}");
    }
    let uid = |pid| field(&threads(pid)?[0], "Uid");
    ensure!(uid(pid)? != uid(other)?, "two machines are one user");
    lab.finish()
}

#[test]
fn limits_are_in_force() -> Result<()> {
    let Some((lab, _)) = lab("limits_are_in_force")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    let text = fs::read_to_string(format!("/proc/{}/limits", lab.pid("web")?))?;
    let limit = |resource: &str| {
        let line = text.lines().find(|line| line.starts_with(resource));
        let line = line.context("no such limit")?[resource.len()..].to_owned();
        let mut values = line.split_whitespace().map(ToOwned::to_owned);
        let both = (values.next(), values.next());
        ensure!(both.0 == both.1, "{resource}: {both:?}");
        both.0.context("no limit")
    };
    ensure!(limit("Max core file size")? == "0");
    ensure!(limit("Max file size")? == (64 << 20).to_string());
    let own = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    ensure!(limit("Max open files")? == own.min(4096).to_string());
    lab.finish()
}

/// What cannot be written is an error of whoever writes it.
#[test]
fn a_file_that_would_be_too_long_does_not_end_a_machine() -> Result<()> {
    let test = "a_file_that_would_be_too_long_does_not_end_a_machine";
    let Some((lab, _)) = lab(test)? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.wait_for_steps("web", 2)?;
    // Its last words do not fit into its log any more.
    let log = File::options()
        .write(true)
        .open(lab.vm_dir("web").join("log"))?;
    log.set_len(64 << 20)?;
    signal(lab.pid("web")?, Signal::TERM)?;
    // Of one that ended as it was told to nothing is left.
    lab.assert_nothing_left()?;
    lab.finish()
}

#[test]
fn what_is_in_force_is_told_and_can_be_given_up() -> Result<()> {
    let test = "what_is_in_force_is_told_and_can_be_given_up";
    let Some((lab, as_root)) = lab(test)? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    let told = lab.ps("web")?["confinement"].clone();
    ensure!(
        told["no_new_privs"] == true && told["seccomp"] == true,
        "{told}"
    );
    if as_root {
        ensure!(told["capabilities"] == "0", "{told}");
        ensure!(
            told["namespaces"].as_array().map(Vec::len) == Some(5),
            "{told}"
        );
        let uid = told["uid"].as_u64().context("no user")?;
        let real = field(&threads(lab.pid("web")?)?[0], "Uid")?;
        ensure!(
            real.split_whitespace().next() == Some(&uid.to_string()),
            "{told}"
        );
    }
    let text = lab.cli.ok(&["ps", "web"])?;
    ensure!(text.contains("Confined:    user "), "{text}");

    let kernel = lab.file("kernel", SPIN)?;
    let arguments = [
        "run",
        "bare",
        "--kernel",
        &kernel,
        "--mem",
        "16M",
        "-d",
        "--no-confine",
    ];
    let output = lab.cli.run(&arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.contains("not confined"),
        "{output:?}"
    );
    ensure!(lab.ps("bare")?["confinement"].is_null());
    let status = &threads(lab.pid("bare")?)?[0];
    ensure!(field(status, "Seccomp")? == "0", "{status}");
    let arguments = [
        "run", "said", "--kernel", &kernel, "--mem", "16M", "-d", "-v",
    ];
    let output = lab.cli.run(&arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("no new privileges"), "{output:?}");
    lab.finish()
}

/// As the kernel ends a process whose thread made a system call that its filter forbids.
#[test]
fn a_forbidden_system_call_is_told() -> Result<()> {
    let Some((lab, _)) = lab("a_forbidden_system_call_is_told")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    signal(lab.pid("web")?, Signal::SYS)?;
    let told = eventually("it is told", || {
        let reason = lab.wait_for_death("web")?;
        Ok(reason.contains("system call").then_some(reason))
    })?;
    ensure!(told.contains("forbidden"), "{told}");
    lab.stop("web")?;
    lab.finish()
}

/// Where a program and its heap lie.
fn layout(pid: u32) -> Result<Vec<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let lines = maps
        .lines()
        .filter(|line| line.ends_with("[heap]") || line.contains("snapstore"));
    Ok(lines
        .filter_map(|line| Some(line.split_once('-')?.0.to_owned()))
        .collect())
}

#[test]
fn clones_share_a_layout_only_if_they_are_asked_to() -> Result<()> {
    let test = "clones_share_a_layout_only_if_they_are_asked_to";
    let Some((lab, _)) = lab(test)? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    lab.commit("base", "web")?;
    lab.stop("web")?;
    for (more, shared) in [(&[][..], false), (&["--share-layout"][..], true)] {
        lab.restore("base", &[&["-n", "2"], more].concat())?;
        let pids = [lab.pid("base.1")?, lab.pid("base.2")?];
        let layouts = [layout(pids[0])?, layout(pids[1])?];
        ensure!(!layouts[0].is_empty(), "{layouts:?}");
        ensure!(
            (layouts[0] == layouts[1]) == shared,
            "{shared}: {layouts:?}"
        );
        ensure!(lab.ps("base.1")?["confinement"]["shares_layout"] == shared);
        // Confined all the same, and each with its own name to hold.
        for pid in pids {
            ensure!(field(&threads(pid)?[0], "Seccomp")? == "2");
        }
        lab.stop("base.1")?;
        ensure!(lab.machines()?.len() == 1, "{:?}", lab.machines()?);
        lab.commit(if shared { "shared" } else { "own" }, "base.2")?;
        lab.cli.ok(&["stop", "--all"])?;
    }
    lab.finish()
}

#[test]
fn a_machine_has_nothing_of_its_caller() -> Result<()> {
    let Some((lab, _)) = lab("a_machine_has_nothing_of_its_caller")? else {
        return Ok(());
    };
    let kernel = lab.file("kernel", SPIN)?;
    let file = lab.path("callers-file");
    let mut command = lab
        .cli
        .command(&["run", "web", "--kernel", &kernel, "--mem", "16M", "-d"])?;
    run_from_a_bad_caller(&mut command, &file)?;
    // The machine, and its supervisor.
    for (pid, _) in lab.processes()? {
        has_nothing_of_its_caller(pid, &file)?;
    }
    lab.finish()
}

/// A supervisor that is killed takes nothing with it, and what it leaves to do is done.
#[test]
fn machines_outlive_their_supervisor() -> Result<()> {
    let Some((lab, _)) = lab("machines_outlive_their_supervisor")? else {
        return Ok(());
    };
    lab.run("web", TABLE, &[])?;
    lab.run("dead", SPIN, &[])?;
    let machines = [lab.pid("web")?, lab.pid("dead")?];
    for (pid, _) in lab.processes()? {
        if !machines.contains(&pid) {
            signal(pid, Signal::KILL)?;
        }
    }
    lab.wait_for_steps("web", 2)?;
    lab.commit("base", "web")?;
    signal(machines[1], Signal::KILL)?;
    let reason = lab.wait_for_death("dead")?;
    ensure!(reason.contains("killed"), "{reason}");
    lab.stop("web")?;
    lab.stop("dead")?;
    ensure!(lab.machines()?.is_empty(), "{:?}", lab.machines()?);
    lab.finish()
}

/// Where a user may use /dev/kvm, its machines are confined without any right.
#[test]
fn a_users_machine_is_confined() -> Result<()> {
    let test = "a_users_machine_is_confined";
    let Some(lab) = roots_lab(test)? else {
        return Ok(());
    };
    let kernel = lab.file("kernel", TABLE)?;
    let runtime = lab.path("nobody");
    fs::create_dir(&runtime)?;
    std::os::unix::fs::chown(&runtime, Some(65534), Some(65534))?;
    fs::set_permissions(
        lab.path("."),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let mut snapstore = lab.cli.command(&[])?;
    let program = snapstore.get_program().to_owned();
    drop(std::mem::replace(&mut snapstore, Command::new("true")));
    // In a mount namespace in which anybody may open /dev/kvm.
    let script = r#"
        mkdir "$1/dev" && mount -t tmpfs none "$1/dev" && mknod -m 666 "$1/dev/kvm" c 10 232 &&
            mount --bind "$1/dev/kvm" /dev/kvm || exit 77
        export SNAPSTORE_RUNTIME_DIR="$1/run" HOME="$1"
        as() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
        as "$2" --version >&2 && as test -r "$3" || exit 77
        as "$2" run web --kernel "$3" --mem 16M -d >&2 || exit 1
        as "$2" ps web --json
        as "$2" init >&2 && as "$2" commit base --vm web >&2 && as "$2" commit next --vm web >&2 || exit 2
        cat /proc/"$(as "$2" ps web --json | sed 's/.*"pid":\([0-9]*\).*/\1/')"/status >&2
        as "$2" stop web >&2 && test -z "$(ls "$1/run/vms")" || exit 3
    "#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&runtime)
        .arg(&program)
        .arg(&kernel)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(77) {
        skipped(
            test,
            "nobody cannot run the program here, or there are no mounts",
        );
        return lab.finish();
    }
    ensure!(output.status.success(), "{:?}: {said}", output.status);
    let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let told = &told["confinement"];
    ensure!(
        told["seccomp"] == true && told["no_new_privs"] == true,
        "{told}"
    );
    ensure!(
        told["landlock"].is_string() && told["uid"] == 65534,
        "{told}"
    );
    ensure!(said.contains("Seccomp:\t2\n"), "{said}");
    lab.finish()
}

/// The group that `ps` names, if there is one.
fn group(lab: &Lab, name: &str) -> Result<Option<PathBuf>> {
    let told = lab.ps(name)?["confinement"].clone();
    let Some(group) = told["cgroup"].as_str() else {
        let lacks = told["cgroup_lacks"].as_str().context("no reason is told")?;
        skipped("a control group of a machine's own", lacks);
        return Ok(None);
    };
    Ok(Some(PathBuf::from(group)))
}

#[test]
fn a_machines_control_group_goes_whatever_happens() -> Result<()> {
    let Some((lab, _)) = lab("a_machines_control_group_goes_whatever_happens")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    let Some(web) = group(&lab, "web")? else {
        return lab.finish();
    };
    let pid = lab.pid("web")?.to_string();
    let inside = fs::read_to_string(web.join("cgroup.procs"))?;
    ensure!(inside.trim() == pid, "{pid} is not alone: {inside}");
    // It began there: whoever starts it makes its group.
    let starter = field(&threads(lab.pid("web")?)?[0], "PPid")?;
    ensure!(
        web.ends_with(format!("snapstore-web-{starter}")),
        "{}",
        web.display()
    );
    // In order; killed; killed without a supervisor, as `ps` finds it.
    lab.stop("web")?;
    eventually("the group goes with its machine", || {
        Ok((!web.exists()).then_some(()))
    })?;
    lab.run("web", SPIN, &[])?;
    let web = group(&lab, "web")?.context("no group any more")?;
    signal(lab.pid("web")?, Signal::KILL)?;
    eventually("the group goes with one that was killed", || {
        Ok((!web.exists()).then_some(()))
    })?;
    lab.cli.ok(&["stop", "web"])?;
    lab.run("web", SPIN, &[])?;
    let web = group(&lab, "web")?.context("no group any more")?;
    let pid = lab.pid("web")?;
    let status = &threads(pid)?[0];
    signal(field(status, "PPid")?.parse()?, Signal::KILL)?;
    signal(pid, Signal::KILL)?;
    eventually("the group goes with the next `ps`", || {
        lab.cli.ok(&["ps"])?;
        Ok((!web.exists()).then_some(()))
    })?;
    lab.finish()
}

#[test]
fn a_machine_that_does_not_start_leaves_no_control_group() -> Result<()> {
    let Some((lab, _)) = lab("a_machine_that_does_not_start_leaves_no_control_group")? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    let Some(web) = group(&lab, "web")? else {
        return lab.finish();
    };
    let parent = web.parent().context("a group has a parent")?;
    let kernel = lab.file("kernel", SPIN)?;
    let overlays = lab.file("no directory", b"")?;
    let disk = lab.file("disk", &[0; 4096])?;
    let output = lab.cli.run(&[
        "run",
        "bad",
        "--kernel",
        &kernel,
        "--mem",
        "16M",
        "-d",
        "--disk",
        &disk,
        "--overlay-dir",
        &overlays,
    ])?;
    ensure!(!output.status.success(), "{output:?}");
    let left = names(parent)
        .into_iter()
        .filter(|name| name.starts_with("snapstore-bad"));
    ensure!(left.count() == 0, "a group is left");
    lab.finish()
}

#[test]
fn a_control_group_bounds_memory_and_tasks() -> Result<()> {
    let test = "a_control_group_bounds_memory_and_tasks";
    let Some((lab, _)) = lab(test)? else {
        return Ok(());
    };
    lab.run("web", SPIN, &[])?;
    let told = lab.ps("web")?["confinement"].clone();
    if let Some(lacks) = told["cgroup_lacks"].as_str() {
        let text = lab.cli.ok(&["ps", "web"])?;
        ensure!(text.contains(lacks), "the user is not told: {text}");
        skipped(test, lacks);
        return lab.finish();
    }
    let group = PathBuf::from(told["cgroup"].as_str().context("no group")?);
    for (file, name) in [("memory.max", "memory_bytes"), ("pids.max", "group_tasks")] {
        let bound = fs::read_to_string(group.join(file))?;
        let bound: u64 = bound.trim().parse()?;
        ensure!(told["limits"][name] == bound, "{told}");
    }
    lab.finish()
}
