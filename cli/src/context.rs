//! What every command needs: the store, and how to answer.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use snapstore_host::Usage;
use snapstore_store::{Cancel, Error, PageSize, Store};

use crate::args::FormArgs;
use crate::exit;
use crate::form::{Fields, Form};
use crate::interrupt;
use crate::logging::say;
use crate::pager;

#[derive(Clone)]
pub struct Context {
    store: Option<PathBuf>,
    form: Form,
    /// Of [`Form::Lines`].
    fields: Option<&'static Fields>,
    pager: bool,
    lock_timeout: Option<Duration>,
    cancel: Cancel,
}

impl Context {
    pub fn new(store: Option<PathBuf>, json: bool, lock_timeout: Option<Duration>) -> Self {
        Self {
            store: store.or_else(|| variable("SNAPSTORE_DIR").map(PathBuf::from)),
            form: match json {
                true => Form::Json,
                false => Form::Table,
            },
            fields: None,
            pager: false,
            lock_timeout,
            cancel: Cancel::default(),
        }
    }

    /// The same with a pager for listings that are longer than the terminal, or without.
    #[must_use]
    pub fn with_pager(mut self, pager: bool) -> Self {
        self.pager = pager;
        self
    }

    /// The same for a listing of these fields, in the form that is asked for.
    pub fn listing(&self, asked: &FormArgs, fields: &'static Fields) -> anyhow::Result<Self> {
        let form = match (&asked.form, self.json()) {
            (None, _) => self.form.clone(),
            (Some(form), true) if *form != Form::Json => bail!(Usage(
                "--json and another form with -o cannot both be".to_owned()
            )),
            (Some(form), _) => form.clone(),
        };
        if let Form::Lines(template) = &form {
            template.check(fields)?;
        }
        Ok(Self {
            form,
            fields: Some(fields),
            ..self.clone()
        })
    }

    /// The same for a command that a signal stops in an orderly way.
    pub fn stopped_by_signals(&self) -> anyhow::Result<Self> {
        Ok(Self {
            cancel: interrupt::cancel_on_signal()?,
            ..self.clone()
        })
    }

    /// What a signal cancels, if the command is stopped by signals.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// How long to wait for another process, if that was said.
    pub fn lock_timeout(&self) -> Option<Duration> {
        self.lock_timeout
    }

    /// Whether the answer is to be JSON.
    pub fn json(&self) -> bool {
        self.form == Form::Json
    }

    /// The store's directory.
    pub fn store_path(&self) -> anyhow::Result<PathBuf> {
        match &self.store {
            Some(path) => Ok(path.clone()),
            None => default_store(),
        }
    }

    /// The store's directory, by the path that it is at, not by links that lead there.
    pub fn resolved_path(&self) -> anyhow::Result<PathBuf> {
        let path = self.store_path()?;
        Ok(std::fs::canonicalize(&path).unwrap_or(path))
    }

    /// Opens the store, which must exist.
    pub fn open(&self) -> anyhow::Result<Store> {
        Ok(self.configure(Store::open(&self.store_path()?)?))
    }

    /// Opens the store by the path that it is at, not by links that lead there: what
    /// lives longer than this command does not depend on them.
    pub fn open_resolved(&self) -> anyhow::Result<Store> {
        Ok(self.configure(Store::open(&self.resolved_path()?)?))
    }

    /// Opens the store; the default one is created when it is first needed.
    pub fn open_or_create_default(&self) -> anyhow::Result<Store> {
        let path = self.store_path()?;
        if self.store.is_none() && !path.join("config").exists() {
            match Store::create(&path, PageSize::default()) {
                // By another first command, just now.
                Err(Error::StoreExists { .. }) => {}
                created => {
                    let store = created?;
                    say!("Created a store in {}.", path.display());
                    return Ok(self.configure(store));
                }
            }
        }
        self.open()
    }

    /// A store that is opened for this command.
    pub fn configure(&self, store: Store) -> Store {
        let store = store.with_cancel(self.cancel.clone());
        match self.lock_timeout {
            Some(timeout) => store.with_lock_timeout(timeout),
            None => store,
        }
    }

    /// Answers with `value` as JSON or in lines, or with `text`.
    pub fn answer(
        &self,
        value: &impl serde::Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut answer = match (&self.form, self.fields) {
            (Form::Json, _) => serde_json::to_string(value)?,
            (Form::Lines(template), Some(fields)) => {
                template.fill(fields, &serde_json::to_value(value)?)
            }
            _ => text(),
        };
        if !answer.is_empty() && !answer.ends_with('\n') {
            answer.push('\n');
        }
        let is_listing = self.form == Form::Table && self.fields.is_some();
        if is_listing && self.pager && pager::show(&answer) {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        let written = out.write_all(answer.as_bytes()).and_then(|()| out.flush());
        exit::output(written)
    }
}

/// An environment variable; one that is empty counts as unset.
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn default_store() -> anyhow::Result<PathBuf> {
    if let Some(data) = variable("XDG_DATA_HOME") {
        return Ok(PathBuf::from(data).join("snapstore"));
    }
    match variable("HOME") {
        Some(home) => Ok(PathBuf::from(home).join(".local/share/snapstore")),
        None => bail!("neither HOME nor XDG_DATA_HOME is set; name the store with --store DIR"),
    }
}
