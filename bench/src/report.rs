//! The table of results.

use std::fmt::Write as _;

use crate::stats::{Samples, Spread};

/// What a figure counts; fewer is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Seconds, shown in a fitting multiple.
    Seconds,
    /// Bytes, shown in a fitting multiple of 1000.
    Bytes,
    /// How many, such as requests.
    Count,
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What was measured.
    pub what: String,
    /// In what.
    pub unit: Unit,
    /// The product's figures.
    pub product: Samples,
    /// What it is compared with.
    pub against: String,
    /// That one's figures.
    pub baseline: Samples,
    /// The largest ratio that is good enough, if anything was aimed at.
    pub aim: Option<f64>,
}

const HEAD: [&str; 7] = [
    "measured",
    "figure",
    "baseline",
    "its figure",
    "ratio",
    "aim",
    "met",
];

/// All results so far.
#[derive(Debug, Default)]
pub struct Report {
    sections: Vec<Section>,
}

#[derive(Debug)]
struct Section {
    bench: String,
    rows: Vec<[String; 7]>,
    skipped: Vec<String>,
}

impl Report {
    /// Begins the results of a benchmark.
    pub fn begin(&mut self, bench: &str) {
        self.sections.push(Section {
            bench: bench.to_owned(),
            rows: Vec::new(),
            skipped: Vec::new(),
        });
    }

    /// Adds a comparison to the benchmark that was begun last.
    ///
    /// # Panics
    /// If none was begun.
    pub fn add(&mut self, comparison: &Comparison) {
        let ratios = comparison.product.over(&comparison.baseline).spread();
        let (aim, met) = match comparison.aim {
            Some(aim) if ratios.median <= aim => (format!("≤ {aim:.3}"), "yes"),
            Some(aim) => (format!("≤ {aim:.3}"), "NO"),
            None => (String::new(), ""),
        };
        self.section().rows.push([
            comparison.what.clone(),
            show(comparison.unit, comparison.product.spread()),
            comparison.against.clone(),
            show(comparison.unit, comparison.baseline.spread()),
            show_ratio(ratios),
            aim,
            met.to_owned(),
        ]);
    }

    /// Notes that something could not be measured.
    ///
    /// # Panics
    /// If no benchmark was begun.
    pub fn skip(&mut self, what: &str, reason: &str) {
        snapstore_tests::harness::skipped(what, reason);
        self.section().skipped.push(format!("{what}: {reason}"));
    }

    /// The benchmark that was begun last, for people.
    #[must_use]
    pub fn last_as_text(&self) -> String {
        let Some(section) = self.sections.last() else {
            return String::new();
        };
        let head = HEAD.map(str::to_owned);
        let rows: Vec<_> = std::iter::once(&head).chain(&section.rows).collect();
        let widths: [usize; 7] = std::array::from_fn(|column| {
            rows.iter()
                .map(|row| width(&row[column]))
                .max()
                .unwrap_or(0)
        });
        let mut out = format!("{}\n", section.bench);
        for row in rows {
            let mut line = String::from("  ");
            for (cell, wanted) in row.iter().zip(widths) {
                line += cell;
                line += &" ".repeat(wanted - width(cell) + 2);
            }
            out += line.trim_end();
            out.push('\n');
        }
        out
    }

    /// Everything, to be pasted into a document.
    #[must_use]
    pub fn as_markdown(&self) -> String {
        let mut out = String::new();
        for section in &self.sections {
            let _ = writeln!(out, "### {}\n", section.bench);
            if !section.rows.is_empty() {
                let _ = writeln!(out, "| {} |", HEAD.join(" | "));
                out += "|---|---:|---|---:|---:|---:|---|\n";
            }
            for row in &section.rows {
                let _ = writeln!(out, "| {} |", row.join(" | "));
            }
            for skipped in &section.skipped {
                let _ = writeln!(out, "\nSKIPPED {skipped}");
            }
            out.push('\n');
        }
        out
    }

    fn section(&mut self) -> &mut Section {
        self.sections.last_mut().expect("a benchmark was begun")
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn show(unit: Unit, spread: Spread) -> String {
    let (scale, name) = match unit {
        Unit::Seconds if spread.median < 1e-3 => (1e-6, "µs"),
        Unit::Seconds if spread.median < 1.0 => (1e-3, "ms"),
        Unit::Seconds => (1.0, "s"),
        Unit::Bytes if spread.median < 1e6 => (1e3, "kB"),
        Unit::Bytes => (1e6, "MB"),
        Unit::Count => (1.0, ""),
    };
    let digits = match spread.median / scale {
        _ if unit == Unit::Count => 0,
        big if big >= 100.0 => 0,
        medium if medium >= 10.0 => 1,
        _ => 2,
    };
    let one = |figure: f64| format!("{:.digits$}", figure / scale);
    if spread.min.total_cmp(&spread.max).is_eq() {
        return format!("{} {name}", one(spread.median))
            .trim_end()
            .to_owned();
    }
    let all = [spread.min, spread.median, spread.max].map(one);
    format!("{} {name}", all.join(" / ")).trim_end().to_owned()
}

fn show_ratio(ratios: Spread) -> String {
    if ratios.min.total_cmp(&ratios.max).is_eq() {
        return format!("{:.3}", ratios.median);
    }
    let digits = if ratios.median < 0.1 { 4 } else { 2 };
    format!(
        "{:.digits$} ({:.digits$}..{:.digits$})",
        ratios.median, ratios.min, ratios.max
    )
}

#[cfg(test)]
mod tests {
    use super::{Unit, show};
    use crate::stats::Samples;

    #[test]
    fn figures_have_their_unit_and_counts_have_none() {
        let three = Samples::new(vec![3.0, 1.0, 2.0]).spread();
        assert_eq!(show(Unit::Count, three), "1 / 2 / 3");
        assert_eq!(show(Unit::Count, Samples::one(412.0).spread()), "412");
        assert_eq!(show(Unit::Seconds, three), "1.00 / 2.00 / 3.00 s");
        assert_eq!(show(Unit::Bytes, Samples::one(9.13e6).spread()), "9.13 MB");
    }
}
