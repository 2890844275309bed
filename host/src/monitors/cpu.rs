//! The host's CPU, as a label names it: guests of other monitors see much of it.

use std::fs;

/// What the kernel calls the CPU, without what a label cannot hold.
pub fn name() -> String {
    let table = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        table.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    };
    let parts = ["model name", "cpu family", "model", "stepping"].map(field);
    match parts {
        [Some(name), Some(family), Some(model), Some(stepping)] => {
            format!("{name} (family {family}, model {model}, stepping {stepping})")
        }
        _ => "unknown".to_owned(),
    }
}
