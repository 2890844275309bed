//! A bucket over the network: S3, Google Cloud Storage, Azure, and servers that speak as
//! these do. Callers wait; the runtime that the library needs is private.
//!
//! A request is tried again as long as [`Place::retry_seconds`] says, which is safe since
//! the bytes of a key are always the same. An object is also written with the condition
//! that there is none, where the server has that. No safety rests on it: it finds two
//! hosts that drew the same name, such as copies of one machine.

mod build;
mod count;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use object_store::path::{Error as PathError, Path};
use object_store::{
    Error as StoreError, GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, WriteMultipart,
};
use tokio::runtime::Runtime;

use self::build::Idle;
use self::count::{Counter, NO_CREDENTIALS};
use crate::error::Result;
use crate::objects::{
    Hedge, MOST_LISTED, Objects, Part, Requests, TOO_LONG, longest_bytes, no, refused, wrong,
};
use crate::place::Place;
use crate::protocol::{Listed, Unanswered};

/// What is longer is written in parts.
const MOST_AT_ONCE_BYTES: usize = 16 << 20;
const PART_BYTES: usize = 8 << 20;
const PARTS_AT_ONCE: usize = 4;
/// However slowly a server answers, an operation ends.
const MOST: Duration = Duration::from_secs(15 * 60);
/// What is shown of what a server says.
const MOST_TOLD_CHARS: usize = 600;

const OTHER_WRITER: &str = "another host has written another object under the same name: are \
    two hosts copies of one machine, with the same random numbers?";
const ODD_NAME: &str = "its name is none that a host gives: remove it";
const NOT_ASKED: &str = "the server lists it, and it was not asked for";

/// A bucket, or what is below a prefix of it.
#[derive(Debug)]
pub struct Cloud {
    store: Box<dyn ObjectStore>,
    /// For what is asked a second time, once there is such a thing: each request has a connection
    /// of its own. One that is idle may be held where the first request is.
    fresh: OnceLock<Option<Box<dyn ObjectStore>>>,
    opened: Opened,
    prefix: String,
    counter: Arc<Counter>,
    /// Whether the server knows conditional writes, as far as is known.
    has_conditions: AtomicBool,
    runtime: Runtime,
}

/// What a client is made for.
#[derive(Debug)]
struct Opened {
    place: Place,
    scheme: String,
    bucket: String,
    silent: Option<Duration>,
}

