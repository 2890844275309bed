// Puts it all together.
function showDamage() {
  const broken = data.unreadable.map((it) => [it.tag, it.error]);
  for (const map of data.maps.filter((it) => it.error)) {
    broken.push([`${map.tag}: ${map.image}`, map.error]);
  }
  if (broken.length === 0) {
    return;
  }
  byId("damage").hidden = false;
  byId("damage").append(element("h2", {}, `${many(broken.length, "thing", "things")} cannot be read whole`),
    element("p", {}, "What they need may be counted as needed by nobody, and pages that they have, too, as own."),
    element("ul", {}, ...broken.map(([name, error]) => element("li", {}, element("b", {}, name), `: ${error}`))));
}

function showFigures() {
  const { totals } = data;
  const ratio = totals.disk > 0 && totals.logical > 0 ? `${(totals.logical / totals.disk).toFixed(totals.logical / totals.disk < 100 ? 1 : 0)}\u00d7` : "\u2013";
  const figures = [
    [count(data.snapshots.length), `snapshots, ${many(totals.tags, "tag", "tags")}`],
    [size(totals.logical), "images, as they are"],
    [size(totals.nonzero), "in pages that are not zero"],
    [size(totals.distinct), "in distinct pages"],
    [size(totals.pages_stored), `those as stored, in ${many(totals.packs, "pack", "packs")}`],
    [size(totals.disk), "the whole store on disk"],
    [ratio, "smaller than the images"],
  ];
  byId("figures").append(...figures.map(([figure, meaning]) =>
    element("div", { class: "figure" }, element("b", {}, figure), element("span", {}, meaning))));
}

function showSets() {
  if (data.sets.length === 0) {
    return;
  }
  byId("sets-card").hidden = false;
  const names = ["Snapshot", "Image", "Pages", "Size", "Recordings", "Last recorded (UTC)", "Pushed last", "Of these used", "Asked for beside"];
  const isNumber = (column) => ![0, 1, 5].includes(column);
  const cell = (kind, text, column) => element(kind, isNumber(column) ? { class: "number" } : {}, text);
  const rows = data.sets.map((set) => [set.tag, set.image, count(set.pages), size(set.pages * data.page_bytes), count(set.recordings),
    minute(set.recorded), count(set.pushed), set.hit_rate === null ? "not known" : `${Math.round(100 * set.hit_rate)} %`, count(set.outside)]);
  byId("sets").append(element("tr", {}, ...names.map((name, column) => cell("th", name, column))),
    ...rows.map((row) => element("tr", {}, ...row.map((text, column) => cell("td", text, column)))));
}

byId("store").textContent = data.store;
document.title = `snapstore: ${data.store}`;
byId("made").textContent = `${minute(data.made)} UTC, ${data.program}, pages of ${size(data.page_bytes)}`;
byId("foot").textContent = "A snapshot's parent is shown as long as it has a tag. How long machines paused for commits, and how long restores took, "
  + "a store does not record.";
showDamage();
showFigures();
showMaps();
showGraph();
showGrowth();
showOwners();
showChains();
showSets();
document.documentElement.dataset.drawn = "yes";
