//! What a bucket says of itself: that it is a remote, and how long its pages are. It is made
//! by `init`, and made anew from what is beside it.
//!
//! Two hosts may make it at once. Then it is that of one of them, and neither relies on which: a
//! server that knows conditions keeps the first one, another one the last. So each reads it again
//! once its own was written. All that others need to agree on is the size of pages; the number
//! that is drawn only tells apart what a host keeps of several buckets, its caches and the records it has seen.

use snapstore_store::{Store, page_size_of_manifest};

use crate::error::{Error, Result};
use crate::protocol::{self, Part, Unanswered, seal, unseal};
use crate::remote::{Remote, no_random};
use crate::sealing;

pub(crate) const CONFIG_KEY: &str = "config";
const CONFIG: [u8; 8] = *b"SNAPBUCK";
/// How often it is written anew that another host removed.
const CONFIG_ATTEMPTS: u32 = 3;

/// What a bucket says of itself.
pub(crate) struct Config {
    pub page_bytes: u64,
    /// Drawn when it was made.
    pub id: [u8; 16],
}

impl Remote {
    /// Makes a bucket a remote, or makes its configuration anew if that is lost or damaged.
    ///
    /// # Errors
    /// [`Error::RemoteExists`]; [`Error::NothingThere`] if there was a remote;
    /// [`Error::ForeignConfig`];
    /// [`Error::OtherPageSize`] if snapshots there have other pages; [`Error::OtherKey`],
    /// [`Error::NoKey`], [`Error::InClearThere`] if what is there is encrypted otherwise; if the
    /// bucket did not answer.
    pub fn init(&self, page_bytes: u32) -> Result<()> {
        if self.was_there && self.bucket.is_absent() {
            return Err(self.nothing_there());
        }
        self.bucket.create()?;
        let is_damaged = match self.config_from(self.bucket.get(CONFIG_KEY, None)) {
            Ok(None) => false,
            Ok(Some(_)) => {
                return Err(Error::RemoteExists {
                    url: self.url.clone(),
                });
            }
            Err(Error::Protocol(protocol::Error::Damaged { .. })) => match self.wrote_config()? {
                true => true,
                false => {
                    return Err(Error::ForeignConfig {
                        url: self.url.clone(),
                    });
                }
            },
            // What tells one from the other may be what is damaged: heads tell.
            Err(error @ Error::OtherKey { .. }) => match self.page_bytes_of_heads() {
                Ok(Some(_)) => true,
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        };
        let store_bytes = page_bytes.into();
        // What cannot be read with this key is not made a remote of this key.
        if let Some(remote_bytes) = self.page_bytes_of_heads()?
            && remote_bytes != store_bytes
        {
            return Err(Error::OtherPageSize {
                url: self.url.clone(),
                remote_bytes,
                store_bytes,
            });
        }
        if is_damaged {
            // A server may refuse to write over it. Without it all is as if it was lost.
            self.bucket.delete(CONFIG_KEY)?;
        }
        let config = self.write_config(page_bytes)?;
        let is_other = |remote_bytes| Error::OtherPageSize {
            url: self.url.clone(),
            remote_bytes,
            store_bytes,
        };
        if config.page_bytes != store_bytes {
            return Err(is_other(config.page_bytes));
        }
        // Another host may have pushed before this one has written over its configuration.
        match self.page_bytes_of_heads()? {
            Some(remote_bytes) if remote_bytes != store_bytes => {
                self.bucket.delete(CONFIG_KEY)?;
                self.write_config(u32::try_from(remote_bytes).expect("a size of pages"))?;
                Err(is_other(remote_bytes))
            }
            _ => Ok(()),
        }
    }

    /// Writes a configuration, and reads what is there then: another host's may be.
    fn write_config(&self, page_bytes: u32) -> Result<Config> {
        let mut payload = page_bytes.to_le_bytes().to_vec();
        payload.extend_from_slice(&crate::random().map_err(no_random)?.to_le_bytes());
        let sealed = seal(CONFIG, CONFIG_KEY, &payload);
        let mut attempts = CONFIG_ATTEMPTS;
        loop {
            attempts -= 1;
            let written = self.bucket.put(CONFIG_KEY, &sealed);
            let refused = match written {
                Err(error) if error.wrong.is_none() => return Err(error.into()),
                written => written.err(),
            };
            match (self.config(), refused) {
                // Another host found a damaged one before, and has removed this one for it.
                (Err(Error::NoRemote { .. }), None) if attempts > 0 => {}
                // What stands there is none, and is in the way.
                (Err(Error::NoRemote { .. }), Some(error)) => return Err(error.into()),
                (found, _) => return found,
            }
        }
    }

    /// Whether a damaged configuration was that of a remote, by what it begins with, or by
    /// the snapshots beside it. Much else is called `config`, also of a store.
    fn wrote_config(&self) -> Result<bool> {
        let begins = self.bucket.get(CONFIG_KEY, Some((0, CONFIG.len())));
        let is_remotes = begins.is_ok_and(|it| it.as_deref() == Some(&CONFIG));
        Ok(is_remotes || !self.bucket.list("heads/")?.is_empty())
    }

    /// The size of its pages.
    ///
    /// # Errors
    /// [`Error::NoRemote`], [`Error::NothingThere`]; if its configuration is damaged or newer.
    pub fn page_bytes(&self) -> Result<u64> {
        Ok(self.config()?.page_bytes)
    }

    pub(crate) fn config(&self) -> Result<Config> {
        self.check_there()?;
        self.config_of(self.bucket.get(CONFIG_KEY, None))
    }

    /// That there is something. All commands begin here, so nothing has been asked for yet.
    pub(crate) fn check_there(&self) -> Result<()> {
        match self.bucket.is_absent() {
            true => Err(self.nothing_there()),
            false => Ok(()),
        }
    }

    /// What this object of a bucket says of it.
    pub(crate) fn config_of(&self, found: Result<Option<Vec<u8>>, Unanswered>) -> Result<Config> {
        self.config_from(found)?.ok_or_else(|| Error::NoRemote {
            url: self.url.clone(),
        })
    }

    fn config_from(&self, found: Result<Option<Vec<u8>>, Unanswered>) -> Result<Option<Config>> {
        let found = found.map_err(|error| {
            let otherwise = error.wrong.and_then(|why| self.otherwise(why, false));
            otherwise.unwrap_or_else(|| error.into())
        });
        let Some(bytes) = found? else {
            return Ok(None);
        };
        match self.otherwise("", bytes.starts_with(&sealing::MAGIC)) {
            Some(error) => Err(error),
            None => Ok(Some(config_from(&bytes)?)),
        }
    }

    fn nothing_there(&self) -> Error {
        Error::NothingThere {
            url: self.url.clone(),
            was_there: self.was_there,
        }
    }

    /// The size of the pages of the snapshots that are there, if there are any: the first
    /// head that can be read tells. If there is none, and one is encrypted otherwise, that is
    /// the error.
    fn page_bytes_of_heads(&self) -> Result<Option<u64>> {
        let mut refused = None;
        for listed in self.bucket.list("heads/")? {
            let Some(Part::Head(name)) = Part::parse(&listed.key) else {
                continue;
            };
            match self.open_head_of(name, CONFIG_KEY) {
                Ok(opened) => {
                    if let Some(size) = page_size_of_manifest(&opened.head.manifest) {
                        return Ok(Some(size.bytes()));
                    }
                }
                Err(error @ Error::Protocol(protocol::Error::Newer { .. })) => {
                    refused = Some(error);
                }
                Err(Error::Protocol(protocol::Error::Damaged { key, reason })) => {
                    let magic = self.bucket.get(&key, Some((0, sealing::MAGIC.len())));
                    let is_sealed = magic.is_ok_and(|it| it.as_deref() == Some(&sealing::MAGIC));
                    refused = self.otherwise(reason, is_sealed).or(refused);
                }
                Err(Error::Protocol(protocol::Error::Missing { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        refused.map_or(Ok(None), Err)
    }

    /// That an object is encrypted otherwise than it should be, if it is. Without a key it can be
    /// seen from what it begins with, with one from what was wrong.
    fn otherwise(&self, reason: &'static str, is_sealed: bool) -> Option<Error> {
        let url = self.url.clone();
        match &self.place.key {
            None => is_sealed.then_some(Error::NoKey { url }),
            Some(key) => {
                let path = key.clone();
                match reason {
                    sealing::OTHER_KEY => Some(Error::OtherKey { url, path }),
                    sealing::IN_CLEAR => Some(Error::InClearThere { url, path }),
                    sealing::NEWER => Some(self.place.unusable(sealing::NEWER)),
                    _ => None,
                }
            }
        }
    }

    /// What the bucket says of itself, if its pages are as long as the store's.
    pub(crate) fn check_pages(&self, store: &Store) -> Result<Config> {
        let config = self.config()?;
        self.check_pages_of(&config, store)?;
        Ok(config)
    }

    pub(crate) fn check_pages_of(&self, config: &Config, store: &Store) -> Result<()> {
        let (remote_bytes, store_bytes) = (config.page_bytes, store.page_size().bytes());
        match remote_bytes == store_bytes {
            true => Ok(()),
            false => Err(Error::OtherPageSize {
                url: self.url.clone(),
                remote_bytes,
                store_bytes,
            }),
        }
    }
}

fn config_from(bytes: &[u8]) -> Result<Config> {
    let payload = unseal(CONFIG, CONFIG_KEY, bytes).map_err(|error| error.of(CONFIG_KEY))?;
    let id = payload.last_chunk::<16>();
    match (payload.first_chunk::<4>(), id) {
        (Some(bytes), Some(id)) if payload.len() == 20 => Ok(Config {
            page_bytes: u32::from_le_bytes(*bytes).into(),
            id: *id,
        }),
        _ => Err(protocol::Malformed::Wrong("it has another length")
            .of(CONFIG_KEY)
            .into()),
    }
}
