//! In which form a listing is printed: as a table, as JSON, or as a line of the user's own
//! for each thing that is listed.
//!
//! A template names fields of the JSON object that the command would print. What those are
//! is said by the command ([`Fields`]), not looked up in its answer: a name that is wrong
//! is refused before anything is done, also where nothing is listed.

use std::fmt::Write as _;
use std::str::FromStr;

use anyhow::bail;
use serde_json::Value;
use snapstore_host::Usage;

/// What stands for a field that there is not.
const NOTHING: &str = "-";

/// The names of what a command's answer consists of. One with a dot at its end is of
/// objects, which have fields of their own.
pub struct Fields {
    /// What its rows are called. An answer without them is a row itself.
    pub rows: &'static str,
    /// The fields of a row.
    pub of_row: &'static [&'static str],
    /// The fields of the answer as a whole.
    pub of_answer: &'static [&'static str],
}

/// A form that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For scripts.
    Lines(Template),
}

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "table" => Self::Table,
            "json" => Self::Json,
            _ => Self::Lines(text.parse()?),
        })
    }
}

/// A line with fields in it, such as `{tag} {id}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A field, a field of that, and so on.
    Field(Vec<String>),
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut parts, mut plain) = (Vec::new(), String::new());
        let mut letters = text.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '{' | '}' if letters.peek() == Some(&letter) => {
                    letters.next();
                    plain.push(letter);
                }
                '{' => {
                    let mut name = String::new();
                    loop {
                        match letters.next() {
                            Some('}') => break,
                            Some(letter) => name.push(letter),
                            None => return Err(format!("{{{name} has no }}")),
                        }
                    }
                    if !plain.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(Part::Field(name.split('.').map(str::to_owned).collect()));
                }
                '}' => return Err("there is a } without a {; }} stands for one".to_owned()),
                '\\' => match letters.next() {
                    Some('t') => plain.push('\t'),
                    Some('n') => plain.push('\n'),
                    Some('\\') => plain.push('\\'),
                    _ => return Err(r"a \ stands before t, n or another \".to_owned()),
                },
                _ => plain.push(letter),
            }
        }
        if parts.is_empty() {
            return Err(
                "it is json, table, or a line with fields, such as '{tag} {id}'".to_owned(),
            );
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }
}

impl Template {
    /// Refuses what names a field that the command's answer does not have.
    pub fn check(&self, fields: &Fields) -> anyhow::Result<()> {
        for path in self.paths() {
            let name = path.first().map_or("", String::as_str);
            let found = [fields.of_row, fields.of_answer]
                .into_iter()
                .flatten()
                .find(|field| named(field) == name);
            let Some(found) = found else {
                let list = |names: &[&'static str]| {
                    let names: Vec<_> = names.iter().map(|field| named(field)).collect();
                    names.join(", ")
                };
                let mut known = list(fields.of_row);
                if !fields.of_answer.is_empty() {
                    known += &format!("; once: {}", list(fields.of_answer));
                }
                bail!(Usage(format!(
                    "there is no field {name:?}; there are {known}"
                )));
            };
            if path.len() > 1 && !found.ends_with('.') {
                bail!(Usage(format!(
                    "there is no field {:?}; {name:?} has no fields of its own",
                    path.join(".")
                )));
            }
        }
        Ok(())
    }

    /// A line for each row, or one if no field of a row is named.
    pub fn fill(&self, fields: &Fields, answer: &Value) -> String {
        let one = std::slice::from_ref(answer);
        let rows = match answer.get(fields.rows) {
            Some(Value::Array(rows)) if self.is_of_rows(fields) => rows,
            _ => one,
        };
        let mut out = String::new();
        for row in rows {
            for part in &self.0 {
                match part {
                    Part::Text(text) => out += text,
                    Part::Field(path) => out += &shown(found(row, path).or(found(answer, path))),
                }
            }
            out.push('\n');
        }
        out
    }

    fn is_of_rows(&self, fields: &Fields) -> bool {
        let is_of_row = |name: &String| fields.of_row.iter().any(|field| named(field) == name);
        self.paths().any(|path| path.first().is_some_and(is_of_row))
    }

