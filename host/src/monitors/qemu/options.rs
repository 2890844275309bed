//! QEMU's command line as options with their values, and which options are whose.

use anyhow::Context as _;

/// Options with a value that are the host's alone.
pub const DROPPED: &[&str] = &[
    "qmp",
    "qmp-pretty",
    "mon",
    "monitor",
    "pidfile",
    "incoming",
    "loadvm",
    "name",
    "mem-path",
    "add-fd",
    "D",
    "chroot",
    "runas",
    "run-with",
    "display",
    "vnc",
    "spice",
    "gdb",
    "trace",
];
/// The same without one.
pub const DROPPED_FLAGS: &[&str] = &[
    "daemonize",
    "S",
    "s",
    "mem-prealloc",
    "snapshot",
    "nographic",
    "curses",
    "sdl",
    "full-screen",
];
/// All other options without a value.
pub const FLAGS: &[&str] = &[
    "nodefaults",
    "no-user-config",
    "no-reboot",
    "no-shutdown",
    "no-acpi",
    "no-hpet",
    "enable-kvm",
    "no-fd-bootchk",
    "win2k-hack",
    "usb",
    "portrait",
    "singlestep",
    "only-migratable",
    "enable-sync-profile",
    "preconfig",
    "old-param",
    "semihosting",
    "xen-attach",
    "xen-domid-restrict",
    "accel-help",
    "no-quit",
    "alt-grab",
    "ctrl-grab",
    "nouserconfig",
    "perfmap",
    "jitdump",
];
/// Options whose value is a path.
pub const PATHS: &[&str] = &[
    "kernel",
    "initrd",
    "bios",
    "dtb",
    "L",
    "option-rom",
    "mtdblock",
    "sd",
];
/// Options whose value is the file of a disk, and nothing else.
pub const DISK_PATHS: &[&str] = &["hda", "hdb", "hdc", "hdd", "pflash"];
/// Options that name files in a way that is not followed here.
pub const REFUSED: &[&str] = &["readconfig", "blockdev", "cpr-transfer"];

/// Arguments as options with their values.
pub fn options(arguments: &[String]) -> anyhow::Result<Vec<(String, Option<String>)>> {
    let mut out = Vec::new();
    let mut rest = arguments.iter();
    while let Some(word) = rest.next() {
        let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            // The first disk.
            out.push(("hda".to_owned(), Some(word.clone())));
            continue;
        };
        let is_flag = FLAGS.contains(&name) || DROPPED_FLAGS.contains(&name);
        let value = match is_flag {
            true => None,
            false => Some(
                rest.next()
                    .with_context(|| format!("QEMU's option {word} has no value"))?
                    .clone(),
            ),
        };
        out.push((name.to_owned(), value));
    }
    Ok(out)
}

/// `a=b,c=d,e`, where two commas are one of the value.
pub fn fields(value: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut letters = value.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ',' if letters.next_if_eq(&',').is_some() => parts.last_mut().expect("one").push(','),
            ',' => parts.push(String::new()),
            letter => parts.last_mut().expect("one").push(letter),
        }
    }
    let split = |part: String| match part.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (part, None),
    };
    parts.into_iter().map(split).collect()
}

/// Such fields as a value again.
pub fn joined(fields: &[(String, Option<String>)]) -> String {
    let parts: Vec<String> = fields
        .iter()
        .map(|(key, value)| match value {
            Some(value) => format!("{key}={}", value.replace(',', ",,")),
            None => key.replace(',', ",,"),
        })
        .collect();
    parts.join(",")
}

/// The value of a field; the last one counts.
pub fn get<'a>(fields: &'a [(String, Option<String>)], key: &str) -> Option<&'a str> {
    let mut found = fields.iter().filter(|(name, _)| name == key);
    found.next_back().and_then(|(_, value)| value.as_deref())
}
