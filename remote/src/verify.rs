//! Whether a bucket holds what its tags need, and whether it is what was written.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::Result;
use crate::head::Head;
use crate::hooks::{LONGEST_RUN_BYTES, Run};
use crate::intact::Origins;
use crate::protocol::{
    self, HeadSummary, Listed, Listing, Malformed, Name, RefKey, RefRecord, State,
};
use crate::remote::{Remote, block_on};

/// What is wrong with an object.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// The object.
    pub object: String,
    /// What is wrong.
    pub problem: String,
    /// The tags that need it.
    pub tags: Vec<String>,
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Default)]
pub struct VerifyReport {
    /// The records that were looked at.
    pub records: u64,
    /// The packs.
    pub packs: u64,
    /// Their bytes that were read.
    pub read_bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What is left of pushes that were cut off. It is no damage.
    pub notes: Vec<Finding>,
}

/// A record of a push that was given up, since it was silent for too long.
const VOID: &str = "the push of this was cut off and given up, and what it needs is not there, so \
    it is void: the next push of the tag takes its place";

fn void(record: &RefKey) -> Finding {
    Finding {
        object: record.key(),
        problem: VOID.to_owned(),
        tags: vec![record.tag.clone()],
    }
}

impl Remote {
    /// Looks at all that tags need, and with `read_data` at all bytes of their packs.
    ///
    /// # Errors
    /// If the bucket did not answer. Damage is a finding.
    pub fn verify(&self, read_data: bool) -> Result<VerifyReport> {
        let seen = self.seen(&self.config()?.id);
        let mut report = VerifyReport::default();
        let listed = block_on(async {
            let (listing, older) = self.listing_with(&seen)?;
            if listing.tags().is_empty() {
                let mut there = self.bucket.list("packs/")?;
                there.extend(self.bucket.list("heads/")?);
                protocol::records_are_there(self, &listing, &there).await?;
            }
            Ok::<_, protocol::Error>((listing, older))
        });
        let (listing, older) = match listed {
            Err(protocol::Error::Damaged { key, reason }) => {
                report.findings.push(Finding {
                    object: key,
                    problem: format!("{reason}; nothing else was looked at"),
                    tags: Vec::new(),
                });
                return Ok(report);
            }
            listed => listed?,
        };
        for (tag, problem) in older {
            report.findings.push(Finding {
                object: format!("refs/{tag}/"),
                problem,
                tags: vec![tag],
            });
        }
        for tag in listing.tags() {
            if snapstore_store::check_tag(&tag).is_err() {
                report.findings.push(Finding {
                    object: format!("refs/{}/", tag.escape_debug()),
                    problem: "no tag can have this name: remove the directory".to_owned(),
                    tags: Vec::new(),
                });
            }
        }
        match block_on(protocol::condemnations(self)) {
            Err(protocol::Error::Damaged { key, reason }) => report.findings.push(Finding {
                object: key,
                problem: reason.to_owned(),
                tags: Vec::new(),
            }),
            other => drop(other?),
        }
        self.look_at_leases(&listing, &mut report)?;
        let mut packs: BTreeMap<Name, Vec<RefKey>> = BTreeMap::new();
        let mut origins = Origins::default();
        for record in listing.roots() {
            if snapstore_store::check_tag(&record.tag).is_err() {
                continue;
            }
            report.records += 1;
            let ref_key = record.key();
            let head_key = record.head.head_key();
            let tags = vec![record.tag.clone()];
            let mut found = |object: &str, problem: String| {
                report.findings.push(Finding {
                    object: object.to_owned(),
                    problem,
                    tags: tags.clone(),
                });
            };
            let body = match self.object(&ref_key)? {
                Ok(Some(body)) => body,
                Ok(None) => continue,
                Err(error) => {
                    found(&ref_key, error.to_string());
                    continue;
                }
            };
            let body = match RefRecord::decode(&ref_key, &body) {
                Ok(body) => body,
                Err(error) => {
                    found(&ref_key, error.of(&ref_key).to_string());
                    continue;
                }
            };
            let bytes = match self.object(&head_key)? {
                Ok(Some(bytes)) => bytes,
                Ok(None) => {
                    match listing.state(&record) {
                        // It may have been superseded, and collected, since it was listed.
                        State::Settled if !self.is_needed_still(&record)? => {}
                        State::Settled => found(&head_key, "it is missing".to_owned()),
                        State::Fenced => report.notes.push(void(&record)),
                        State::Active => {}
                    }
                    continue;
                }
                Err(error) => {
                    found(&head_key, error.to_string());
                    continue;
                }
            };
            let decoded = HeadSummary::decode(&head_key, &bytes).and_then(|(summary, rest)| {
                let head = Head::decode(summary.version, rest, &summary.packs)?;
                match (summary.snapshot == body.snapshot, head.packs().len()) {
                    (true, needed) if needed <= summary.packs.len() => Ok(summary),
                    _ => Err(Malformed::Wrong("it is of another snapshot than its tag")),
                }
            });
            match decoded {
                Ok(summary) => {
                    let missing = match listing.state(&record) {
                        State::Settled => false,
                        // It may have been given up before its head was written, and its packs
                        // been deleted by then.
                        State::Fenced | State::Active => self.lacks_any(&summary.packs)?,
                    };
                    match (missing, listing.state(&record)) {
                        (true, State::Fenced) => report.notes.push(void(&record)),
                        (true, _) => {}
                        (false, _) => {
                            origins.learn(summary.moved);
                            for pack in summary.packs {
                                packs.entry(pack).or_default().push(record.clone());
                            }
                        }
                    }
                }
                Err(error) => found(&head_key, error.of(&head_key).to_string()),
            }
        }
        for (pack, records) in packs {
            report.packs += 1;
            let key = pack.pack_key();
            let problem = match read_data {
                false => (!self.bucket.exists(&key)?).then(|| "it is missing".to_owned()),
                true => {
                    let (read_bytes, problem) = self.pack_problem(pack, &origins)?;
                    report.read_bytes += read_bytes;
                    problem
                }
            };
            let Some(problem) = problem else { continue };
            let mut tags = Vec::new();
            for record in records {
                if self.is_needed_still(&record)? {
                    tags.push(record.tag);
                }
            }
            if !tags.is_empty() {
                report.findings.push(Finding {
                    object: key,
                    problem,
                    tags,
                });
            }
        }
        // What stands in the way of a collection, also where no tag needs it.
        for kind in ["packs/", "heads/"] {
            self.listed(kind, &mut report)?;
        }
        let runs = self.listed("hooks/", &mut report)?;
        if read_data {
            self.look_at_hooks(&runs, &mut report)?;
        }
        Ok(report)
    }