    /// The fields that are named.
    fn paths(&self) -> impl Iterator<Item = &[String]> {
        self.0.iter().filter_map(|part| match part {
            Part::Field(path) => Some(path.as_slice()),
            Part::Text(_) => None,
        })
    }
}

/// What a field is called.
fn named(field: &'static str) -> &'static str {
    field.trim_end_matches('.')
}

/// Of a list, a field is the list of its members' fields.
fn found(value: &Value, path: &[String]) -> Option<Value> {
    let Some((name, rest)) = path.split_first() else {
        return Some(value.clone());
    };
    match value {
        Value::Array(values) => {
            let members = values.iter().filter_map(|value| found(value, path));
            Some(Value::Array(members.collect()))
        }
        _ => found(value.get(name)?, rest),
    }
}

fn shown(value: Option<Value>) -> String {
    let is_plain = |value: &Value| !value.is_array() && !value.is_object();
    match value {
        None | Some(Value::Null) => NOTHING.to_owned(),
        Some(Value::String(text)) if text.is_empty() => NOTHING.to_owned(),
        Some(Value::String(text)) => text,
        Some(Value::Array(values)) if values.is_empty() => NOTHING.to_owned(),
        Some(Value::Array(values)) if values.iter().all(is_plain) => {
            joined(values.into_iter().map(|value| shown(Some(value))))
        }
        Some(Value::Object(fields)) if fields.is_empty() => NOTHING.to_owned(),
        Some(Value::Object(fields)) if fields.values().all(is_plain) => {
            let fields = fields.into_iter();
            joined(fields.map(|(name, value)| format!("{name}={}", shown(Some(value)))))
        }
        Some(other) => other.to_string(),
    }
}

fn joined(words: impl Iterator<Item = String>) -> String {
    let mut out = String::new();
    for (number, word) in words.enumerate() {
        let separator = if number == 0 { "" } else { "," };
        let _ = write!(out, "{separator}{word}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FIELDS: Fields = Fields {
        rows: "tags",
        of_row: &["tag", "labels.", "size", "images."],
        of_answer: &["total"],
    };

    fn filled(template: &str, answer: &Value) -> String {
        let template: Template = template.parse().unwrap();
        template.check(&FIELDS).unwrap();
        template.fill(&FIELDS, answer)
    }

    #[test]
    fn a_line_for_each_row() {
        let answer = json!({
            "tags": [
                {"tag": "a", "labels": {}, "size": 7, "images": [{"name": "x"}, {"name": "y"}]},
                {"tag": "b", "labels": {"k": "v", "l": 1}, "size": null, "images": []},
            ],
            "total": 8,
        });
        assert_eq!(filled("{tag} {size}", &answer), "a 7\nb -\n");
        assert_eq!(filled("{tag}={labels}", &answer), "a=-\nb=k=v,l=1\n");
        assert_eq!(filled("{labels.k}", &answer), "-\nv\n");
        assert_eq!(filled("{images.name}", &answer), "x,y\n-\n");
        assert_eq!(filled(r"{{{tag}}}\t{total}", &answer), "{a}\t8\n{b}\t8\n");
        assert_eq!(
            filled("{images}", &answer).lines().next(),
            Some(r#"[{"name":"x"},{"name":"y"}]"#)
        );
        assert_eq!(filled("of all: {total}", &answer), "of all: 8\n");
        assert_eq!(filled("{tag}", &json!({"tags": []})), "");
        assert_eq!(filled("{tag}", &json!({"tag": "alone"})), "alone\n");
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for text in ["", "jsn", "{tag", "tag}", r"{tag}\x", r"{tag}\"] {
            assert!(text.parse::<Form>().is_err(), "{text}");
        }
        assert_eq!("json".parse(), Ok(Form::Json));
        assert_eq!("table".parse(), Ok(Form::Table));
        for name in ["{tag.size}", "{total.tag}", "{size.}"] {
            let template: Template = name.parse().unwrap();
            let error = template.check(&FIELDS).unwrap_err().to_string();
            assert!(error.contains("has no fields of its own"), "{error}");
        }
        for name in ["{nobody}", "{}", "{ tag }", "{.tag}"] {
            let template: Template = name.parse().unwrap();
            let error = template.check(&FIELDS).unwrap_err().to_string();
            assert!(
                error.contains("tag, labels, size, images; once: total"),
                "{error}"
            );
        }
    }
}
