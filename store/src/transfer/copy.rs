//! From one store into another, without a stream that anybody sees.

use std::io;
use std::path::Path;
use std::thread;

use crate::error::{Error, Result};
use crate::progress::{Progress, Silent};
use crate::store::Store;
use crate::transfer::{ExportRequest, Exported, ImportRequest, Imported};

/// How often all is sent when a repair or a collection took away what was there.
const ATTEMPTS: u32 = 3;

impl Store {
    /// Imports what `from` exports. An error of the export comes before those that
    /// the import has for its sake.
    ///
    /// # Errors
    /// As [`Store::export`] of `from`, and [`Store::import`].
    pub fn copy_from(
        &self,
        from: &Self,
        export: &ExportRequest,
        import: &ImportRequest,
        progress: &dyn Progress,
    ) -> Result<(Exported, Imported)> {
        let mut attempts = ATTEMPTS;
        loop {
            attempts -= 1;
            match self.try_copy_from(from, export, import, progress) {
                Err(error @ Error::Overtaken { .. }) if attempts > 0 => {
                    tracing::debug!(%error, "copies again");
                }
                other => return other,
            }
        }
    }

    fn try_copy_from(
        &self,
        from: &Self,
        export: &ExportRequest,
        import: &ImportRequest,
        progress: &dyn Progress,
    ) -> Result<(Exported, Imported)> {
        let no_pipe = |error| Error::io("make a pipe for", Path::new(&export.label), error);
        let (reader, writer) = io::pipe().map_err(no_pipe)?;
        let (exported, imported) = thread::scope(|scope| {
            let imports = thread::Builder::new()
                .name("import".to_owned())
                .spawn_scoped(scope, || self.import(import, reader, &Silent))
                .map_err(no_pipe)?;
            let exported = from.export(export, io::BufWriter::new(writer), progress);
            let imported = imports.join().expect("an import does not panic");
            Ok::<_, Error>((exported, imported))
        })?;
        match (exported, imported) {
            // Whoever reads no more says why.
            (Err(Error::Io { source, .. }), Err(import))
                if source.kind() == io::ErrorKind::BrokenPipe =>
            {
                Err(import)
            }
            (Err(export), _) => Err(export),
            (Ok(_), Err(import)) => Err(import),
            (Ok(exported), Ok(imported)) => Ok((exported, imported)),
        }
    }
}
