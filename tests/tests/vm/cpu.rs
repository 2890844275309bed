//! What guests are told of their CPU, and what snapshots need.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use snapstore_guests::TABLE;
use snapstore_tests::harness::skipped;
use snapstore_tests::vm::Lab;

/// Whether this host's KVM can keep features from a guest. One that only emulates cannot,
/// and says so.
fn can_limit(lab: &Lab, test: &str) -> Result<bool> {
    let kernel = lab.file("kernel", TABLE)?;
    let command = [
        "run", "probe", "--kernel", &kernel, "--mem", "16M", "--detach",
    ];
    let output = lab
        .cli
        .run(&[&command[..], &["--cpu", "x86-64"]].concat())?;
    if output.status.success() {
        lab.stop("probe")?;
        return Ok(true);
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{said}");
    ensure!(
        said.contains("KVM cannot keep CPU features from a guest (SSE3"),
        "{said}"
    );
    ensure!(lab.machines()?.is_empty(), "it left a machine");
    skipped(test, "this KVM cannot keep CPU features from a guest");
    Ok(false)
}

/// What a snapshot of a machine that was run with `--cpu` needs.
fn needs(lab: &Lab, cpu: &str) -> Result<Value> {
    lab.run("vm", TABLE, &["--cpu", cpu])?;
    lab.wait_for_steps("vm", 1)?;
    lab.commit(&tag(cpu), "vm")?;
    lab.stop("vm")?;
    let shown = lab.cli.json(&["show", &tag(cpu)])?;
    Ok(shown["machine"]["cpu"].clone())
}

fn tag(cpu: &str) -> String {
    cpu.replace(',', ":").replace('.', "_")
}

fn features(needs: &Value) -> Result<Vec<&str>> {
    let list = needs["features"].as_array().context("features")?;
    Ok(list.iter().filter_map(Value::as_str).collect())
}

#[test]
fn a_snapshot_needs_the_cpu_that_it_was_made_for() -> Result<()> {
    let test = "a_snapshot_needs_the_cpu_that_it_was_made_for";
    let Some(lab) = Lab::with_mounts(test)? else {
        return Ok(());
    };
    if !can_limit(&lab, test)? {
        return lab.finish();
    }
    let host = needs(&lab, "host")?;
    let level = host["level"].as_str().context("a level")?;
    let levels = ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"];
    let highest = levels.iter().position(|name| *name == level);
    for name in &levels[..=highest.context("an unknown level")?] {
        let needs = needs(&lab, name)?;
        ensure!(needs["level"] == **name, "{name}: {needs}");
        ensure!(features(&needs)?.is_empty(), "{name}: {needs}");
        ensure!(
            needs["feature_msrs"] == serde_json::json!([]),
            "{name}: {needs}"
        );
        ensure!(
            needs["address_bits"].as_u64() <= Some(39),
            "{name}: {needs}"
        );
        let shown = lab.cli.ok(&["show", &tag(name)])?;
        let vendor = needs["vendor"].as_str().context("a vendor")?;
        let line = format!("CPU        {vendor}, {name}\n");
        ensure!(shown.contains(&line), "{shown}");
        lab.restore(&tag(name), &["--name", "again"])?;
        lab.assert_goes_on("again", &tag(name))?;
        // What a restored machine commits needs no more.
        lab.commit("later", "again")?;
        lab.stop("again")?;
        let later = lab.cli.json(&["show", "later"])?;
        ensure!(later["machine"]["cpu"] == needs, "{name}: {later}");
        lab.cli.ok(&["rm", "later"])?;
    }
    // All that the host has beyond its level is offered one by one.
    for name in features(&host)?
        .into_iter()
        .filter(|name| *name == "AES" || *name == "SMEP")
    {
        let cpu = format!("x86-64,+{}", name.to_lowercase());
        let needs = needs(&lab, &cpu)?;
        ensure!(features(&needs)? == [name], "{cpu}: {needs}");
        let less = format!("host,-{name}");
        let needs = self::needs(&lab, &less)?;
        ensure!(!features(&needs)?.contains(&name), "{less}: {needs}");
    }
    lab.finish()
}

#[test]
fn a_cpu_that_cannot_be_is_refused() -> Result<()> {
    let Some(lab) = Lab::new("a_cpu_that_cannot_be_is_refused")? else {
        return Ok(());
    };
    let kernel = lab.file("kernel", TABLE)?;
    for (cpu, code, word) in [
        ("pentium", 2, "x86-64-v2"),
        ("x86-64-v2,+nonsense", 2, "nonsense"),
        ("x86-64-v2,aes", 2, "+FEATURE"),
        ("x86-64,+avx2", 2, "+AVX"),
        // No CPU that virtualises 64-bit guests today has it.
        ("host,+cmpccxadd,+3dnow,+ia64", 1, "lacks"),
        // Never offered.
        ("host,+vmx,+svm", 1, "lacks"),
    ] {
        let command = ["run", "vm", "--kernel", &kernel, "--mem", "16M", "--detach"];
        let said = lab
            .cli
            .fails(code, &[&command[..], &["--cpu", cpu]].concat())?;
        ensure!(said.contains(word), "{cpu}: {said}");
        ensure!(lab.machines()?.is_empty(), "{cpu} left a machine");
    }
    lab.assert_nothing_left()
}

/// A snapshot of a CPU that has more than this one: `show` tells what, and so does the
/// refusal to restore it.
#[test]
fn what_this_host_lacks_is_named() -> Result<()> {
    let Some(lab) = Lab::with_mounts("what_this_host_lacks_is_named")? else {
        return Ok(());
    };
    let host = needs(&lab, "host")?;
    let memory = lab.stored_all("host", "memory")?;
    let state = lab.stored_all("host", "vmstate")?;
    let mut state = snapstore_vmm::state::MachineState::decode(&state)?;
    for leaf in &mut state.vcpus[0].cpuid {
        if leaf.function == 0x8000_0001 {
            // 3DNOW and 3DNOWEXT.
            leaf.edx |= 3 << 30;
        }
    }
    let state = lab.file("state", &state.encode())?;
    let memory = lab.file("memory", &memory)?;
    lab.cli
        .ok(&["commit", "other", "--memory", &memory, "--vmstate", &state])?;
    let shown = lab.cli.json(&["show", "other"])?;
    let needs = &shown["machine"]["cpu"];
    let mut expected = features(&host)?;
    expected.extend(["3DNOWEXT", "3DNOW"]);
    let (mut found, level) = (features(needs)?, &needs["level"]);
    found.sort_unstable();
    expected.sort_unstable();
    ensure!(found == expected && *level == host["level"], "{needs}");
    let said = lab.cli.fails(1, &["restore", "other", "--detach"])?;
    ensure!(
        said.contains("lacks CPU features") && said.contains("3DNOWEXT, 3DNOW"),
        "{said}"
    );
    // A file of another monitor's is none of ours, and a damaged one is said to be so.
    let foreign = lab.file("foreign", b"of another monitor")?;
    lab.cli.ok(&[
        "commit",
        "foreign",
        "--memory",
        &memory,
        "--vmstate",
        &foreign,
    ])?;
    ensure!(lab.cli.json(&["show", "foreign"])?["machine"].is_null());
    let damaged = lab.file("damaged", b"SNAPVMST\x02\0\0\0")?;
    lab.cli.ok(&[
        "commit",
        "damaged",
        "--memory",
        &memory,
        "--vmstate",
        &damaged,
    ])?;
    let shown = lab.cli.ok(&["show", "damaged"])?;
    ensure!(
        shown.contains("CPU        not known: the machine state is cut short"),
        "{shown}"
    );
    lab.finish()
}
