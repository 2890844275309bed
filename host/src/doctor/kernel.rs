//! What the kernel can do, and how it is set.

use super::check::{Check, chosen, number, read};

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![version()];
    checks.extend(tracing_of_processes());
    checks.extend(seccomp());
    checks.push(landlock());
    checks.extend(userfaultfd());
    checks.extend(merging());
    checks.extend(huge_pages());
    checks.extend(overcommit());
    checks.extend(clock());
    checks.push(control_groups());
    checks
}

/// The first Linux with `ioctl(PAGEMAP_SCAN)`.
const PAGEMAP_SCAN: (u32, u32) = (6, 7);

fn version() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    match major_minor(&release) {
        Some(version) if version >= PAGEMAP_SCAN => Check::ok(
            "kernel",
            format!("Linux {release} lists changed pages by PAGEMAP_SCAN"),
        ),
        _ => Check::warning(
            "kernel",
            format!("Linux {release} has no PAGEMAP_SCAN"),
            "a commit of a machine reads 8 bytes for each page of its memory while it is paused",
            "use Linux 6.7 or newer",
        ),
    }
}

fn major_minor(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Yama's scope (Documentation/admin-guide/LSM/Yama.rst).
fn tracing_of_processes() -> Option<Check> {
    const PATH: &str = "/proc/sys/kernel/yama/ptrace_scope";
    let scope = number(PATH)?;
    Some(match scope {
        0 | 1 => Check::ok(
            "ptrace_scope",
            format!("{scope}: frozen memory can be read"),
        ),
        _ => Check::warning(
            "ptrace_scope",
            format!("{scope}: no process may read the memory of another"),
            "only root can commit machines",
            "`sysctl kernel.yama.ptrace_scope=1` (3 can only be left by a reboot)",
        ),
    })
}

fn seccomp() -> Option<Check> {
    let actions = read("/proc/sys/kernel/seccomp/actions_avail");
    Some(match actions {
        Some(actions) if actions.contains("kill_process") => {
            Check::ok("seccomp", "system calls of machines are filtered")
        }
        _ => Check::error(
            "seccomp",
            "this kernel filters no system calls",
            "machines run only with --no-confine",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    })
}

fn landlock() -> Check {
    match read("/sys/kernel/security/lsm") {
        Some(modules) if modules.split(',').any(|module| module == "landlock") => Check::ok(
            "landlock",
            "files and sockets of machines are confined by it",
        ),
        Some(modules) => Check::warning(
            "landlock",
            format!("not among the security modules ({modules})"),
            "machines of users that are not root can open what their user can",
            "add landlock to the kernel's parameter lsm=",
        ),
        None => Check::ok(
            "landlock",
            "not known: securityfs is not mounted; `run -v` says what is in force",
        ),
    }
}

fn userfaultfd() -> Option<Check> {
    let unprivileged = number("/proc/sys/vm/unprivileged_userfaultfd");
    Some(match unprivileged {
        Some(_) => Check::ok("userfaultfd", "writes to private memory can be tracked"),
        None => Check::warning(
            "userfaultfd",
            "this kernel has no userfaultfd",
            "a second commit of a machine looks at all that it has written since its start",
            "use a kernel with CONFIG_USERFAULTFD",
        ),
    })
}

/// KSM. Machines switch it off for themselves.
fn merging() -> Option<Check> {
    let run = number("/sys/kernel/mm/ksm/run")?;
    Some(match run {
        1 => Check::ok("ksm", "running; machines take no part in it"),
        _ => Check::ok("ksm", "not running"),
    })
}

fn huge_pages() -> Option<Check> {
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled")?;
    Some(Check::ok(
        "huge_pages",
        format!("transparent huge pages: {}", chosen(&setting)),
    ))
}

fn overcommit() -> Option<Check> {
    let mode = number("/proc/sys/vm/overcommit_memory")?;
    Some(match mode {
        2 => Check::warning(
            "overcommit",
            "2: the kernel promises no more memory than there is",
            "each machine counts with all of its memory, also what it never touches",
            "`sysctl vm.overcommit_memory=0`",
        ),
        mode => Check::ok(
            "overcommit",
            format!("{mode}: memory that is never touched costs nothing"),
        ),
    })
}

fn clock() -> Option<Check> {
    let source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    Some(match source.as_str() {
        "tsc" | "kvm-clock" => Check::ok(
            "clock",
            format!("{source}, which is read without the kernel"),
        ),
        _ => Check::warning(
            "clock",
            source,
            "each look at the clock is a system call or an exit, in the host and in guests",
            "see the kernel's log for why it does not use the TSC",
        ),
    })
}

fn control_groups() -> Check {
    const CONTROLLERS: &str = "/sys/fs/cgroup/cgroup.controllers";
    let Some(controllers) = read(CONTROLLERS) else {
        return Check::warning(
            "cgroup",
            "there is no control group of version 2 at /sys/fs/cgroup",
            "what a machine takes of memory and tasks is bounded by its own limits only",
            "boot with systemd.unified_cgroup_hierarchy=1",
        );
    };
    let missing: Vec<_> = ["memory", "pids"]
        .into_iter()
        .filter(|name| controllers.split_whitespace().all(|it| it != *name))
        .collect();
    if missing.is_empty() {
        Check::ok("cgroup", format!("version 2 with {controllers}"))
    } else {
        Check::warning(
            "cgroup",
            format!("version 2 without {}", missing.join(" and ")),
            "what a machine takes of memory and tasks is bounded by its own limits only",
            "boot with cgroup_enable=memory",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(major_minor("6.10.3-amd64"), Some((6, 10)));
        assert!(major_minor("6.10") > Some(PAGEMAP_SCAN));
        assert!(major_minor("6.1.0-18-amd64") < Some(PAGEMAP_SCAN));
        assert_eq!(major_minor("unknown"), None);
    }
}
