//! How pages compress, and how fast: what the choice of codec rests on.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;
use zstd::zstd_safe::{CCtx, DCtx, compress_bound};

use crate::Bench;
use crate::guest::{PAGE, distinct_pages};
use crate::stats::{Random, Run, alternate};

/// Pages that are looked at.
const SAMPLE: usize = 8192;

/// Frames of one way to compress.
struct Way {
    name: String,
    level: i32,
    /// Payload, and the page that a delta is made against or nothing.
    payloads: Vec<(Vec<u8>, Vec<u8>)>,
    pages: usize,
}

/// zstd's levels and frame lengths, and deltas.
///
/// # Errors
/// If something fails.
pub fn codec(bench: &mut Bench) -> anyhow::Result<()> {
    let (old, new) = (bench.images.read("base")?, bench.images.read("base+1")?);
    let pages = distinct_pages(&old);
    let mut ways = Vec::new();
    // The same pages in every way; neighbours stay together, as in a pack.
    let groups: Vec<&[&[u8]]> = pages.chunks_exact(16).collect();
    let chosen = Random::new(3).choose(&groups, SAMPLE / 16).concat();
    for (level, pages_per_frame) in [(1, 1), (1, 4), (1, 16), (3, 1), (3, 4), (3, 16)] {
        ways.push(Way {
            name: format!("zstd {level}, {pages_per_frame} a frame"),
            level,
            pages: chosen.len(),
            payloads: chosen
                .chunks(pages_per_frame)
                .map(|group| (group.concat(), Vec::new()))
                .collect(),
        });
    }
    let changed: Vec<_> = old
        .chunks(PAGE)
        .zip(new.chunks(PAGE))
        .filter(|(old, new)| old != new && [old, new].iter().all(|p| !snapstore_store::is_zero(p)))
        .map(|(old, new)| (new.to_vec(), old.to_vec()))
        .collect();
    let bare = changed.iter().map(|(new, _)| (new.clone(), Vec::new()));
    for (name, payloads) in [
        ("base+1's changed pages alone", bare.collect()),
        ("base+1's changed pages, delta", changed.clone()),
    ] {
        let (level, pages) = (1, changed.len());
        ways.push(Way {
            name: name.to_owned(),
            level,
            payloads,
            pages,
        });
    }
    let ratios = ways
        .iter()
        .map(Way::ratio)
        .collect::<anyhow::Result<Vec<_>>>()?;
    let subjects = ways
        .iter()
        .map(|way| -> Run<'_> { Box::new(|_| way.time()) });
    let done = alternate(bench.rounds, subjects.collect())?;
    for (figure, what) in ["encode", "decode"].into_iter().enumerate() {
        for (number, way) in ways.iter().enumerate() {
            let first = if way.name.starts_with("zstd") {
                0
            } else {
                ways.len() - 2
            };
            let what = format!("{what} a page, {} ({:.2}:1)", way.name, ratios[number]);
            let (this, baseline) = (&done[number][figure], &done[first][figure]);
            if number == first || number > 0 {
                bench.compare(&what, this, &ways[first].name, baseline, None);
            }
        }
    }
    Ok(())
}

impl Way {
    /// Payload bytes over frame bytes.
    #[expect(clippy::cast_precision_loss, reason = "a sample is small")]
    fn ratio(&self) -> anyhow::Result<f64> {
        let frames = self.encode(&mut CCtx::create())?;
        let bytes: usize = frames.iter().map(Vec::len).sum();
        Ok((self.pages * PAGE) as f64 / bytes as f64)
    }

    fn encode(&self, context: &mut CCtx<'_>) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::with_capacity(self.payloads.len());
        for (payload, base) in &self.payloads {
            let mut frame = vec![0; compress_bound(payload.len())];
            let len = context
                .compress_using_dict(&mut frame[..], payload, base, self.level)
                .map_err(zstd_error)?;
            frame.truncate(len);
            frames.push(frame);
        }
        Ok(frames)
    }

    /// Seconds per page to encode and to decode.
    fn time(&self) -> anyhow::Result<Vec<f64>> {
        let pages = f64::from(u32::try_from(self.pages)?);
        let start = Instant::now();
        let frames = self.encode(&mut CCtx::create())?;
        let encode = start.elapsed().as_secs_f64() / pages;
        let mut out = vec![0; 16 * PAGE];
        let mut context = DCtx::create();
        let start = Instant::now();
        for (frame, (_, base)) in frames.iter().zip(&self.payloads) {
            context
                .decompress_using_dict(&mut out[..], frame, base)
                .map_err(zstd_error)?;
            black_box(&out);
        }
        let decode = start.elapsed().as_secs_f64() / pages;
        for (frame, (payload, base)) in frames.iter().zip(&self.payloads) {
            let len = context
                .decompress_using_dict(&mut out[..], frame, base)
                .map_err(zstd_error)?;
            ensure!(
                &out[..len] == payload.as_slice(),
                "a frame decodes to other bytes"
            );
        }
        Ok(vec![encode, decode])
    }
}

fn zstd_error(code: usize) -> anyhow::Error {
    anyhow::anyhow!("zstd: {}", zstd::zstd_safe::get_error_name(code))
}
