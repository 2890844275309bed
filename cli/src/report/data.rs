//! What a report shows, as the page reads it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use snapstore_store::{
    Error, ImageRole, Manifest, PageKind, PageMap, Pin, SnapshotId, Store, StoreStats,
    TaggedSnapshot,
};

use crate::hints;

/// Images that are drawn at most: the page is to stay small.
const MAPS: usize = 8;
/// Heads that are drawn if no snapshot is named.
const HEADS: usize = 4;

/// What was found, and what could not be read.
pub struct Report {
    /// For the page's script.
    pub value: Value,
    /// Tags that cannot be read whole, each once.
    pub unreadable: Vec<(String, Arc<Error>)>,
    /// Snapshots, each once.
    pub snapshots: usize,
    /// Images that are drawn.
    pub maps: usize,
}

/// A snapshot with all its tags.
struct Node {
    id: SnapshotId,
    tags: Vec<String>,
    manifest: Manifest,
    /// What only it needs, in packs.
    own_bytes: u64,
    chain: usize,
}

/// Gathers what a report shows: the whole store, with maps of one snapshot or of the newest
/// ones that none descends from.
pub fn gather(store: &Store, name: Option<&str>) -> anyhow::Result<Report> {
    // Named ones are looked for first: what is not there is an error before any work.
    let named = name.map(|name| store.pin(name)).transpose()?;
    let stats = store.stats()?;
    let lineages = store.lineages()?;
    let listing = store.listing()?;
    let protected = store.protected_tags()?;
    let nodes = nodes(listing.snapshots, &stats, &lineages.chains);
    let mut unreadable = stats.unreadable.clone();
    unreadable.extend(lineages.unreadable);

    let (asked, _pins) = asked(store, &nodes, name.zip(named))?;
    let images: Vec<_> = asked.iter().map(|it| (it.id, it.image.as_str())).collect();
    let found = store.page_maps(&images)?;
    unreadable.extend(found.unreadable);
    let mut seen = BTreeSet::new();
    unreadable.retain(|(tag, _)| seen.insert(tag.clone()));

    let places: HashMap<SnapshotId, usize> = nodes
        .iter()
        .zip(0..)
        .map(|(node, place)| (node.id, place))
        .collect();
    let maps: Vec<_> = asked
        .iter()
        .zip(&found.maps)
        .map(|(asked, map)| map_value(asked, map, &nodes, &places))
        .collect();
    let nodes_value: Vec<_> = nodes
        .iter()
        .map(|node| node_value(node, &places, &protected))
        .collect();
    let value = json!({
        "program": concat!("snapstore ", env!("CARGO_PKG_VERSION")),
        "made": unix_seconds(SystemTime::now()),
        "store": shown(store.path()),
        "page_bytes": store.page_size().bytes(),
        "totals": totals(&stats),
        "snapshots": nodes_value,
        "chains": lineages.chains,
        "maps": maps,
        "sets": sets(store, &nodes),
        "unreadable": unreadable
            .iter()
            .map(|(tag, error)| json!({"tag": tag, "error": hints::told(error)}))
            .collect::<Vec<_>>(),
    });
    Ok(Report {
        value,
        unreadable,
        snapshots: nodes.len(),
        maps: maps.len(),
    })
}

