//! `snapstore gc`

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use snapstore_store::{
    Decision, Error, GcOptions, GcReport, OptimizeOptions, OptimizeReport, OptimizeStop,
    Reclaimable, Store, be_patient,
};

use crate::args::GcArgs;
use crate::commands::ended;
use crate::context::Context;
use crate::exit;
use crate::format::{count, counted, size, table};
use crate::hints;
use crate::known;
use crate::progress::{Bar, Unit};

pub fn run(context: &Context, args: &GcArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let options = GcOptions {
        dry_run: args.dry_run,
        keep_percent: args.keep_percent,
    };
    if args.optimize {
        be_patient();
    }
    let store = context.open()?;
    // First: what a collection merges would be rewritten twice.
    let optimized = optimize(&store, args)?;
    let mut report = store.gc(options, &Bar::new(Unit::Items)).map_err(told)?;
    report.freed_bytes += optimized.as_ref().map_or(0, |it| it.freed_bytes);
    if !args.dry_run {
        // It takes no room to speak of.
        if let Err(error) = known::tidy(store.path()) {
            tracing::warn!(%error, "what an unfinished `remote add` left is still there");
        }
    }
    let budget = Budget::of(&store, args, &report)?;
    let mut value = serde_json::to_value(&report)?;
    value["budget"] = serde_json::to_value(&budget)?;
    value["optimized"] = serde_json::to_value(&optimized)?;
    context.answer(&value, || {
        let mut out = describe(&report, args.dry_run);
        out += &optimized
            .as_ref()
            .map_or_else(String::new, |it| describe_optimized(it, args.dry_run));
        out + &budget.as_ref().map(Budget::describe).unwrap_or_default()
    })?;
    Ok(match budget {
        Some(budget) if budget.over_bytes > 0 => {
            let over = size(budget.over_bytes);
            ended(exit::FAILED, &format!("{over} too much is left"))
        }
        _ => ExitCode::SUCCESS,
    })
}

fn told(error: Error) -> anyhow::Error {
    match error.is_of_what_is_stored() {
        true => anyhow::Error::from(error).context("nothing can be freed as long as this is so"),
        false => error.into(),
    }
}

/// None unless it is asked for.
fn optimize(store: &Store, args: &GcArgs) -> anyhow::Result<Option<OptimizeReport>> {
    if !args.optimize {
        return Ok(None);
    }
    let options = OptimizeOptions {
        dry_run: args.dry_run,
        within: args.max_seconds.map(Duration::from_secs),
        most_bytes: None,
    };
    let report = store.optimize(options, &Bar::new(Unit::Items));
    report.map(Some).map_err(told)
}

/// What is left beside what may be.
#[derive(serde::Serialize)]
struct Budget {
    /// The length of all files of the store.
    store_bytes: u64,
    /// What is free on its filesystem for this user.
    free_bytes: u64,
    /// How much has to go.
    over_bytes: u64,
    /// The tags to remove for that, the oldest first.
    to_remove: Vec<Reclaimable>,
    /// Whether that would do.
    enough: bool,
}

impl Budget {
    /// None unless one of the options is given.
    fn of(store: &Store, args: &GcArgs, report: &GcReport) -> anyhow::Result<Option<Self>> {
        if args.max_store.is_none() && args.reserve.is_none() {
            return Ok(None);
        }
        // Of a plan: what there would be.
        let freed = match args.dry_run {
            true => report.plan.freed_bytes(),
            false => 0,
        };
        let store_bytes = store.bytes_on_disk()?.saturating_sub(freed);
        let disk = rustix::fs::statvfs(store.path())
            .with_context(|| format!("cannot ask how full {} is", store.path().display()))?;
        let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize) + freed;
        let over_store = args
            .max_store
            .map_or(0, |most| store_bytes.saturating_sub(most));
        let over_disk = args
            .reserve
            .map_or(0, |least| least.saturating_sub(free_bytes));
        let over_bytes = over_store.max(over_disk);
        let mut to_remove = Vec::new();
        let mut left = over_bytes;
        if over_bytes > 0 {
            for tag in store.reclaimable()? {
                if left == 0 {
                    break;
                }
                left = left.saturating_sub(tag.freed_stored_bytes);
                to_remove.push(tag);
            }
        }
        Ok(Some(Self {
            store_bytes,
            free_bytes,
            over_bytes,
            to_remove,
            enough: left == 0,
        }))
    }

    fn describe(&self) -> String {
        let is = format!(
            "The store takes {}; {} are free on its disk",
            size(self.store_bytes),
            size(self.free_bytes)
        );
        if self.over_bytes == 0 {
            return format!("{is}: as it should be.\n");
        }
        let mut out = format!("{is}: {} too much is left.\n", size(self.over_bytes));
        let rows: Vec<_> = self
            .to_remove
            .iter()
            .map(|tag| vec![tag.tag.clone(), size(tag.freed_stored_bytes)])
            .collect();
        if rows.is_empty() {
            return out + "There is no tag that could go.\n";
        }
        out += "These tags would have to go, the oldest first (see `snapstore forget`):\n";
        out += &table(&["TAG", "FREES"], 1, &rows);
        if !self.enough {
            out += "Even without them there would be too much: see what else fills the disk.\n";
        }
        out
    }
}

