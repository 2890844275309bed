//! One operation being done.

use std::sync::Arc;

use snapstore_store::{
    CommitRequest, Error, GcOptions, InputKind, OptimizeOptions, ParentChoice, Pin, Silent,
    SnapshotId, Store,
};

use super::Held;
use crate::sim::check::{describe_findings, reads_as};
use crate::sim::content::{self, Content, ImageContent};
use crate::sim::damage;
use crate::sim::model::{Change, Value, tag_name};
use crate::sim::plan::{Action, Op, Parent};
use crate::sim::sets::Recording;
use crate::sim::world::{Actor, World};

/// What a process keeps from one operation to the next.
#[derive(Default)]
pub(super) struct Process {
    pub(super) store: Option<Store>,
    pub(super) pins: Vec<Pin>,
}

/// What an operation has done, if it was acknowledged.
#[derive(Default)]
pub(super) struct Done {
    /// Changes of tags that may still fail, and what they came to.
    pub(super) changes: Vec<Change>,
    pub(super) value: Option<Vec<Value>>,
    /// What it has committed.
    pub(super) committed: Option<SnapshotId>,
    /// A working set that it has not written to its end.
    pub(super) recording: Option<Recording>,
}

/// An operation being done.
pub(super) struct Work<'a> {
    pub(super) world: &'a Arc<World>,
    pub(super) actor: &'a Actor,
    pub(super) number: usize,
    pub(super) process: &'a mut Process,
    pub(super) op: &'a Op,
    pub(super) done: &'a mut Done,
}