impl Cloud {
    /// Nothing is asked of it yet. With a limit to its silence, each request is one attempt.
    pub fn open(
        place: &Place,
        (scheme, bucket, prefix): (&str, &str, &str),
        silent: Option<Duration>,
    ) -> Result<Self> {
        if Path::parse(prefix).is_err() {
            return Err(place.unusable("its prefix cannot be that of an object's name"));
        }
        let counter = Arc::new(Counter::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("remote")
            .enable_all()
            .build()
            .map_err(|error| place.unusable(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            store: build::store(place, (scheme, bucket), silent, Idle::Kept, &counter)?,
            fresh: OnceLock::new(),
            opened: Opened {
                place: place.clone(),
                scheme: scheme.to_owned(),
                bucket: bucket.to_owned(),
                silent,
            },
            prefix: match prefix {
                "" => String::new(),
                prefix => format!("{prefix}/"),
            },
            counter,
            has_conditions: AtomicBool::new(true),
            runtime,
        })
    }

    fn fresh(&self) -> &dyn ObjectStore {
        let made = self.fresh.get_or_init(|| {
            let Opened {
                place,
                scheme,
                bucket,
                silent,
            } = &self.opened;
            build::store(
                place,
                (scheme, bucket),
                *silent,
                Idle::Closed,
                &self.counter,
            )
            .ok()
        });
        made.as_deref().unwrap_or(&*self.store)
    }

    fn path(&self, what: &'static str, key: &str) -> Result<Path, Unanswered> {
        let path = Path::parse(format!("{}{}", self.prefix, key.trim_end_matches('/')));
        path.map_err(|error| no(what, key, error.to_string()))
    }

    /// Waits for an operation, within bounds.
    fn wait<T>(
        &self,
        what: &'static str,
        key: &str,
        work: impl Future<Output = Result<T, Unanswered>>,
    ) -> Result<T, Unanswered> {
        self.wait_within(MOST, what, key, work)
    }

    fn wait_within<T>(
        &self,
        within: Duration,
        what: &'static str,
        key: &str,
        work: impl Future<Output = Result<T, Unanswered>>,
    ) -> Result<T, Unanswered> {
        self.runtime.block_on(async {
            let late = |_| no(what, key, format!("no end after {within:?}"));
            let bounded = tokio::time::timeout(within, work);
            bounded.await.map_err(late)?
        })
    }

    async fn put_at_once(&self, key: &str, path: &Path, bytes: &[u8]) -> Result<(), Unanswered> {
        let payload = PutPayload::from(bytes.to_vec());
        if self.has_conditions.load(Ordering::Relaxed) {
            let options = PutOptions::from(PutMode::Create);
            match self.store.put_opts(path, payload.clone(), options).await {
                Ok(_) => return Ok(()),
                Err(StoreError::AlreadyExists { .. }) => {
                    // That one's own earlier attempt is seen by this read is no sign that it
                    // is seen by the next one: only an acknowledged write is.
                    match self.read(key, path, None).await? {
                        Some(found) if found != bytes => {
                            return Err(wrong("write", key, OTHER_WRITER));
                        }
                        _ => {}
                    }
                }
                Err(error) if is_refused(&error) => return Err(failed("write", key, &error)),
                Err(error) => {
                    if is_unknown_to_server(&error) {
                        self.has_conditions.store(false, Ordering::Relaxed);
                    }
                }
            }
        }
        match self.store.put(path, payload).await {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("write", key, &error)),
        }
    }

    async fn put_in_parts(&self, key: &str, path: &Path, bytes: &[u8]) -> Result<(), Unanswered> {
        let told = |error: StoreError| failed("write", key, &error);
        let begun = self
            .store
            .put_multipart_opts(path, PutMultipartOptions::default());
        let mut upload =
            WriteMultipart::new_with_chunk_size(begun.await.map_err(told)?, PART_BYTES);
        for part in bytes.chunks(PART_BYTES) {
            if let Err(error) = upload.wait_for_capacity(PARTS_AT_ONCE).await {
                // Parts that stay are invisible; the bucket's own rule removes them.
                let _ = upload.abort().await;
                return Err(told(error));
            }
            upload.write(part);
        }
        upload.finish().await.map_err(told)?;
        Ok(())
    }

    async fn read(
        &self,
        key: &str,
        path: &Path,
        part: Option<Part>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        self.read_from(&*self.store, key, path, part).await
    }

    async fn read_from(
        &self,
        store: &dyn ObjectStore,
        key: &str,
        path: &Path,
        part: Option<Part>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        let longest = longest_bytes(key);
        let options = GetOptions {
            range: part
                .map(|(from, len)| GetRange::Bounded(from..from.saturating_add(len.max(1) as u64))),
            ..GetOptions::default()
        };
        let found = match store.get_opts(path, options).await {
            Ok(found) => found,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return self.read_less(key, path, part, error).await,
        };
        if found.meta.size > longest {
            return Err(wrong("read", key, TOO_LONG));
        }
        // The server may send another number of bytes than it tells.
        let most = part.map_or(longest, |(_, len)| len as u64);
        let mut bytes = Vec::new();
        let mut stream = found.into_stream();
        while let Some(some) = stream.next().await {
            let some = some.map_err(|error| failed("read", key, &error))?;
            let left = usize::try_from(most).unwrap_or(usize::MAX) - bytes.len();
            if some.len() > left {
                match part {
                    Some(_) => bytes.extend_from_slice(&some[..left]),
                    None => return Err(wrong("read", key, TOO_LONG)),
                }
                break;
            }
            bytes.extend_from_slice(&some);
        }
        Ok(Some(bytes))
    }

