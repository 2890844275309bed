//! QEMU's command line: that of the machine that was committed becomes that of a clone. What
//! the guest sees stays as it is; what is the host's becomes the clone's own, or goes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::description::Description;
use super::disks::Listed;
use super::options::{
    DISK_PATHS, DROPPED, DROPPED_FLAGS, FLAGS, PATHS, REFUSED, fields, get, joined, options,
};
use crate::error::Usage;

/// The id of the memory of a machine that had none of its own.
const MEMORY_ID: &str = "snapstore-memory";
/// The id of the character device of a clone's first serial line.
const CONSOLE_ID: &str = "snapstore-console";

/// What is a clone's own.
pub struct Clone<'a> {
    /// Where its sockets and logs are.
    pub dir: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// The value of the option that gives it its memory, without its id.
    pub memory: &'a str,
    /// For each image of the snapshot, the file of its disk.
    pub disks: &'a BTreeMap<String, String>,
    /// Options to add, before all others.
    pub added: Vec<String>,
    /// The taps of its network interfaces, in their order.
    pub taps: &'a [String],
}

/// Whether there is an object of this id.
pub fn has_object(arguments: &[String], id: &str) -> bool {
    let options = options(arguments).unwrap_or_default();
    options.iter().any(|(name, value)| {
        name == "object" && get(&fields(value.as_deref().unwrap_or_default()), "id") == Some(id)
    })
}

/// Looks whether clones could be started with these arguments: before a commit, so that no
/// snapshot is made that cannot be restored.
pub fn check(arguments: &[String], disks: &[Listed]) -> anyhow::Result<()> {
    let options = options(arguments)?;
    if let Some((name, _)) = options
        .iter()
        .find(|(name, _)| REFUSED.contains(&name.as_str()))
    {
        bail!(Usage(format!(
            "QEMU was started with -{name}, which cannot be given to clones; name disks with \
             -drive"
        )));
    }
    let named: Vec<String> = options.iter().filter_map(disk_file).collect();
    for disk in disks {
        ensure!(
            disk.layers.iter().any(|layer| named.contains(&layer.file)),
            "no -drive names the file of the disk {}; clones could not be given one of their own",
            disk.device
        );
    }
    Ok(())
}

/// The file of a disk that an option names.
fn disk_file((name, value): &(String, Option<String>)) -> Option<String> {
    let value = value.as_deref()?;
    match name.as_str() {
        "drive" => get(&fields(value), "file").map(str::to_owned),
        name if DISK_PATHS.contains(&name) => Some(value.to_owned()),
        _ => None,
    }
}

