//! What the demonstration measured.

use std::time::Duration;

use serde_json::{Value, json};

use super::program::Step;
use crate::format::{count, size, table};

/// An image and what its commit did.
pub struct ImageRow {
    pub tag: String,
    pub image_bytes: u64,
    pub nonzero_pages: u64,
    pub changed_pages: u64,
    pub added_chunks: u64,
    pub added_bytes: u64,
    pub time: Duration,
}

/// The store at some point.
pub struct StoreRow {
    pub when: String,
    pub snapshots: u64,
    pub logical_bytes: u64,
    pub pack_bytes: u64,
    pub total_bytes: u64,
}

/// Something that was done with a machine.
pub struct MachineRow {
    pub what: String,
    pub time: Duration,
    pub note: String,
}

#[derive(Default)]
pub struct Report {
    pub machines: Vec<MachineRow>,
    pub images: Vec<ImageRow>,
    pub stores: Vec<StoreRow>,
    /// How often a whole image was compared.
    pub compared: usize,
}

impl Report {
    /// The same numbers for programs.
    pub fn to_json(&self, steps: &[Step]) -> Value {
        let images: Vec<_> = self.images.iter().map(ImageRow::to_json).collect();
        let stores: Vec<_> = self.stores.iter().map(StoreRow::to_json).collect();
        let steps: Vec<_> = steps
            .iter()
            .map(|step| json!({"step": step.what.trim(), "seconds": step.time.as_secs_f64()}))
            .collect();
        let machines: Vec<_> = self
            .machines
            .iter()
            .map(|row| json!({"step": row.what, "seconds": row.time.as_secs_f64(), "note": row.note}))
            .collect();
        json!({
            "images": images,
            "steps": steps,
            "stores": stores,
            "machines": machines,
            "equal_comparisons": self.compared,
        })
    }

    pub fn describe(&self, steps: &[Step]) -> String {
        let images: Vec<_> = self.images.iter().map(ImageRow::cells).collect();
        let steps: Vec<_> = steps
            .iter()
            .map(|step| vec![step.what.clone(), duration(step.time), step.note.clone()])
            .collect();
        let stores: Vec<_> = self.stores.iter().map(StoreRow::cells).collect();
        let machines: Vec<_> = self
            .machines
            .iter()
            .map(|row| vec![row.what.clone(), row.note.clone(), duration(row.time)])
            .collect();
        let mut parts = vec![
            table(
                &[
                    "IMAGE",
                    "SIZE",
                    "PAGES IN USE",
                    "CHANGED",
                    "NEW CHUNKS",
                    "STORED",
                    "COMMIT",
                ],
                1,
                &images,
            ),
            table(&["STEP", "TIME", "RATE"], 1, &steps),
            table(
                &["STORE", "SNAPSHOTS", "IMAGES", "PACKS", "ON DISK", "RATIO"],
                1,
                &stores,
            ),
        ];
        if !machines.is_empty() {
            parts.push(table(&["MACHINE", "", "TIME"], 2, &machines));
        }
        format!(
            "\n--- Measured ---\n\n{}\n{} comparisons of whole images, all equal.",
            parts.join("\n"),
            self.compared
        )
    }
}

impl ImageRow {
    fn to_json(&self) -> Value {
        json!({
            "tag": self.tag,
            "image_bytes": self.image_bytes,
            "nonzero_pages": self.nonzero_pages,
            "changed_pages": self.changed_pages,
            "added_chunks": self.added_chunks,
            "added_bytes": self.added_bytes,
            "commit_seconds": self.time.as_secs_f64(),
        })
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.tag.clone(),
            size(self.image_bytes),
            count(self.nonzero_pages),
            count(self.changed_pages),
            count(self.added_chunks),
            size(self.added_bytes),
            duration(self.time),
        ]
    }
}

impl StoreRow {
    fn to_json(&self) -> Value {
        json!({
            "when": self.when,
            "snapshots": self.snapshots,
            "logical_bytes": self.logical_bytes,
            "pack_bytes": self.pack_bytes,
            "total_bytes": self.total_bytes,
        })
    }

    fn cells(&self) -> Vec<String> {
        let ratio = match self.total_bytes {
            0 => "-".to_owned(),
            total => format!("{:.1}x", self.logical_bytes as f64 / total as f64),
        };
        vec![
            self.when.clone(),
            count(self.snapshots),
            size(self.logical_bytes),
            size(self.pack_bytes),
            size(self.total_bytes),
            ratio,
        ]
    }
}

/// `0.35 ms`, `12 ms` or `1.25 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 0.01 {
        format!("{:.2} ms", seconds * 1e3)
    } else if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.2} s")
    }
}

/// Bytes per second.
pub fn rate(bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    format!("{}/s", size((bytes as f64 / seconds) as u64))
}