fn describe(report: &GcReport, dry_run: bool) -> String {
    let rows: Vec<_> = report
        .plan
        .packs
        .iter()
        .filter(|pack| pack.decision != Decision::Keep)
        .map(|pack| {
            vec![
                pack.pack.clone(),
                match pack.decision {
                    Decision::Keep => "keep",
                    Decision::Repack => "repack",
                    Decision::Delete => "delete",
                }
                .to_owned(),
                size(pack.file_bytes),
                size(pack.live_bytes),
                format!("{}/{}", count(pack.live_chunks), count(pack.chunks)),
            ]
        })
        .collect();
    let kept = match report.plan.packs.len() - rows.len() {
        1 => "1 pack stays as it is".to_owned(),
        kept => format!("{} packs stay as they are", count(kept as u64)),
    };
    let mut out = String::new();
    if !rows.is_empty() {
        out += &table(
            &["PACK", "PLAN", "SIZE", "NEEDED", "CHUNKS NEEDED"],
            2,
            &rows,
        );
    }
    if dry_run {
        let would_be_freed = size(report.plan.freed_bytes());
        out += &format!("Would free {would_be_freed}; {kept}.\n");
        return out + &left(report);
    }
    out += &format!(
        "Freed {}; {kept}.\n",
        size(u64::try_from(report.freed_bytes).unwrap_or(0))
    );
    if report.waiting_packs > 0 {
        out += &format!(
            "A later gc frees {} more, when these commits have ended: {}.\n",
            counted(report.waiting_packs, "pack"),
            report.waiting_for.join(", ")
        );
    }
    out += &left(report);
    if report.out_of_room {
        out += "The disk is too full to repack the rest; run gc again when there is some room.\n";
    }
    out
}

fn describe_optimized(report: &OptimizeReport, dry_run: bool) -> String {
    let packs = |number: u64| counted(number, "pack");
    let mut out = match (report.packs, dry_run) {
        (0, _) if report.left_packs == 0 => return "Everything is optimised.\n".to_owned(),
        (0, _) => String::new(),
        (number, true) => format!(
            "Would rewrite {} of {}, to {} at most.\n",
            packs(number),
            size(report.pack_bytes),
            size(report.written_bytes)
        ),
        (number, false) => format!(
            "Rewrote {} of {} to {}.\n",
            packs(number),
            size(report.pack_bytes),
            size(report.written_bytes)
        ),
    };
    let reason = match report.stopped_by {
        None => return out,
        Some(OptimizeStop::Time | OptimizeStop::Bytes) => "the time was over".to_owned(),
        Some(OptimizeStop::Allowance) => format!(
            "of {} that commits wrote {} were rewritten, and twice as much is the most",
            size(report.committed_bytes),
            size(report.rewritten_bytes)
        ),
        Some(OptimizeStop::Writers) => format!(
            "these commits have to end first: {}",
            report.waiting_for.join(", ")
        ),
    };
    out += &format!(
        "Left for another time are {} with {}: {reason}.\n",
        packs(report.left_packs),
        size(report.left_bytes)
    );
    for damage in &report.not_copied {
        out += &format!("It stays where it is: {}\n", hints::told_damage(damage));
    }
    out
}

/// Packs that cannot be judged.
fn left(report: &GcReport) -> String {
    let damaged = report.plan.damaged.iter().chain(&report.not_copied);
    let denied = report.plan.denied.iter().map(|path| Error::Denied {
        path: path.to_owned(),
    });
    damaged
        .map(hints::told_damage)
        .chain(denied.map(|error| error.to_string()))
        .map(|told| format!("Its pack stays as it is: {told}\n"))
        .collect()
}