    /// A part behind an object's end is refused, and one that reaches over it may be: then as
    /// much is read as there is.
    async fn read_less(
        &self,
        key: &str,
        path: &Path,
        part: Option<Part>,
        error: StoreError,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        let told = failed("read", key, &error);
        let Some((from, len)) = part else {
            return Err(told);
        };
        let size = match self.store.head(path).await {
            Ok(meta) => meta.size,
            Err(_) => return Err(told),
        };
        if size >= from.saturating_add(len as u64) {
            return Err(told);
        }
        let there = usize::try_from(size.saturating_sub(from)).unwrap_or(0);
        if there == 0 {
            return Ok(Some(Vec::new()));
        }
        Box::pin(self.read(key, path, Some((from, there)))).await
    }

    /// The key that cannot be one.
    fn odd_key(&self, error: &PathError) -> Option<String> {
        let path = match error {
            PathError::EmptySegment { path }
            | PathError::BadSegment { path, .. }
            | PathError::NonUnicode { path, .. } => path.as_str(),
            PathError::InvalidPath { path } | PathError::Canonicalize { path, .. } => {
                path.to_str()?
            }
            _ => return None,
        };
        let key = path.strip_prefix(&self.prefix).unwrap_or(path);
        Some(key.escape_debug().to_string())
    }

    async fn read_list(&self, prefix: &str, path: &Path) -> Result<Vec<Listed>, Unanswered> {
        let mut found = Vec::new();
        let mut pages = self.store.list(Some(path));
        while let Some(meta) = pages.next().await {
            let meta = meta.map_err(|error| match error {
                StoreError::InvalidPath { source } => {
                    let key = self.odd_key(&source);
                    wrong("list", key.as_deref().unwrap_or(prefix), ODD_NAME)
                }
                error => failed("list", prefix, &error),
            })?;
            let path = meta.location.as_ref();
            let key = path.strip_prefix(&self.prefix);
            let Some(key) = key.filter(|key| key.starts_with(prefix)) else {
                return Err(wrong("list", &path.escape_debug().to_string(), NOT_ASKED));
            };
            if found.len() >= MOST_LISTED {
                let reason = "there are more objects than a listing may have (4194304)";
                return Err(wrong("list", prefix, reason));
            }
            found.push(Listed {
                key: key.to_owned(),
                len_bytes: meta.size,
                modified: u64::try_from(meta.last_modified.timestamp()).unwrap_or_default(),
            });
        }
        found.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }
}

impl Objects for Cloud {
    /// Buckets are made by their owners.
    fn create(&self) -> Result<(), Unanswered> {
        Ok(())
    }

    fn is_absent(&self) -> bool {
        false
    }

    fn put(&self, key: &str, bytes: &[u8]) -> Result<(), Unanswered> {
        let path = self.path("write", key)?;
        self.wait("write", key, async {
            match bytes.len() <= MOST_AT_ONCE_BYTES {
                true => self.put_at_once(key, &path, bytes).await,
                false => self.put_in_parts(key, &path, bytes).await,
            }
        })
    }

    fn get(&self, key: &str, part: Option<Part>) -> Result<Option<Vec<u8>>, Unanswered> {
        let path = self.path("read", key)?;
        self.wait("read", key, self.read(key, &path, part))
    }

    fn get_within(
        &self,
        key: &str,
        part: Option<Part>,
        within: Duration,
        hedge: Option<Hedge<'_>>,
    ) -> Result<Option<Vec<u8>>, Unanswered> {
        let path = self.path("read", key)?;
        let first = self.read(key, &path, part);
        self.wait_within(within.min(MOST), "read", key, async {
            match hedge {
                None => first.await,
                Some(hedge) => {
                    let again = || self.read_from(self.fresh(), key, &path, part);
                    first_of(first, again, hedge).await
                }
            }
        })
    }