fn shown(path: &Path) -> String {
    std::fs::canonicalize(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}

fn unix_seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Oldest first, each snapshot once.
fn nodes(
    snapshots: Vec<TaggedSnapshot>,
    stats: &StoreStats,
    chains: &[snapstore_store::ChainStats],
) -> Vec<Node> {
    let own: HashMap<&str, u64> = stats
        .per_snapshot
        .iter()
        .map(|it| (it.tag.as_str(), it.exclusive_stored_bytes))
        .collect();
    let chain_of: HashMap<&str, usize> = chains
        .iter()
        .zip(0..)
        .flat_map(|(chain, number)| chain.tags.iter().map(move |tag| (tag.as_str(), number)))
        .collect();
    let mut places: HashMap<SnapshotId, usize> = HashMap::new();
    let mut nodes: Vec<Node> = Vec::new();
    for snapshot in snapshots {
        let own_bytes = own.get(snapshot.tag.as_str()).copied().unwrap_or(0);
        let chain = chain_of.get(snapshot.tag.as_str()).copied().unwrap_or(0);
        match places.get(&snapshot.id) {
            Some(place) => nodes[*place].tags.push(snapshot.tag),
            None => {
                places.insert(snapshot.id, nodes.len());
                nodes.push(Node {
                    id: snapshot.id,
                    tags: vec![snapshot.tag],
                    manifest: snapshot.manifest,
                    own_bytes,
                    chain,
                });
            }
        }
    }
    nodes
}

fn node_value(
    node: &Node,
    places: &HashMap<SnapshotId, usize>,
    protected: &BTreeSet<String>,
) -> Value {
    let manifest = &node.manifest;
    let images: Vec<_> = manifest
        .images
        .iter()
        .map(|image| {
            json!({
                "name": image.file_name(),
                "bytes": image.size_bytes,
                "nonzero": image.nonzero_pages,
                "changed": image.changed_pages,
            })
        })
        .collect();
    let place = manifest.parent.and_then(|parent| places.get(&parent));
    let removed = manifest.parent.filter(|_| place.is_none());
    json!({
        "id": node.id.short(),
        "tags": node.tags,
        "parent": place,
        "removed_parent": removed.map(|id| id.short()),
        "time": manifest.created_unix_seconds,
        "labels": manifest.labels,
        "added": manifest.added_bytes,
        "chunks": manifest.added_chunks,
        "own": node.own_bytes,
        "chain": node.chain,
        "protected": node.tags.iter().any(|tag| protected.contains(tag)),
        "images": images,
    })
}

fn totals(stats: &StoreStats) -> Value {
    json!({
        "tags": stats.snapshots,
        "logical": stats.logical_bytes,
        "nonzero": stats.nonzero_bytes,
        "distinct": stats.distinct_bytes,
        "pages_stored": stats.page_stored_bytes,
        "metadata_stored": stats.metadata_stored_bytes,
        "unreferenced": stats.unreferenced_bytes,
        "packs": stats.packs,
        "index": stats.index_bytes,
        "disk": stats.total_bytes,
    })
}

/// An image that is to be drawn.
struct Asked {
    tag: String,
    id: SnapshotId,
    image: String,
    file: String,
}

/// The images to draw, and what keeps them whole until they are.
fn asked(
    store: &Store,
    nodes: &[Node],
    named: Option<(&str, (SnapshotId, Pin))>,
) -> anyhow::Result<(Vec<Asked>, Vec<Pin>)> {
    if let Some((name, (id, pin))) = named {
        let manifest = match store.manifest(id) {
            Ok(manifest) => manifest,
            // It is named among those that cannot be read.
            Err(error) if error.is_of_what_is_stored() => return Ok((Vec::new(), vec![pin])),
            Err(other) => return Err(other.into()),
        };
        let drawn = drawn(&manifest);
        let images = drawn.into_iter().map(|(image, file)| Asked {
            tag: name.to_owned(),
            id,
            image,
            file,
        });
        return Ok((images.take(MAPS).collect(), vec![pin]));
    }
    let parents: HashSet<_> = nodes.iter().filter_map(|it| it.manifest.parent).collect();
    let heads = nodes.iter().rev().filter(|it| !parents.contains(&it.id));
    let (mut images, mut pins) = (Vec::new(), Vec::new());
    for head in heads.take(HEADS) {
        // One that was removed just now is left out.
        let Ok((id, pin)) = store.pin(&head.tags[0]) else {
            continue;
        };
        let first = drawn(&head.manifest).into_iter().next();
        if let Some((image, file)) = first.filter(|_| id == head.id) {
            pins.push(pin);
            images.push(Asked {
                tag: head.tags[0].clone(),
                id,
                image,
                file,
            });
        }
    }
    Ok((images, pins))
}

/// The images of a snapshot that are worth a picture, memory first; if there are none,
/// the longest file.
fn drawn(manifest: &Manifest) -> Vec<(String, String)> {
    let mut images: Vec<_> = manifest.images.iter().collect();
    images.sort_by_key(|image| {
        (
            image.role != ImageRole::Memory,
            image.role == ImageRole::File,
            std::cmp::Reverse(image.size_bytes),
        )
    });
    let files = images
        .iter()
        .filter(|it| it.role == ImageRole::File)
        .count();
    images.truncate((images.len() - files).max(1));
    let names = images.into_iter();
    names
        .map(|image| (image.name.clone(), image.file_name()))
        .collect()
}

fn map_value(
    asked: &Asked,
    map: &Result<PageMap, Error>,
    nodes: &[Node],
    places: &HashMap<SnapshotId, usize>,
) -> Value {
    let mut value = json!({"tag": asked.tag, "image": asked.file});
    let map = match map {
        Ok(map) => map,
        Err(error) => {
            value["error"] = hints::told(error).into();
            return value;
        }
    };
    let parent = map.parent.and_then(|parent| places.get(&parent));
    // Pages and code by turns: the kind, and four more if they are in the working set.
    let runs = map.runs.iter().flat_map(|run| {
        let code = run.kind as u64 + 4 * u64::from(run.in_working_set);
        [run.pages, code]
    });
    let counts = PageKind::ALL.map(|kind| map.pages_of(kind));
    value["bytes"] = map.size_bytes.into();
    value["parent"] = json!(parent.map(|place| &nodes[*place].tags[0]));
    value["counts"] = json!(counts);
    value["set"] = json!(map.has_working_set.then(|| map.working_set_pages()));
    value["runs"] = runs.collect::<Vec<_>>().into();
    value
}

/// What was recorded of mounts, of the snapshots that have it.
fn sets(store: &Store, nodes: &[Node]) -> Vec<Value> {
    let mut sets = Vec::new();
    for node in nodes {
        for image in &node.manifest.images {
            // One that cannot be read is as good as none.
            let Ok(Some(set)) = store.working_set(node.id, &image.name) else {
                continue;
            };
            sets.push(json!({
                "tag": node.tags[0],
                "image": image.file_name(),
                "pages": set.pages().count(),
                "recordings": set.recordings(),
                "recorded": unix_seconds(set.recorded()),
                "pushed": set.last().pushed,
                "outside": set.last().outside,
                "hit_rate": set.last().hit_rate(),
            }));
        }
    }
    sets
}
