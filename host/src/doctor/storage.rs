//! The store, and the room around it.

use std::path::Path;

use snapstore_store::{Error, ErrorClass, Store, StoreFormat};

use super::check::Check;

/// Less room than this on a filesystem is worth a word.
const LITTLE_BYTES: u64 = 1 << 30;

pub(super) fn checks(path: &Path) -> Vec<Check> {
    let store = match Store::open(path) {
        Ok(store) => store,
        Err(error) => return vec![unopened(path, &error)],
    };
    let mut checks = vec![format_of(&store)];
    checks.push(writable(&store));
    checks.extend(room(
        "store_room",
        path,
        "commits and `gc` may not find room",
    ));
    let temporary = Path::new("/var/tmp");
    checks.extend(room(
        "overlay_room",
        temporary,
        "guests stand still when they write to their disks",
    ));
    checks
}

fn unopened(path: &Path, error: &Error) -> Check {
    match error.class() {
        _ if matches!(error, Error::NoStore { .. }) => Check::ok(
            "store",
            format!("none at {} yet; `snapstore init` makes one", path.display()),
        ),
        ErrorClass::Damaged => Check::error(
            "store",
            error.to_string(),
            "nothing can be read or committed",
            "`snapstore repair`",
        ),
        ErrorClass::Newer => Check::error(
            "store",
            error.to_string(),
            "this program cannot use the store",
            "use the newer snapstore",
        ),
        _ => Check::error(
            "store",
            error.to_string(),
            "nothing can be read or committed",
            "",
        ),
    }
}

fn format_of(store: &Store) -> Check {
    let at = store.path().display();
    match store.format() {
        _ if store.is_upgrading() => Check::warning(
            "store",
            format!("{at}: an upgrade has begun and not ended"),
            "both formats are in use, and reading looks in two places",
            "`snapstore upgrade`",
        ),
        StoreFormat::One => Check::warning(
            "store",
            format!("{at}: format 1"),
            "a damaged footer costs a scan of its pack, and commits take more time",
            "`snapstore upgrade`",
        ),
        StoreFormat::Two => Check::ok("store", format!("{at}: format 2")),
    }
}

fn writable(store: &Store) -> Check {
    const READ_ONLY: &str = "it can be mounted, read and verified, and nothing be committed";
    if let Err(error) = store.check_writable() {
        return Check::warning("store_writable", error.to_string(), READ_ONLY, "");
    }
    if let Err(error) = store.check_locks() {
        return Check::error("store_writable", error.to_string(), READ_ONLY, "");
    }
    match rustix::fs::access(store.path(), rustix::fs::Access::WRITE_OK) {
        Ok(()) => Check::ok(
            "store_writable",
            "by this user, and locks exclude each other",
        ),
        Err(error) => Check::warning("store_writable", error.to_string(), READ_ONLY, ""),
    }
}

fn room(name: &'static str, path: &Path, costs: &'static str) -> Option<Check> {
    let disk = rustix::fs::statvfs(path).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let mebibytes = free >> 20;
    let found = format!("{mebibytes} MiB are free at {}", path.display());
    Some(match free {
        LITTLE_BYTES.. => Check::ok(name, found),
        _ => Check::warning(
            name,
            found,
            costs,
            "`snapstore forget` and `snapstore gc`, or a larger disk",
        ),
    })
}
