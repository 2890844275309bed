//! Comparing a stored image with its original, byte for byte.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::fs::SeekFrom;
use snapstore_store::ImageReader;

const BUFFER_LEN: usize = 1 << 20;
const FIRST_READ_LEN: usize = 4096;

/// Where to read a stored image.
pub enum Stored {
    File { file: File, size_bytes: u64 },
    Library(ImageReader),
}

pub enum Comparison {
    Equal {
        bytes: u64,
    },
    /// The lengths differ.
    Lengths {
        stored: u64,
        image: u64,
    },
    /// The first byte that differs.
    Differs {
        at: u64,
    },
}

impl Stored {
    pub fn file(path: &Path) -> anyhow::Result<Self> {
        let (file, size_bytes) = open(path)?;
        Ok(Self::File { file, size_bytes })
    }

    fn size_bytes(&self) -> u64 {
        match self {
            Self::File { size_bytes, .. } => *size_bytes,
            Self::Library(reader) => reader.size_bytes(),
        }
    }

    /// Fills `out`, which lies within the image.
    fn read(&self, out: &mut [u8], at: u64) -> anyhow::Result<()> {
        match self {
            Self::File { file, .. } => file.read_exact_at(out, at)?,
            Self::Library(reader) => {
                let len = reader.read_at(out, at)?;
                anyhow::ensure!(len == out.len(), "the image ended early");
            }
        }
        Ok(())
    }
}

/// Compares all bytes. `go_on` is asked from time to time, and its error ends
/// the comparison.
pub fn compare(
    stored: &Stored,
    image: &Path,
    go_on: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Comparison> {
    let (file, bytes) = open(image)?;
    if bytes != stored.size_bytes() {
        return Ok(Comparison::Lengths {
            stored: stored.size_bytes(),
            image: bytes,
        });
    }
    let mut buffers = (vec![0; BUFFER_LEN], vec![0; BUFFER_LEN]);
    let mut at = 0;
    while at < bytes {
        go_on()?;
        let len = usize::try_from(bytes - at).map_or(BUFFER_LEN, |left| left.min(BUFFER_LEN));
        let (ours, original) = (&mut buffers.0[..len], &mut buffers.1[..len]);
        stored
            .read(ours, at)
            .with_context(|| format!("cannot read the stored image at byte {at:#x}"))?;
        file.read_exact_at(original, at)
            .with_context(|| format!("cannot read {}", image.display()))?;
        if ours != original {
            let equal = ours.iter().zip(&*original).take_while(|(a, b)| a == b);
            return Ok(Comparison::Differs {
                at: at + equal.count() as u64,
            });
        }
        at += len as u64;
    }
    Ok(Comparison::Equal { bytes })
}

/// Opens a mounted file and reads its first stored bytes; returns where they
/// were and how long all of that took.
pub fn first_read(path: &Path) -> anyhow::Result<(u64, Duration)> {
    let started = Instant::now();
    let (file, _) = open(path)?;
    // A file without any data has its end there.
    let at = rustix::fs::seek(&file, SeekFrom::Data(0)).unwrap_or(0);
    let mut bytes = [0; FIRST_READ_LEN];
    file.read_at(&mut bytes, at)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok((at, started.elapsed()))
}

fn open(path: &Path) -> anyhow::Result<(File, u64)> {
    let failed = || format!("cannot open {}", path.display());
    let file = File::open(path).with_context(failed)?;
    let size_bytes = file.metadata().with_context(failed)?.len();
    Ok((file, size_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let name = format!("snapstore-compare-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).expect("the temporary directory is writable");
        path
    }

    #[test]
    fn the_first_different_byte_is_found() {
        let mut bytes = vec![7; BUFFER_LEN + 100];
        let image = file("image", &bytes);
        bytes[BUFFER_LEN + 42] = 8;
        let changed = file("changed", &bytes);
        let short = file("short", &bytes[1..]);
        let result = |path: &Path| {
            let stored = Stored::file(path).expect("the file is there");
            compare(&stored, &image, || Ok(())).expect("both can be read")
        };
        let len = bytes.len() as u64;
        assert!(matches!(result(&image), Comparison::Equal { bytes } if bytes == len));
        let differs = BUFFER_LEN as u64 + 42;
        assert!(matches!(result(&changed), Comparison::Differs { at } if at == differs));
        assert!(matches!(result(&short), Comparison::Lengths { stored, .. } if stored == len - 1));
        for path in [image, changed, short] {
            std::fs::remove_file(path).expect("it was made above");
        }
    }
}
