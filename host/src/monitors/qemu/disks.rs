//! The disks of a machine of QEMU: what they consist of, and what a commit reads of them.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use snapstore_store::Store;

use super::description::Disk;
use crate::monitors::adapter::{Budget, Taken};
use crate::monitors::disks::{self, OpenLayer};
use crate::monitors::peer::Peer;
use crate::monitors::qmp::Qmp;

/// The most files that one disk may consist of.
const MOST_LAYERS: usize = 64;

/// A disk that the guest writes to.
pub struct Listed {
    /// What QEMU calls it.
    pub device: String,
    /// What the snapshot calls it.
    pub image: String,
    /// Its files, the topmost first.
    pub layers: Vec<Layer>,
}

/// One file of a disk.
pub struct Layer {
    /// As QEMU names it.
    pub file: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

impl Listed {
    /// What is written down of it.
    pub fn described(&self) -> Disk {
        Disk {
            image: self.image.clone(),
            device: self.device.clone(),
            files: self.layers.iter().map(|layer| layer.file.clone()).collect(),
        }
    }
}

/// The disks that the guest can write to.
pub fn list(qmp: &mut Qmp) -> anyhow::Result<Vec<Listed>> {
    let said = qmp.run("query-block", json!({}))?;
    let mut disks: Vec<Listed> = Vec::new();
    for block in said.as_array().map(Vec::as_slice).unwrap_or_default() {
        let inserted = &block["inserted"];
        if inserted.is_null() || inserted["ro"] == true {
            continue;
        }
        let names = [&block["device"], &block["qdev"], &inserted["node-name"]];
        let mut names = names.into_iter().filter_map(Value::as_str);
        let device = names
            .find(|name| !name.is_empty())
            .unwrap_or("?")
            .to_owned();
        let mut layers = Vec::new();
        let mut image = &inserted["image"];
        while !image.is_null() {
            let word = |name: &str| image[name].as_str().unwrap_or_default();
            let mut file = file_name(word("filename"));
            if layers.is_empty()
                && let Some(name) = inserted["file"].as_str()
            {
                file = file_name(name);
            }
            layers.push(Layer {
                file,
                format: word("format").to_owned(),
            });
            ensure!(
                layers.len() <= MOST_LAYERS,
                "the disk {device} consists of too many files"
            );
            image = &image["backing-image"];
        }
        ensure!(
            !layers.is_empty(),
            "QEMU does not say what the disk {device} is"
        );
        let image = format!("disk{}", disks.len());
        disks.push(Listed {
            device,
            image,
            layers,
        });
    }
    Ok(disks)
}

/// The file in QEMU's name of an image, which may be a description of it.
fn file_name(name: &str) -> String {
    let parsed = name
        .strip_prefix("json:")
        .and_then(|text| serde_json::from_str::<Value>(text).ok());
    let Some(mut node) = parsed.as_ref() else {
        return name.strip_prefix("file:").unwrap_or(name).to_owned();
    };
    while let Some(next) = node.get("file").filter(|next| next.is_object()) {
        node = next;
    }
    node["filename"].as_str().unwrap_or(name).to_owned()
}

/// Adds a disk to what is committed.
pub fn take(
    store: &Store,
    qmp: &mut Qmp,
    peer: &Peer,
    disk: &Listed,
    taken: &mut Taken,
    budget: &mut Budget,
) -> anyhow::Result<()> {
    let mut layers = Vec::with_capacity(disk.layers.len());
    for layer in &disk.layers {
        let is_qcow2 = match layer.format.as_str() {
            "raw" => false,
            "qcow2" => true,
            other => bail!(
                "{} has the format {other}; those that can be committed: raw, qcow2",
                layer.file
            ),
        };
        let (file, path) = open(qmp, peer, &layer.file)?;
        layers.push(OpenLayer {
            file,
            path,
            is_qcow2,
        });
    }
    disks::add(store, &disk.image, layers, taken, budget)
}

/// The file that QEMU has open under this name, for reading, and its path.
fn open(qmp: &mut Qmp, peer: &Peer, name: &str) -> anyhow::Result<(File, PathBuf)> {
    let file = match name.strip_prefix("/dev/fdset/") {
        Some(number) => {
            let sets = qmp.run("query-fdsets", json!({}))?;
            let sets = sets.as_array().map(Vec::as_slice).unwrap_or_default();
            let number: Option<u64> = number.parse().ok();
            let set = sets.iter().find(|set| set["fdset-id"].as_u64() == number);
            let fd = set.and_then(|set| set["fds"][0]["fd"].as_u64());
            peer.descriptor(fd.with_context(|| format!("QEMU has no descriptors {name}"))?)?
        }
        None => peer.open_file(Path::new(name))?.with_context(|| {
            format!("QEMU has no file {name} open; only disks that are files can be committed")
        })?,
    };
    ensure!(
        file.metadata()?.is_file(),
        "{name} is no regular file; only disks that are files can be committed"
    );
    let path = std::fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file)
    ))?;
    Ok((file, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_found() {
        assert_eq!(file_name("/a/root.img"), "/a/root.img");
        assert_eq!(file_name("file:/a/root.img"), "/a/root.img");
        let nested = r#"json:{"driver": "qcow2", "backing": {"driver": "raw", "file":
            {"driver": "file", "filename": "/base"}}, "file": {"driver": "file",
            "filename": "/var/tmp/vl.1"}}"#;
        assert_eq!(file_name(nested), "/var/tmp/vl.1");
    }
}