/// The arguments of a clone.
pub fn of_clone(about: &Description, clone: &Clone<'_>) -> anyhow::Result<Vec<String>> {
    let mut out = clone.added.clone();
    let mut add = |name: &str, value: Option<String>| {
        out.push(format!("-{name}"));
        out.extend(value);
    };
    // A name with a colon is no path: nbd:, fat:, json: and the like.
    let absolute = |path: &str| match path.contains(':') {
        true => path.to_owned(),
        false => about.directory.join(path).display().to_string(),
    };
    let options = options(&about.arguments)?;
    let backend = about.memory_backend.as_deref().unwrap_or(MEMORY_ID);
    let (mut serials, mut consoles) = (0, Vec::new());
    let (mut machine, mut taps) = (Vec::new(), clone.taps.iter());
    let had_graphics_off = options.iter().any(|(name, _)| name == "nographic");
    let mut has_memory = false;
    for (name, value) in &options {
        let name = name.as_str();
        let value = value.as_deref().unwrap_or_default();
        match name {
            "object" if get(&fields(value), "id") == Some(backend) => {
                has_memory = true;
                add("object", Some(memory_object(clone.memory, backend)));
            }
            "machine" | "M" => machine.extend(fields(value)),
            "serial" => {
                serials += 1;
                let given = serial(value, serials);
                if given.contains(CONSOLE_ID) {
                    consoles.push(serials);
                }
                add("serial", Some(given));
            }
            "parallel" | "debugcon" if !matches!(value, "none" | "null") => {
                add(name, Some("null".to_owned()));
            }
            "chardev" if value.contains(CONSOLE_ID) => {}
            "chardev" => add("chardev", Some(chardev(value, clone.dir))),
            "netdev" | "nic" | "net" => {
                let given = net(name, value, &mut taps, &absolute)?;
                add(name, Some(given));
            }
            "drive" => add("drive", Some(drive(value, about, clone, &absolute)?)),
            "cdrom" | "fda" | "fdb" => add(name, Some(absolute(value))),
            name if DISK_PATHS.contains(&name) => {
                let mut fields = vec![("file".to_owned(), Some(value.to_owned()))];
                match name {
                    "pflash" => fields.push(("if".to_owned(), Some("pflash".to_owned()))),
                    name => {
                        let number = name.as_bytes()[2] - b'a';
                        fields.push(("media".to_owned(), Some("disk".to_owned())));
                        fields.push(("index".to_owned(), Some(number.to_string())));
                    }
                }
                add(
                    "drive",
                    Some(drive(&joined(&fields), about, clone, &absolute)?),
                );
            }
            name if DROPPED.contains(&name) || DROPPED_FLAGS.contains(&name) => {}
            name if PATHS.contains(&name) => add(name, Some(absolute(value))),
            name if REFUSED.contains(&name) => bail!("QEMU's option -{name} cannot be given on"),
            name if FLAGS.contains(&name) => add(name, None),
            name => add(name, Some(value.to_owned())),
        }
    }
    if !has_memory {
        add("object", Some(memory_object(clone.memory, backend)));
    }
    if serials == 0 && had_graphics_off {
        consoles.push(1);
        add("serial", Some(format!("chardev:{CONSOLE_ID}1")));
    }
    for number in consoles {
        let value = format!("socket,id={CONSOLE_ID}{number}");
        add("chardev", Some(chardev(&value, clone.dir)));
    }
    add("machine", Some(machine_of(about, machine, backend)));
    add("monitor", Some("none".to_owned()));
    add("display", Some("none".to_owned()));
    add("name", Some(clone.name.replace(',', ",,")));
    Ok(out)
}

fn memory_object(memory: &str, id: &str) -> String {
    format!("memory-backend-file,id={id},{memory}")
}

/// The machine's type with its version, its options, and what clones need.
fn machine_of(about: &Description, fields: Vec<(String, Option<String>)>, backend: &str) -> String {
    let own = ["type", "memory-backend", "suppress-vmdesc"];
    let mut kept = vec![(about.machine.clone(), None)];
    for (number, (key, value)) in fields.into_iter().enumerate() {
        let is_type = value.is_none() && (number == 0 || key == about.machine);
        if !is_type && !own.contains(&key.as_str()) {
            kept.push((key, value));
        }
    }
    kept.push(("memory-backend".to_owned(), Some(backend.to_owned())));
    kept.push(("suppress-vmdesc".to_owned(), Some("on".to_owned())));
    joined(&kept)
}

/// A serial line of a clone: a socket where it was somebody's.
fn serial(value: &str, number: usize) -> String {
    match value {
        "none" | "null" => value.to_owned(),
        value if value.starts_with("chardev:") && !value.contains(CONSOLE_ID) => value.to_owned(),
        _ => format!("chardev:{CONSOLE_ID}{number}"),
    }
}

/// A character device of a clone: a socket and a log in its directory.
fn chardev(value: &str, dir: &Path) -> String {
    let fields = fields(value);
    let kind = fields[0].0.as_str();
    if matches!(
        kind,
        "null" | "ringbuf" | "spicevmc" | "qemu-vdagent" | "msmouse" | "wctablet"
    ) {
        return value.to_owned();
    }
    let id = get(&fields, "id").unwrap_or("chardev");
    let file = id.strip_prefix("snapstore-").map_or(id, |id| match id {
        "console1" => "console",
        id => id,
    });
    let path = |end: &str| Some(dir.join(format!("{file}.{end}")).display().to_string());
    let mut out = vec![
        ("socket".to_owned(), None),
        ("id".to_owned(), Some(id.to_owned())),
        ("path".to_owned(), path("sock")),
        ("server".to_owned(), Some("on".to_owned())),
        ("wait".to_owned(), Some("off".to_owned())),
        ("logfile".to_owned(), path("log")),
    ];
    if let Some(mux) = get(&fields, "mux") {
        out.push(("mux".to_owned(), Some(mux.to_owned())));
    }
    joined(&out)
}

