//! What is damaged or gone: it is told, and left alone.

use std::collections::BTreeSet;

use crate::protocol::{Error, Name, Result};
use crate::verify::Finding;

/// What is damaged, and the packs that are left alone therefore.
#[derive(Default)]
pub struct Damage {
    pub packs: BTreeSet<Name>,
    /// Packs that are not worth it, where there are more than can be looked at together.
    pub passed: BTreeSet<Name>,
    pub findings: Vec<Finding>,
}

impl Damage {
    /// Something is wrong with an object that these tags need.
    pub fn add(
        &mut self,
        (object, problem): (String, String),
        tags: impl IntoIterator<Item = String>,
    ) {
        let known = self.findings.iter_mut();
        let mut same = known.filter(|it| it.object == object && it.problem == problem);
        let tags: BTreeSet<String> = match same.next() {
            Some(known) => {
                let tags: BTreeSet<String> = known.tags.drain(..).chain(tags).collect();
                known.tags = tags.into_iter().collect();
                return;
            }
            None => tags.into_iter().collect(),
        };
        self.findings.push(Finding {
            object,
            problem,
            tags: tags.into_iter().collect(),
        });
    }
}

/// What is damaged or gone does not end a repack: it leaves alone what needs it.
pub fn if_damaged(error: Error) -> Result<Error> {
    match error {
        Error::Damaged { .. } | Error::Missing { .. } | Error::Newer { .. } => Ok(error),
        other => Err(other),
    }
}

/// The object that is damaged or gone, and what is wrong with it.
pub fn told(error: &Error) -> (String, String) {
    match error {
        Error::Damaged { key, reason } => (key.clone(), (*reason).to_owned()),
        Error::Missing { key, .. } => (key.clone(), "it is missing".to_owned()),
        Error::Newer { key, .. } => (key.clone(), error.to_string()),
        other => (String::new(), other.to_string()),
    }
}
