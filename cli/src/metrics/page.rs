//! Metrics in the text format of Prometheus, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>), and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What kind of number it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It only grows, and begins anew with its process.
    Counter,
    Gauge,
    Histogram,
    /// A sum and a count.
    Summary,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }
}

/// A metric: its name, and what it means.
#[derive(Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

impl Family {
    pub const fn new(
        name: &'static str,
        kind: Kind,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self {
            name,
            kind,
            help,
            labels,
        }
    }
}

/// A number. What is added to the family's name is a suffix such as `_bucket`.
#[derive(Debug)]
struct Sample {
    suffix: &'static str,
    labels: Vec<(&'static str, String)>,
    value: f64,
}

/// All families, with the numbers that there are.
#[derive(Debug)]
pub struct Page(Vec<(&'static Family, Vec<Sample>)>);

impl Page {
    /// Without any number.
    pub fn new(families: impl IntoIterator<Item = &'static Family>) -> Self {
        Self(families.into_iter().map(|one| (one, Vec::new())).collect())
    }

    /// Adds a number; `labels` are the values in the order of the family's labels.
    pub fn add(&mut self, family: &'static Family, labels: &[&str], value: f64) {
        self.push(family, "", labels, None, value);
    }

    /// Adds a number that may not be known: then it is left out.
    pub fn add_known(&mut self, family: &'static Family, labels: &[&str], value: Option<f64>) {
        if let Some(value) = value {
            self.add(family, labels, value);
        }
    }

    /// Adds a sum and how many it is of.
    pub fn add_summary(&mut self, family: &'static Family, labels: &[&str], sum: f64, count: f64) {
        self.push(family, "_sum", labels, None, sum);
        self.push(family, "_count", labels, None, count);
    }

    /// Adds a histogram. `within` has upper bounds, ascending, and how many were at most so
    /// much.
    pub fn add_histogram(
        &mut self,
        family: &'static Family,
        labels: &[&str],
        within: &[(f64, u64)],
        sum: f64,
        count: u64,
    ) {
        for (bound, count) in within {
            let le = Some(bound.to_string());
            self.push(family, "_bucket", labels, le, *count as f64);
        }
        let infinite = Some("+Inf".to_owned());
        self.push(family, "_bucket", labels, infinite, count as f64);
        self.add_summary(family, labels, sum, count as f64);
    }

    fn push(
        &mut self,
        family: &'static Family,
        suffix: &'static str,
        values: &[&str],
        le: Option<String>,
        value: f64,
    ) {
        debug_assert_eq!(family.labels.len(), values.len(), "{}", family.name);
        let labels = family.labels.iter().zip(values);
        let mut labels: Vec<_> = labels
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect();
        labels.extend(le.map(|le| ("le", le)));
        let place = self.0.iter_mut().find(|(one, _)| one.name == family.name);
        debug_assert!(place.is_some(), "{} is in no list", family.name);
        if let Some((_, samples)) = place {
            samples.push(Sample {
                suffix,
                labels,
                value,
            });
        }
    }

    /// As Prometheus reads it. Families without a number are named, too.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (family, samples) in &self.0 {
            let Family { name, help, .. } = family;
            let kind = family.kind.name();
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for sample in samples {
                let labels: Vec<_> = sample.labels.iter().map(label).collect();
                let labels = match labels.as_slice() {
                    [] => String::new(),
                    labels => format!("{{{}}}", labels.join(",")),
                };
                let Sample { suffix, value, .. } = sample;
                let _ = writeln!(out, "{name}{suffix}{labels} {value}");
            }
        }
        out
    }

    pub fn json(&self) -> Value {
        let families = self.0.iter().map(|(family, samples)| {
            let samples = samples.iter().map(|sample| {
                let labels = sample.labels.iter();
                let labels = labels.map(|(name, value)| ((*name).to_owned(), json!(value)));
                json!({
                    "name": format!("{}{}", family.name, sample.suffix),
                    "labels": labels.collect::<serde_json::Map<_, _>>(),
                    "value": sample.value,
                })
            });
            json!({
                "name": family.name,
                "type": family.kind.name(),
                "help": family.help,
                "labels": family.labels,
                "samples": samples.collect::<Vec<_>>(),
            })
        });
        json!({"metrics": families.collect::<Vec<_>>()})
    }
}

fn label((name, value): &(&'static str, String)) -> String {
    let escaped = value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("{name}=\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    static PLAIN: Family = Family::new("a_total", Kind::Counter, &["dir"], "Things.");
    static TIMES: Family = Family::new("b_seconds", Kind::Histogram, &[], "Times.");

    #[test]
    fn a_page_is_as_prometheus_reads_it() {
        let mut page = Page::new([&PLAIN, &TIMES]);
        page.add_histogram(&TIMES, &[], &[(0.000_005, 1), (0.5, 3)], 1.25, 4);
        page.add(&PLAIN, &["/a\"b\\c\nd"], 12_345_678_901.0);
        page.add_known(&PLAIN, &["/e"], None);
        let expected = "# HELP a_total Things.\n\
            # TYPE a_total counter\n\
            a_total{dir=\"/a\\\"b\\\\c\\nd\"} 12345678901\n\
            # HELP b_seconds Times.\n\
            # TYPE b_seconds histogram\n\
            b_seconds_bucket{le=\"0.000005\"} 1\n\
            b_seconds_bucket{le=\"0.5\"} 3\n\
            b_seconds_bucket{le=\"+Inf\"} 4\n\
            b_seconds_sum 1.25\n\
            b_seconds_count 4\n";
        assert_eq!(page.text(), expected);
        let json = page.json();
        assert_eq!(json["metrics"][1]["samples"][1]["labels"]["le"], "0.5");
        assert_eq!(json["metrics"][0]["samples"][0]["value"], 12_345_678_901.0);
    }
}