/// A network interface of a clone: on a tap of its own, else on none.
fn net<'a>(
    option: &str,
    value: &str,
    taps: &mut impl Iterator<Item = &'a String>,
    absolute: &impl Fn(&str) -> String,
) -> anyhow::Result<String> {
    let mut given = fields(value);
    let kind = given[0].0.clone();
    if matches!(kind.as_str(), "none" | "nic" | "hubport") {
        return Ok(value.to_owned());
    }
    ensure!(
        matches!(
            kind.as_str(),
            "tap" | "user" | "bridge" | "socket" | "stream" | "dgram"
        ),
        "QEMU's -{option} {kind} cannot be given to clones"
    );
    let kept = ["id", "mac", "model", "addr", "netdev"];
    let mut out: Vec<_> = given
        .drain(1..)
        .filter(|(key, _)| {
            kept.contains(&key.as_str())
                || (kind == "user" && key != "hostfwd" && key != "guestfwd")
        })
        .collect();
    let first = match taps.next() {
        Some(tap) => {
            out.retain(|(key, _)| kept.contains(&key.as_str()));
            out.push(("ifname".to_owned(), Some(tap.clone())));
            out.push(("script".to_owned(), Some("no".to_owned())));
            out.push(("downscript".to_owned(), Some("no".to_owned())));
            "tap"
        }
        None => {
            if kind != "user" {
                // As if no cable were in it.
                out.push(("restrict".to_owned(), Some("on".to_owned())));
            }
            "user"
        }
    };
    for (key, value) in &mut out {
        if matches!(key.as_str(), "tftp" | "smb")
            && let Some(path) = value
        {
            *path = absolute(path);
        }
    }
    out.insert(0, (first.to_owned(), None));
    Ok(joined(&out))
}

/// A disk of a clone: a file of its own, if the guest writes to it.
fn drive(
    value: &str,
    about: &Description,
    clone: &Clone<'_>,
    absolute: &impl Fn(&str) -> String,
) -> anyhow::Result<String> {
    let mut given = fields(value);
    let Some(file) = get(&given, "file").map(str::to_owned) else {
        return Ok(value.to_owned());
    };
    let disk = about.disks.iter().find(|disk| disk.files.contains(&file));
    let (path, format) = match disk {
        Some(disk) => {
            let own = clone.disks.get(&disk.image);
            let own = own.with_context(|| format!("the clone has no disk {}", disk.image))?;
            (own.clone(), Some("qcow2".to_owned()))
        }
        None => (absolute(&file), get(&given, "format").map(str::to_owned)),
    };
    given.retain(|(key, _)| !matches!(key.as_str(), "file" | "format" | "snapshot"));
    given.insert(0, ("file".to_owned(), Some(path)));
    if let Some(format) = format {
        given.insert(1, ("format".to_owned(), Some(format)));
    }
    Ok(joined(&given))
}

