//! That the doubles take nothing which the published descriptions of the monitors do not have.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::ensure;
use serde_json::{Value, json};
use snapstore_tests::harness::skipped;

/// `described.py` cannot read the description's language.
const NO_YAML: i32 = 77;

/// Compares a double with a description; `None` where there is no Python.
fn compare(double: &str, description: &Path) -> Option<Output> {
    let doubles = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/monitors/doubles");
    let mut command = Command::new("python3");
    command.arg("-B").arg(doubles.join("described.py"));
    command.arg(double).arg(description).output().ok()
}

/// The lines of a comparison that has ended as it should.
fn differences(double: &str, description: &Value) -> anyhow::Result<Option<Vec<String>>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("api.json");
    fs::write(&file, description.to_string())?;
    let Some(output) = compare(double, &file) else {
        return Ok(None);
    };
    let lines: Vec<_> = String::from_utf8(output.stdout)?
        .lines()
        .map(str::to_owned)
        .collect();
    let error = String::from_utf8_lossy(&output.stderr);
    let expected = i32::from(!lines.is_empty());
    ensure!(output.status.code() == Some(expected), "{error}");
    Ok(Some(lines))
}

#[test]
fn doubles_take_nothing_that_is_not_described() -> anyhow::Result<()> {
    for (double, variable) in [
        ("firecracker", "FIRECRACKER_API"),
        ("cloud_hypervisor", "CLOUD_HYPERVISOR_API"),
    ] {
        let test = format!("doubles_take_nothing_that_is_not_described::{double}");
        let Some(description) = std::env::var_os(variable) else {
            skipped(&test, &format!("{variable} names no description"));
            continue;
        };
        let Some(output) = compare(double, Path::new(&description)) else {
            skipped(&test, "there is no python3");
            continue;
        };
        let said = String::from_utf8_lossy(&output.stdout);
        if output.status.code() == Some(NO_YAML) {
            skipped(&test, said.trim());
            continue;
        }
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{double}: {said}{error}");
    }
    Ok(())
}

/// Of a monitor that has what the double of Cloud Hypervisor takes, and no more.
fn description() -> Value {
    let body = |name: &str| {
        let schema = json!({"$ref": format!("#/components/schemas/{name}")});
        json!({"put": {"requestBody": {"content": {"application/json": {"schema": schema}}}}})
    };
    json!({
        "paths": {
            "/vm.pause": {"put": {}},
            "/vm.resume": {"put": {}},
            "/vm.snapshot": body("Snapshot"),
            "/vm.restore": body("Restore"),
        },
        "components": {"schemas": {
            "Snapshot": {"type": "object", "properties": {"destination_url": {"type": "string"}}},
            "Restore": {
                "type": "object",
                "required": ["source_url"],
                "properties": {
                    "source_url": {"type": "string"},
                    "prefault": {"type": "boolean"},
                    "resume": {"type": "boolean"},
                    "memory_restore_mode": {"$ref": "#/components/schemas/Mode"},
                },
            },
            "Mode": {"type": "string", "enum": ["Copy", "OnDemand", "CopyOnWrite"]},
        }},
    })
}

#[test]
fn what_a_double_takes_too_much_is_found() -> anyhow::Result<()> {
    let Some(none) = differences("cloud_hypervisor", &description())? else {
        skipped(
            "what_a_double_takes_too_much_is_found",
            "there is no python3",
        );
        return Ok(());
    };
    ensure!(none.is_empty(), "{none:?}");
    let schemas = "/components/schemas";
    for (place, other, expected) in [
        (
            "/paths/~1vm.pause",
            json!({"get": {}}),
            "PUT /vm.pause is not described",
        ),
        (
            "/paths/~1vm.snapshot/put",
            json!({}),
            "has a body in one of the two alone",
        ),
        (
            "/Restore/properties/prefault",
            json!({"type": "string"}),
            "prefault is described as string",
        ),
        (
            "/Restore/properties",
            json!({"source_url": {"type": "string"}}),
            "resume is not described",
        ),
        (
            "/Restore/required",
            json!(["source_url", "resume"]),
            "resume is needed",
        ),
        (
            "/Mode/enum",
            json!(["Copy", "OnDemand"]),
            "never 'CopyOnWrite'",
        ),
        (
            "/Snapshot/properties/destination_url/enum",
            json!(["file"]),
            "taken as any",
        ),
        ("/Snapshot/type", json!("string"), "taken as an object"),
    ] {
        let mut changed = description();
        let place = match place.starts_with("/paths") {
            true => place.to_owned(),
            false => format!("{schemas}{place}"),
        };
        let (above, name) = place.rsplit_once('/').expect("a place is below another");
        let above = changed.pointer_mut(above).expect("it is there");
        above[name.replace("~1", "/")] = other;
        let found = differences("cloud_hypervisor", &changed)?.unwrap_or_default();
        ensure!(
            found.iter().any(|line| line.contains(expected)),
            "{place}: {found:?}"
        );
    }
    Ok(())
}
