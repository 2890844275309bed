//! `snapstore map`

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use anyhow::bail;
use serde_json::Value;
use snapstore_host::NotFound;
use snapstore_store::{Image, ImageRole, Manifest, PageKind, PageMap, SnapshotId};

use crate::args::MapArgs;
use crate::commands::tag::{tell_unreadable, unreadable};
use crate::context::Context;
use crate::format::{count, size, table};
use crate::logging::colours_refused;
use crate::map::Grid;

/// What a terminal has if nothing says otherwise.
const COLUMNS: usize = 80;

pub fn run(context: &Context, args: &MapArgs) -> anyhow::Result<ExitCode> {
    let context = &context.stopped_by_signals()?;
    let store = context.open()?;
    let (id, _pin) = store.pin(&args.snapshot)?;
    let manifest = store.manifest(id)?;
    let image = chosen(&manifest, args)?;
    let mut found = store.page_maps(&[(id, &image.name)])?;
    let Some(map) = found.maps.pop() else {
        bail!("no map was made of {}", args.snapshot);
    };
    let map = map?;
    let page_bytes = store.page_size().bytes();
    let mut value = Answer::new(&map, page_bytes);
    value.unreadable = unreadable(&found.unreadable);
    if context.json() {
        value.runs = runs(&map, page_bytes);
    }
    let parent = match map.parent {
        Some(parent) => store.tags_of(parent)?.into_iter().next(),
        None => None,
    };
    context.answer(&value, || {
        let stdout = io::stdout();
        let columns = args.width.or_else(|| {
            let size = rustix::termios::tcgetwinsize(&stdout).ok()?;
            (size.ws_col >= 20).then_some(usize::from(size.ws_col))
        });
        let colours = stdout.is_terminal() && !colours_refused();
        let grid = Grid::new(&map, page_bytes, columns.unwrap_or(COLUMNS));
        let legend = legend(&map, page_bytes, parent.as_deref());
        let cell = grid.pages_per_cell();
        format!(
            "{} of {}, {}; a cell is {} ({})\n\n{}\n{legend}",
            image.file_name(),
            args.snapshot,
            size(map.size_bytes),
            pages(cell),
            size(cell * page_bytes),
            grid.draw(colours),
        )
    })?;
    Ok(tell_unreadable(&found.unreadable))
}

/// The image that is asked for, else the memory, else the longest one.
fn chosen<'a>(manifest: &'a Manifest, args: &MapArgs) -> anyhow::Result<&'a Image> {
    if let Some(name) = &args.image {
        let by_file = |image: &&Image| image.file_name() == *name;
        let found = manifest.image(name);
        let found = found.or_else(|| manifest.images.iter().find(by_file));
        return Ok(found.ok_or_else(|| {
            NotFound(format!(
                "{0} has no image \"{name}\"; `snapstore show {0}` lists those it has",
                args.snapshot
            ))
        })?);
    }
    let order = |image: &&Image| (image.role == ImageRole::Memory, image.size_bytes);
    let image = manifest.images.iter().max_by_key(order);
    Ok(image.ok_or_else(|| NotFound(format!("{} has no images", args.snapshot)))?)
}

fn pages(number: u64) -> String {
    match number {
        1 => "1 page".to_owned(),
        number => format!("{} pages", count(number)),
    }
}

/// The map for programs. Runs may be as many as pages: they are not made into values.
#[derive(serde::Serialize)]
struct Answer<'a> {
    id: SnapshotId,
    image: &'a str,
    size_bytes: u64,
    page_bytes: u64,
    parent: Option<SnapshotId>,
    zero: Counted,
    shared_with_parent: Counted,
    shared: Counted,
    own: Counted,
    working_set: Option<Counted>,
    runs: Vec<Run>,
    unreadable: Vec<Value>,
}

#[derive(serde::Serialize)]
struct Counted {
    pages: u64,
    bytes: u64,
}

#[derive(serde::Serialize)]
struct Run {
    address: u64,
    pages: u64,
    kind: PageKind,
    working_set: bool,
}

impl<'a> Answer<'a> {
    /// Without its runs, which only programs are told.
    fn new(map: &'a PageMap, page_bytes: u64) -> Self {
        let counted = |pages: u64| Counted {
            pages,
            bytes: pages * page_bytes,
        };
        let recorded = map.has_working_set;
        Self {
            id: map.snapshot,
            image: &map.image,
            size_bytes: map.size_bytes,
            page_bytes,
            parent: map.parent,
            zero: counted(map.pages_of(PageKind::Zero)),
            shared_with_parent: counted(map.pages_of(PageKind::Parent)),
            shared: counted(map.pages_of(PageKind::Shared)),
            own: counted(map.pages_of(PageKind::Own)),
            working_set: recorded.then(|| counted(map.working_set_pages())),
            runs: Vec::new(),
            unreadable: Vec::new(),
        }
    }
}

fn runs(map: &PageMap, page_bytes: u64) -> Vec<Run> {
    let runs = map.runs.iter().map(|run| Run {
        address: run.first_page * page_bytes,
        pages: run.pages,
        kind: run.kind,
        working_set: run.in_working_set,
    });
    runs.collect()
}

/// What the letters mean, and how many pages each stands for.
fn legend(map: &PageMap, page_bytes: u64, parent: Option<&str>) -> String {
    let mut rows = Vec::new();
    for kind in PageKind::ALL {
        let meaning = match (kind, parent) {
            (PageKind::Zero, _) => "zero".to_owned(),
            (PageKind::Parent, Some(parent)) => format!("shared with the parent, {parent}"),
            (PageKind::Parent, None) => "shared with the parent; there is none".to_owned(),
            (PageKind::Shared, _) => "shared with other snapshots".to_owned(),
            (PageKind::Own, _) => "own: in no other snapshot".to_owned(),
        };
        let letters = [false, true].map(|in_set| crate::map::letter(kind, in_set));
        rows.push((
            format!("{} {}", letters[0], letters[1]),
            meaning,
            map.pages_of(kind),
        ));
    }
    let mut rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(letters, meaning, pages)| {
            vec![letters, meaning, count(pages), size(pages * page_bytes)]
        })
        .collect();
    let pages = map.working_set_pages();
    rows.push(match map.has_working_set {
        true => vec![
            String::new(),
            "of all these, in the working set".to_owned(),
            count(pages),
            size(pages * page_bytes),
        ],
        false => vec![
            String::new(),
            "in the working set: none was recorded".to_owned(),
            String::new(),
            String::new(),
        ],
    });
    table(
        &[
            "",
            "KIND (: OR A CAPITAL: IN THE WORKING SET)",
            "PAGES",
            "BYTES",
        ],
        2,
        &rows,
    )
}