    fn exists(&self, key: &str) -> Result<bool, Unanswered> {
        let path = self.path("look for", key)?;
        self.wait("look for", key, async {
            match self.store.head(&path).await {
                Ok(_) => Ok(true),
                Err(error) if is_not_found(&error) => Ok(false),
                Err(error) => Err(failed("look for", key, &error)),
            }
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, Unanswered> {
        let path = self.path("list", prefix)?;
        self.wait("list", prefix, self.read_list(prefix, &path))
    }

    fn delete(&self, key: &str) -> Result<(), Unanswered> {
        let path = self.path("delete", key)?;
        self.wait("delete", key, async {
            match self.store.delete(&path).await {
                Ok(()) => Ok(()),
                Err(error) if is_not_found(&error) => Ok(()),
                Err(error) => Err(failed("delete", key, &error)),
            }
        })
    }

    fn requests(&self) -> Option<Requests> {
        Some(self.counter.requests())
    }
}

/// Asks, and once more if that is late: the first answer counts, and an error only where the
/// other one has none either. The one that is not needed is given up.
async fn first_of<T, F: Future<Output = Result<T, Unanswered>>>(
    first: impl Future<Output = Result<T, Unanswered>>,
    again: impl FnOnce() -> F,
    hedge: Hedge<'_>,
) -> Result<T, Unanswered> {
    let (first, late) = (pin!(first), pin!(tokio::time::sleep(hedge.after)));
    let first = match select(first, late).await {
        Either::Left((answer, _)) => return answer,
        Either::Right(((), first)) => first,
    };
    if !(hedge.may)() {
        return first.await;
    }
    let of_second = |answer: Result<T, Unanswered>| {
        if answer.is_ok() {
            (hedge.won)();
        }
        answer
    };
    let second = pin!(again());
    match select(first, second).await {
        Either::Left((Ok(answer), _)) => Ok(answer),
        Either::Left((Err(error), second)) => of_second(second.await).map_err(|_| error),
        Either::Right((Err(_), first)) => first.await,
        Either::Right((answer, _)) => of_second(answer),
    }
}

/// Whether an object is not there, rather than the bucket.
fn is_not_found(error: &StoreError) -> bool {
    matches!(error, StoreError::NotFound { .. })
        && !["NoSuchBucket", "ContainerNotFound"]
            .iter()
            .any(|code| error.to_string().contains(code))
}

fn is_refused(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
            | StoreError::NotFound { .. }
    )
}

fn is_unknown_to_server(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::NotImplemented { .. } | StoreError::NotSupported { .. }
    ) || error.to_string().contains("NotImplemented")
}

/// An error and its causes, where it does not tell them itself.
fn told_by(error: &StoreError) -> String {
    let mut told = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !told.contains(&text) {
            told = format!("{told}: {text}");
        }
        cause = error.source();
    }
    told
}

/// What failed, in the server's words as far as they can be shown.
fn failed(what: &'static str, key: &str, error: &StoreError) -> Unanswered {
    let told = told_by(error);
    if told.contains(NO_CREDENTIALS) {
        // It was not sent.
        return refused(what, key, NO_CREDENTIALS.to_owned());
    }
    let mut reason: String = told.chars().take(MOST_TOLD_CHARS).collect();
    if reason.len() < told.len() {
        reason.push('…');
    }
    if reason.chars().any(char::is_control) {
        reason = reason
            .chars()
            .map(|one| if one.is_control() { ' ' } else { one })
            .collect();
    }
    match error {
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
            reason = format!("the server refuses these credentials: {reason}");
        }
        StoreError::NotFound { .. } => reason = format!("there is no such bucket: {reason}"),
        _ => {}
    }
    no(what, key, reason)
}
