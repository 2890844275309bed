//! A snapshot's files under the names that a monitor's own commands look for.

use std::path::{Component, Path};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use snapstore_fuse::Layout;
use snapstore_store::{Image, ImageRole, Store};

use super::adapter::{DESCRIPTION, Kind, MONITOR, STATE};
use super::described;
use super::known;
use crate::error::Usage;

/// How a mount shows this snapshot for this monitor.
///
/// # Errors
/// [`Usage`] if it is of another monitor, or lacks what this one needs.
pub fn layout(store: &Store, kind: Kind, snapshot: &str) -> anyhow::Result<Layout> {
    let found = store.snapshot(snapshot)?;
    let manifest = found.manifest();
    if let Some(monitor) = manifest.labels.get(MONITOR).filter(|it| *it != kind.name()) {
        bail!(Usage(format!(
            "{snapshot} was committed from another monitor; use --layout {monitor}"
        )));
    }
    let has = |name: &str| manifest.images.iter().any(|it| it.file_name() == name);
    let about = described(store, manifest.image(DESCRIPTION))?;
    let names = known::restorer(kind).names(about.as_ref(), &has);
    let names = names.with_context(|| format!("{snapshot} cannot be shown as {kind} wants it"))?;
    let mut renamed = Vec::new();
    let mut images = manifest.images.iter();
    let memory = images.find(|image| image.role == ImageRole::Memory);
    let memory = memory.map(Image::file_name);
    let taken = |name: &str, what: &str| {
        Usage(format!(
            "{snapshot} cannot be shown as {kind} wants it: its file {name} is not its {what}, and \
             would be taken for it; commit it without that file, or with another name for it"
        ))
    };
    match has(names.memory) {
        true if memory.as_deref() != Some(names.memory) => {
            bail!(taken(names.memory, "memory"));
        }
        true => {}
        false => renamed.push((memory, names.memory, "no memory")),
    }
    if has(names.state) && names.state != STATE && has(STATE) {
        bail!(taken(names.state, "state of CPUs and devices"));
    }
    if !has(names.state) {
        let state = has(STATE).then(|| STATE.to_owned());
        let lack = "no state of CPUs and devices (`commit --vmstate`)";
        renamed.push((state, names.state, lack));
    }
    let renamed = renamed.into_iter().map(|(from, to, lack)| {
        let from = from.ok_or_else(|| {
            Usage(format!(
                "{snapshot} cannot be shown as {kind} wants it: it has {lack}"
            ))
        })?;
        Ok((from, to.to_owned()))
    });
    let mut renamed = renamed.collect::<anyhow::Result<Vec<_>>>()?;
    for (image, path) in &names.disks {
        let from = format!("{image}.img");
        let Some(to) = plain(path) else { continue };
        let is_taken = |name: &str| {
            name == "manifest.json" || has(name) || renamed.iter().any(|(_, other)| other == name)
        };
        if has(&from) && !is_taken(to) {
            renamed.push((from, to.to_owned()));
        }
    }
    let mut made = names.made;
    made.retain(|(name, _)| !has(name));
    Ok(Layout {
        name: kind.name().to_owned(),
        renamed,
        made,
    })
}

/// What the snapshot says of its machine, if it says something.
fn described(store: &Store, image: Option<&Image>) -> anyhow::Result<Option<Value>> {
    let Some(image) = image else {
        return Ok(None);
    };
    ensure!(
        image.size_bytes <= described::LONGEST_BYTES,
        "{DESCRIPTION} is too long for a description of a machine"
    );
    let bytes = store.read_file_image(image, described::LONGEST_BYTES)?;
    described::parsed(&bytes, Path::new(DESCRIPTION)).map(Some)
}

/// The name of a file that a path leads to in the working directory itself.
fn plain(path: &str) -> Option<&str> {
    let mut parts = Path::new(path).components();
    let mut parts = parts.by_ref().filter(|part| *part != Component::CurDir);
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => name.to_str(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::MEMORY_FILES;

    #[test]
    fn memory_is_found_again_under_every_name_that_it_can_have() {
        for kind in Kind::ALL {
            let names = known::restorer(kind).names(None, &|_| true).unwrap();
            assert!(MEMORY_FILES.contains(&names.memory), "{}", names.memory);
        }
    }

    #[test]
    fn only_a_file_of_the_working_directory_has_a_plain_name() {
        for path in ["root.img", "./root.img"] {
            assert_eq!(plain(path), Some("root.img"));
        }
        for path in ["/root.img", "a/root.img", "../root.img", ".", ""] {
            assert_eq!(plain(path), None, "{path:?}");
        }
    }
}
