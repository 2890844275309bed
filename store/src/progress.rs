//! How long operations tell how far they are.

/// Receives the progress of a long operation. Called from one thread at a time.
///
/// ```
/// use snapstore_store::{PageSize, Progress, Store};
///
/// struct Print;
///
/// impl Progress for Print {
///     fn begin(&self, what: &str, total: u64) {
///         println!("{what}, {total} in all");
///     }
///     fn advance(&self, done: u64) {
///         println!("{done}");
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(&dir.path().join("store"), PageSize::default())?;
/// let report = store.verify(true, &Print)?;
/// assert!(report.findings.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Progress: Sync {
    /// A part begins: what it is, and how many units (bytes or items) it has.
    fn begin(&self, what: &str, total: u64);
    /// So many units of the part are done.
    fn advance(&self, done: u64);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _what: &str, _total: u64) {}
    fn advance(&self, _done: u64) {}
}