/// Where the program of a clone is looked for, unless it is named.
pub fn program(about: &Description) -> PathBuf {
    match about.program.file_name() {
        Some(name) => PathBuf::from(name),
        None => PathBuf::from("qemu-system-x86_64"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitors::qemu::description::Disk;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn about(arguments: &str, backend: Option<&str>) -> Description {
        Description {
            format: 1,
            machine: "pc-q35-7.2".to_owned(),
            program: "/usr/bin/qemu-system-x86_64".into(),
            arguments: words(arguments),
            directory: "/home/a".into(),
            memory_backend: backend.map(str::to_owned),
            memory_bytes: 1 << 28,
            cpus: 1,
            disks: vec![Disk {
                image: "disk0".to_owned(),
                device: "virtio0".to_owned(),
                files: vec!["root.img".to_owned(), "/dev/fdset/100".to_owned()],
            }],
            regions: Vec::new(),
        }
    }

    fn of(about: &Description, taps: &[String]) -> String {
        let disks = BTreeMap::from([("disk0".to_owned(), "/dev/fdset/100".to_owned())]);
        let clone = Clone {
            dir: Path::new("/run/c"),
            name: "c",
            memory: "size=1,mem-path=/m",
            disks: &disks,
            added: vec!["-S".to_owned()],
            taps,
        };
        of_clone(about, &clone).unwrap().join(" ")
    }

    #[test]
    fn what_is_the_hosts_becomes_the_clones_own() {
        let about = about(
            "-nographic -M q35,accel=tcg -m 256 -kernel vmlinuz -drive \
             file=root.img,format=raw,if=virtio,snapshot=on -serial mon:stdio -pidfile /p \
             -qmp unix:q,server=on -netdev tap,id=n0,ifname=tap7 -netdev \
             user,id=n1,hostfwd=tcp::1-:2 -device virtio-net-pci,netdev=n0 -daemonize -no-reboot",
            None,
        );
        let taps = ["tap1".to_owned()];
        assert_eq!(
            of(&about, &taps),
            "-S -m 256 -kernel /home/a/vmlinuz -drive \
             file=/dev/fdset/100,format=qcow2,if=virtio -serial chardev:snapstore-console1 \
             -netdev tap,id=n0,ifname=tap1,script=no,downscript=no -netdev user,id=n1 \
             -device virtio-net-pci,netdev=n0 -no-reboot \
             -object memory-backend-file,id=snapstore-memory,size=1,mem-path=/m \
             -chardev socket,id=snapstore-console1,path=/run/c/console.sock,server=on,wait=off,logfile=/run/c/console.log \
             -machine pc-q35-7.2,accel=tcg,memory-backend=snapstore-memory,suppress-vmdesc=on \
             -monitor none -display none -name c"
        );
        assert!(of(&about, &[]).contains("-netdev user,id=n0,restrict=on"));
    }

    #[test]
    fn a_clone_of_a_clone_has_the_same_arguments() {
        let first = about(
            "-nographic -machine q35 -m 256 -drive file=root.img,format=raw -device x",
            None,
        );
        let once = of(&first, &[]);
        let second = about(&once, Some("snapstore-memory"));
        let twice = of(&second, &[]);
        let (mut once, mut twice) = (words(&once), words(&twice));
        once.sort();
        twice.sort();
        assert_eq!(once, twice);
    }

    #[test]
    fn memory_that_has_a_name_keeps_it() {
        let about = about(
            "-machine type=q35,memory-backend=ram -object memory-backend-memfd,id=ram,size=1 \
             -object rng-random,id=r -m 1",
            Some("ram"),
        );
        let said = of(&about, &[]);
        assert!(said.contains("-object memory-backend-file,id=ram,size=1,mem-path=/m -object rng"));
        assert!(said.contains("-machine pc-q35-7.2,memory-backend=ram,suppress-vmdesc=on"));
    }

    #[test]
    fn what_cannot_be_given_to_clones_is_told_before_a_commit() {
        let listed = |file: &str| Listed {
            device: "d".to_owned(),
            image: "disk0".to_owned(),
            layers: vec![super::super::disks::Layer {
                file: file.to_owned(),
                format: "raw".to_owned(),
            }],
        };
        let drive = words("-drive file=root.img");
        assert!(check(&drive, &[listed("root.img")]).is_ok());
        assert!(check(&drive, &[listed("other.img")]).is_err());
        assert!(check(&words("-blockdev driver=file,filename=x"), &[]).is_err());
        assert!(check(&words("root.img -m 1"), &[listed("root.img")]).is_ok());
        assert!(check(&words("-m"), &[]).is_err());
    }
}
