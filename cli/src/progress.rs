//! A progress bar on a terminal, for anything that takes over a second.

use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use snapstore_store::Progress;

const SILENT_FOR: Duration = Duration::from_secs(1);

/// Shows bytes or items, depending on what the operation counts.
pub struct Bar {
    unit: Unit,
    part: Mutex<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Items,
}

struct Part {
    what: String,
    total: u64,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Bar {
    pub fn new(unit: Unit) -> Self {
        Self {
            unit,
            part: Mutex::new(Part {
                what: String::new(),
                total: 0,
                started: Instant::now(),
                bar: None,
            }),
        }
    }

    fn style(&self) -> ProgressStyle {
        let template = match self.unit {
            Unit::Bytes => "{msg:10} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            Unit::Items => "{msg:10} {bar:30} {pos}/{len} {eta}",
        };
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: u64) {
        let mut part = self.part.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = part.bar.take() {
            bar.finish_and_clear();
        }
        what.clone_into(&mut part.what);
        part.total = total;
    }

    fn advance(&self, done: u64) {
        let mut part = self.part.lock().unwrap_or_else(PoisonError::into_inner);
        let overdue = part.started.elapsed() >= SILENT_FOR;
        if part.bar.is_none() && overdue && std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(part.total).with_style(self.style());
            bar.set_message(part.what.clone());
            part.bar = Some(bar);
        }
        if let Some(bar) = &part.bar {
            bar.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        let part = self.part.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = part.bar.take() {
            bar.finish_and_clear();
        }
    }
}