    /// Whether a record that was listed may count yet: its tag may have been changed since, or
    /// repacked, and what it needed be collected.
    fn is_needed_still(&self, record: &RefKey) -> Result<bool> {
        let listing = block_on(Listing::of_tag(self, &record.tag))?;
        Ok(listing.roots().contains(record))
    }

    /// Leases that do not tell what their hosts work on: nothing is collected then.
    fn look_at_leases(&self, listing: &Listing, report: &mut VerifyReport) -> Result<()> {
        for (session, (_, beat)) in protocol::latest_beats(&listing.beats) {
            if listing.is_fenced(session) {
                continue;
            }
            match block_on(protocol::read_beat(self, &beat)) {
                Err(protocol::Error::Damaged { key, reason }) => report.findings.push(Finding {
                    object: key,
                    problem: reason.to_owned(),
                    tags: Vec::new(),
                }),
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// What there is of a kind of objects; what is none there is a finding.
    fn listed(&self, kind: &str, report: &mut VerifyReport) -> Result<Vec<Listed>> {
        match self.bucket.list(kind) {
            Err(error) if error.wrong.is_some() => {
                let error = protocol::Error::from(error);
                let (object, problem) = match error {
                    protocol::Error::Damaged { key, reason } => (key, reason.to_owned()),
                    other => (kind.to_owned(), other.to_string()),
                };
                // Of what a tag needs more is told.
                if report.findings.iter().all(|known| known.object != object) {
                    report.findings.push(Finding {
                        object,
                        problem,
                        tags: Vec::new(),
                    });
                }
                Ok(Vec::new())
            }
            listed => Ok(listed?),
        }
    }

    /// Runs of hooks are hints: a wrong one costs what a push could have found with it.
    fn look_at_hooks(&self, runs: &[Listed], report: &mut VerifyReport) -> Result<()> {
        for run in runs {
            if Name::parse_hooks(&run.key).is_none() {
                continue;
            }
            let problem = match run.len_bytes > LONGEST_RUN_BYTES {
                true => Some("it is longer than any run".to_owned()),
                false => match self.object(&run.key)? {
                    Ok(Some(bytes)) => {
                        report.read_bytes += bytes.len() as u64;
                        let decoded = Run::decode(&run.key, &bytes);
                        decoded.err().map(|error| error.of(&run.key).to_string())
                    }
                    // A collection has removed it meanwhile.
                    Ok(None) => None,
                    Err(error) => Some(error.to_string()),
                },
            };
            if let Some(problem) = problem {
                report.findings.push(Finding {
                    object: run.key.clone(),
                    problem: format!("{problem}; nobody needs it, so it can be removed"),
                    tags: Vec::new(),
                });
            }
        }
        Ok(())
    }

    fn lacks_any(&self, packs: &[Name]) -> Result<bool> {
        for pack in packs {
            if !self.bucket.exists(&pack.pack_key())? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// An object, or what is wrong with what stands in its place.
    pub(crate) fn object(&self, key: &str) -> Result<Result<Option<Vec<u8>>, protocol::Error>> {
        match self.bucket.get(key, None) {
            Err(error) if error.wrong.is_some() => Ok(Err(error.into())),
            other => Ok(Ok(other?)),
        }
    }
}
