//! Files that are replaced at once.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::bail;
use snapstore_host::Usage;
use snapstore_store::{Cancel, Store};

use crate::stoppable::Stoppable;

/// That a file which is about to be written is none of the store's own.
pub fn check_outside(store: &Store, file: &Path) -> anyhow::Result<()> {
    let whole = std::path::absolute(file)?;
    // What the links lead to: of a file that is there, too, since one like a pipe is written to.
    let places = [
        fs::canonicalize(&whole).ok(),
        whole.parent().and_then(|dir| fs::canonicalize(dir).ok()),
    ];
    let own = fs::canonicalize(store.path())?;
    if places.into_iter().flatten().any(|it| it.starts_with(&own)) {
        bail!(Usage(format!(
            "{} is in the directory of the store, where only its own files belong; name a file \
             elsewhere",
            file.display()
        )));
    }
    Ok(())
}

/// Writes a file. Whoever reads it at any time finds all of the old one or all of the new
/// one; nobody needs it after a crash. What is there and is no regular file, such as a pipe,
/// is written to.
pub fn replace(path: &Path, bytes: &[u8], cancel: &Cancel) -> anyhow::Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Ok(Stoppable::writes(path, cancel.clone())?.write_all(bytes)?);
    }
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}.part", std::process::id()));
    // A new file: in a directory that others may write to, the name could be a link of theirs.
    let written = File::create_new(&unfinished)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&unfinished, path));
    if matches!(&written, Err(error) if error.kind() != io::ErrorKind::AlreadyExists) {
        let _ = fs::remove_file(&unfinished);
    }
    Ok(written?)
}
