//! Packs on their way into the bucket, of a push or of a repack, with signs of life meanwhile.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::error::usable;
use crate::head::u32_of;
use crate::hooks;
use crate::pack::{PACK_CHECK_LEN, PackBytes};
use crate::protocol::{Error, Lease, Name, Result, put_surely};
use crate::remote::Remote;

/// How often a long push or repack gives a sign of life.
const BEAT_EVERY_SECONDS: u64 = 60;

/// The packs of one session, of which one is being filled.
pub struct Outgoing<'a> {
    pub remote: &'a Remote,
    pub lease: &'a mut Lease,
    pub pack: PackBytes,
    /// How long the packs are that were uploaded, without their lists of pages.
    pub lengths: BTreeMap<Name, u32>,
    hooks: hooks::Run,
    last_beat: Instant,
}

/// Gives a sign of life, if the last one was long ago.
pub async fn beat_at_times(remote: &Remote, lease: &mut Lease, last: &mut Instant) -> Result<()> {
    if last.elapsed().as_secs() >= BEAT_EVERY_SECONDS {
        lease.beat(remote).await?;
        *last = Instant::now();
    }
    Ok(())
}

impl<'a> Outgoing<'a> {
    pub fn new(remote: &'a Remote, lease: &'a mut Lease) -> Self {
        Self {
            remote,
            pack: PackBytes::new(lease.next_name()),
            lease,
            lengths: BTreeMap::new(),
            hooks: hooks::Run::default(),
            last_beat: Instant::now(),
        }
    }

    pub async fn beat(&mut self) -> Result<()> {
        beat_at_times(self.remote, self.lease, &mut self.last_beat).await
    }

    /// Uploads the pack, and begins the next one. Returns the number of bytes.
    pub async fn finish_pack(&mut self) -> Result<u64> {
        let next = PackBytes::new(self.lease.next_name());
        let pack = std::mem::replace(&mut self.pack, next);
        self.upload(pack).await
    }

    /// Uploads a pack that was made elsewhere. Returns the number of bytes, with those of hooks.
    pub async fn upload(&mut self, pack: PackBytes) -> Result<u64> {
        let pack = pack.finish();
        put_surely(self.remote, &pack.name.pack_key(), &pack.bytes).await?;
        self.lengths
            .insert(pack.name, pack.list_at + u32_of(PACK_CHECK_LEN));
        self.hooks.add(&pack);
        let mut bytes = pack.bytes.len() as u64;
        if self.hooks.is_full() {
            bytes += self.write_hooks().await?;
        }
        Ok(bytes)
    }

    /// Tells others which pages were uploaded. Nobody relies on it.
    pub async fn write_hooks(&mut self) -> Result<u64> {
        let run = std::mem::take(&mut self.hooks);
        if run.is_empty() {
            return Ok(0);
        }
        let key = self.lease.next_name().hooks_key();
        let bytes = run.encode(&key);
        let written = put_surely(self.remote, &key, &bytes).await;
        let written = usable(written.map_err(Error::from))?;
        Ok(written.map_or(0, |()| bytes.len() as u64))
    }
}