impl Work<'_> {
    pub(super) fn perform(&mut self) -> Result<(), Error> {
        match &self.op.action {
            Action::Repair => {
                {
                    let mut shared = self.world.lock();
                    shared.repairs += 1;
                    shared.repairs_begun += 1;
                }
                Store::repair(&self.world.root, &Silent).map(|_| ())
            }
            Action::Upgrade => Store::upgrade(&self.world.root, false, &Silent).map(|_| ()),
            Action::Damage(kind, which) => {
                damage::inflict(self.world, *kind, *which);
                Ok(())
            }
            action => {
                let store = match self.process.store.take() {
                    Some(store) => store,
                    None => Store::open(&self.world.root)?,
                };
                let result = self.with_store(&store, action);
                let upgraded = matches!(result, Err(Error::Upgraded { .. }));
                self.process.store = Some(store).filter(|_| !upgraded);
                result
            }
        }
    }

    fn with_store(&mut self, store: &Store, action: &Action) -> Result<(), Error> {
        match action {
            Action::Commit {
                tag,
                parent,
                memory,
                disk,
                diff,
                keep,
            } => {
                let images = Images {
                    memory,
                    disk: disk.as_ref(),
                    diff: *diff,
                };
                self.commit(store, *tag, *parent, &images, *keep)
            }
            Action::Remove(tag) => {
                let name = tag_name(*tag);
                self.begin(&name, vec![None]);
                store.remove_tags(&[name])
            }
            Action::Move(to, from) => self.retag(store, &tag_name(*to), &tag_name(*from)),
            Action::Revive(tag, which) => {
                let found = self.world.lock().model.any(*which);
                let name = tag_name(*tag);
                let id = found.ok_or_else(|| Error::NotFound { name: name.clone() })?;
                let content = self.content_of(store, id);
                self.begin(&name, vec![content]);
                store.set_tag(&name, id, true)
            }
            Action::Gc(keep_percent) => {
                let options = GcOptions {
                    keep_percent: *keep_percent,
                    ..GcOptions::default()
                };
                store.gc(options, &Silent).map(|_| ())
            }
            Action::Optimize(most_bytes) => {
                let options = OptimizeOptions {
                    most_bytes: most_bytes.map(u64::from),
                    ..OptimizeOptions::default()
                };
                store.optimize(options, &Silent).map(|_| ())
            }
            Action::Verify(read_data) => {
                let report = store.verify(*read_data, &Silent)?;
                let shared = self.world.lock();
                // What the disk cannot read is damage.
                let refused = shared.is_refused(self.number);
                let excused = shared.is_damaged() || refused;
                drop(shared);
                if !report.findings.is_empty() && !excused {
                    let what = describe_findings(&report.findings);
                    self.world.fail("verify cries wolf", what);
                }
                Ok(())
            }
            Action::Read(tag) => self.read(store, &tag_name(*tag)),
            Action::Pin(tag) => {
                let (id, pin) = store.pin(&tag_name(*tag))?;
                self.hold(store, id, pin);
                Ok(())
            }
            Action::Mount(tag, mounting) => self.mount(store, tag_name(*tag), mounting),
            Action::Repair | Action::Upgrade | Action::Damage(..) => Ok(()),
        }
    }

    fn begin(&mut self, tag: &str, values: Vec<Value>) {
        let mut shared = self.world.lock();
        shared.sets.change_tag(tag);
        let change = shared.model.begin(self.op.number, tag, values.clone());
        self.done.changes.push(change);
        self.done.value = Some(values);
    }

    fn commit(
        &mut self,
        store: &Store,
        tag: u8,
        parent: Parent,
        images: &Images<'_>,
        keep: bool,
    ) -> Result<(), Error> {
        let mut choice = match parent {
            Parent::Tag(parent) => ParentChoice::Named(tag_name(parent)),
            Parent::Nothing => ParentChoice::Nothing,
            Parent::Automatic => ParentChoice::Automatic,
        };
        let mut base = None;
        if let Parent::Tag(parent) = parent
            && images.diff
        {
            // By its id, so that what the changes apply to is known.
            let name = tag_name(parent);
            let found = self.quietly(|| store.tag(&name))?;
            let id = found.ok_or(Error::NotFound { name })?;
            choice = ParentChoice::Named(id.to_string());
            let content = self.content_of(store, id);
            base = Some(content.ok_or(Error::NotFound {
                name: id.to_string(),
            })?);
        }
        let content = Arc::new(images.content(base.as_deref()));
        self.begin(&tag_name(tag), vec![Some(content.clone())]);
        let request = CommitRequest {
            tag: tag_name(tag),
            replace: true,
            parent: choice,
            inputs: images.inputs(),
            keep,
            ..CommitRequest::default()
        };
        let committed = store.commit(&request, &Silent)?;
        self.done.committed = Some(committed.id);
        let mut shared = self.world.lock();
        shared.model.know(committed.id, content.clone());
        if let Some(pin) = committed.pin {
            shared.held.push(Held {
                actor: self.number,
                id: committed.id,
                content,
            });
            drop(shared);
            self.process.pins.push(pin);
        }
        Ok(())
    }

    fn retag(&mut self, store: &Store, to: &str, from: &str) -> Result<(), Error> {
        let id = store.resolve(from)?;
        let Some(content) = self.content_of(store, id) else {
            // It has been collected since, or the disk has lost it.
            return Err(Error::NotFound {
                name: from.to_owned(),
            });
        };
        self.begin(to, vec![Some(content)]);
        store.set_tag(to, id, true)
    }

    fn read(&mut self, store: &Store, tag: &str) -> Result<(), Error> {
        let (id, pin) = store.pin(tag)?;
        let excused = self.world.lock().is_damaged();
        let actor = self.actor;
        let content = store
            .manifest(id)
            .map_err(anyhow::Error::from)
            .and_then(|manifest| content::read(store, &manifest, &mut || actor.pause("a page")));
        drop(pin);
        match content {
            Ok(content) => {
                let known = self.world.lock().model.content(id);
                if let Some(known) = known.filter(|known| **known != content) {
                    let what = format!("{tag} is {content:?} and not {known:?}");
                    self.world.fail("wrong bytes", what);
                }
                Ok(())
            }
            Err(error) => match error.downcast::<Error>() {
                Ok(error) => Err(error),
                Err(_) if excused => Ok(()),
                Err(error) => {
                    self.world.fail("wrong bytes", format!("{tag}: {error}"));
                    Ok(())
                }
            },
        }
    }

    fn hold(&mut self, store: &Store, id: SnapshotId, pin: Pin) {
        self.process.pins.push(pin);
        let Some(content) = self.content_of(store, id) else {
            return;
        };
        self.world.lock().held.push(Held {
            actor: self.number,
            id,
            content,
        });
    }

    /// What a snapshot holds, which is nobody's step.
    pub(super) fn content_of(&self, store: &Store, id: SnapshotId) -> Option<Arc<Content>> {
        if let Some(known) = self.world.lock().model.content(id) {
            return Some(known);
        }
        let content = self.quietly(|| reads_as(store, id)).ok()?;
        let content = Arc::new(content);
        self.world.lock().model.know(id, content.clone());
        Some(content)
    }

    /// Does something that is none of the history's steps.
    pub(super) fn quietly<T>(&self, work: impl FnOnce() -> T) -> T {
        snapstore_store::sim::unobserved(work)
    }
}

/// What a commit is given.
struct Images<'a> {
    memory: &'a ImageContent,
    disk: Option<&'a ImageContent>,
    diff: bool,
}

impl Images<'_> {
    fn inputs(&self) -> Vec<snapstore_store::Input> {
        let kind = if self.diff {
            InputKind::Diff
        } else {
            InputKind::Full
        };
        let disk = self.disk.map(|disk| disk.input("disk0", InputKind::Full));
        let memory = self.memory.input("memory", kind);
        std::iter::once(memory).chain(disk).collect()
    }

    /// What the snapshot is to hold.
    fn content(&self, base: Option<&Content>) -> Content {
        let mut content = base.cloned().unwrap_or_default();
        let old = content.get("memory").cloned();
        let memory = match old {
            Some(old) => old.with(self.memory),
            None => self.memory.clone(),
        };
        content.insert("memory".to_owned(), memory);
        if let Some(disk) = self.disk {
            content.insert("disk0".to_owned(), disk.clone());
        }
        content
    }
}
