// Who descends from whom, and figures as lines and bars.
const CHAIN_COLOURS = ["--parent", "--own", "--shared"];
const ROW = 30;

// A lane for each snapshot, newest first. A lane leads down to one parent; children that
// come later join it at once, so that ten copies of one snapshot take two lanes.
function lanes(snapshots) {
  const open = []; // by lane: the snapshot that it leads to
  const found = [];
  for (let at = snapshots.length - 1; at >= 0; at -= 1) {
    let lane = open.indexOf(at);
    if (lane < 0) {
      lane = open.indexOf(null);
      lane = lane < 0 ? open.length : lane;
    }
    const { parent } = snapshots[at];
    open[lane] = null;
    let into = parent === null ? null : open.indexOf(parent);
    if (into === -1) {
      into = lane;
    }
    if (into !== null) {
      open[into] = parent;
    }
    found[at] = { lane, into };
  }
  return { found, count: Math.max(1, open.length) };
}

function meter(bytes, most) {
  const part = element("i");
  part.style.width = `${most > 0 ? Math.max(bytes > 0 ? 1 : 0, 100 * bytes / most) : 0}%`;
  return element("div", { class: "meter" }, element("span", { class: "number" }, size(bytes)),
    element("div", { class: "track" }, part));
}

function showGraph() {
  const { snapshots } = data;
  const graph = byId("graph");
  const heads = new Set(snapshots.keys());
  snapshots.forEach((it) => heads.delete(it.parent));
  byId("graph-about").textContent = `${many(snapshots.length, "snapshot", "snapshots")}, newest on top; `
    + `${many(heads.size, "head", "heads")}, ${many(data.chains.length, "chain", "chains")}`;
  if (snapshots.length === 0) {
    graph.append(element("p", { class: "quiet" }, "There are none yet."));
    return;
  }
  const { found, count: laneCount } = lanes(snapshots);
  // However many there are, they end before the tags begin.
  const gap = Math.min(16, 220 / laneCount);
  const gutter = Math.round(laneCount * gap + 16);
  const columns = `${gutter}px minmax(160px, 1.5fr) 118px 74px 76px minmax(130px, 1fr) minmax(130px, 1fr)`;
  const most = Math.max(...snapshots.map((it) => Math.max(it.added, it.own)));
  const names = ["", "tags", "committed (UTC)", "size", "changed", "added to the packs", "only here"];
  graph.append(element("div", { class: "row names" }, ...names.map((name, column) =>
    element("span", column === 3 || column === 4 ? { class: "number" } : {}, name))));
  graph.lastChild.style.gridTemplateColumns = columns;
  const x = (lane) => 10 + lane * gap;
  const y = (at) => (snapshots.length - 1 - at) * ROW + ROW / 2;
  const drawing = svg("svg", { width: gutter, height: snapshots.length * ROW, "aria-hidden": "true" });
  const dots = [];
  for (let at = snapshots.length - 1; at >= 0; at -= 1) {
    const it = snapshots[at];
    const { lane, into } = found[at];
    const ink = `var(${CHAIN_COLOURS[it.chain % CHAIN_COLOURS.length]})`;
    if (into !== null) {
      const [top, turn, low] = [y(at), y(at) + ROW, y(it.parent)];
      const bend = lane === into ? "" : `C${x(lane)} ${turn - 8} ${x(into)} ${top + 8} ${x(into)} ${turn}`;
      const path = svg("path", { d: `M${x(lane)} ${top}${bend}V${low}`, fill: "none", "stroke-width": Math.max(0.5, Math.min(2, gap / 2)) });
      path.style.stroke = ink;
      drawing.append(path);
    }
    const dot = svg("circle", { cx: x(lane), cy: y(at), r: Math.min(5, gap / 2 + 1.5), "stroke-width": 2 });
    dot.style.fill = heads.has(at) ? ink : "var(--card)";
    dot.style.stroke = ink;
    dots.push(dot);
    graph.append(graphRow(it, columns, most));
  }
  drawing.append(...dots);
  graph.append(drawing);
}

function graphRow(it, columns, most) {
  const bytes = sum(it.images.map((image) => image.bytes));
  const changed = sum(it.images.map((image) => image.changed));
  const name = element("span", {}, element("span", { class: "tag" }, it.tags.join(", ")));
  const labels = Object.entries(it.labels).map(([key, value]) => `${key}=${value}`);
  if (it.protected) {
    name.append(element("span", { class: "label" }, "protected"));
  }
  name.append(...labels.map((label) => element("span", { class: "label" }, label)));
  const row = element("div", { class: "row" }, element("span"), name,
    element("span", { class: "quiet" }, minute(it.time)),
    element("span", { class: "number" }, size(bytes)),
    element("span", { class: "number" }, count(changed)),
    meter(it.added, most), meter(it.own, most));
  row.style.gridTemplateColumns = columns;
  const parent = it.parent !== null ? `parent ${data.snapshots[it.parent].tags[0]}`
    : it.removed_parent ? `parent ${it.removed_parent} has no tag` : "no parent";
  hint(row, it.tags.join(", "), it.id, parent, ...labels,
    `${many(changed, "page", "pages")} changed, ${many(it.chunks, "chunk", "chunks")} added in ${size(it.added)}`,
    `${size(it.own)} only here`,
    ...it.images.map((image) => `${image.name}: ${size(image.bytes)}, ${many(image.nonzero, "page", "pages")} in use`));
  return row;
}

// Marks at round numbers, about so many.
function marks(most, about) {
  let step = 1;
  while (most / step > about) {
    step *= 2;
  }
  const found = [];
  for (let at = 0; at <= most + step * 0.999; at += step) {
    found.push(at);
  }
  return found;
}

function showGrowth() {
  const { snapshots } = data;
  const box = byId("growth");
  if (snapshots.length === 0) {
    box.append(element("p", { class: "quiet" }, "Nothing was committed yet."));
    return;
  }
  const [width, height, left, right, top, bottom] = [560, 260, 72, 16, 10, 30];
  let total = 0;
  const points = snapshots.map((it) => ({ it, time: it.time, total: (total += it.added) }));
  const [first, last] = [points[0].time, points[points.length - 1].time];
  // What was committed within one second is drawn one after the other.
  const byTime = last > first;
  const across = (at) => byTime ? (points[at].time - first) / (last - first) : (at + 1) / points.length;
  const x = (at) => left + across(at) * (width - left - right);
  const levels = marks(Math.max(total, 1), 4);
  const highest = levels[levels.length - 1];
  const y = (bytes) => height - bottom - bytes / highest * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${total} bytes added by ${points.length} commits` });
  for (const level of levels) {
    picture.append(svg("line", { class: "grid-line", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
      svg("text", { x: left - 8, y: y(level) + 4, "text-anchor": "end" }, size(level)));
  }
  const steps = points.map((point, at) => `${at === 0 ? `M${x(0)} ${y(0)}` : `H${x(at)}`}V${y(point.total)}`).join("")
    + `H${width - right}`;
  picture.append(svg("path", { class: "growth-area", d: `${steps}V${y(0)}H${x(0)}Z` }), svg("path", { class: "growth-line", d: steps }));
  const said = !byTime ? [[left, "start", minute(first)]]
    : [[left, "start", last - first < 172800 ? minute(first) : day(first)],
      [width - right, "end", last - first < 172800 ? minute(last) : day(last)]];
  picture.append(...said.map(([at, anchor, text]) => svg("text", { x: at, y: height - 8, "text-anchor": anchor }, text)));
  const mark = svg("line", { class: "growth-mark", y1: top, y2: height - bottom, visibility: "hidden" });
  const dot = svg("circle", { class: "growth-dot", r: 5, visibility: "hidden" });
  picture.append(mark, dot);
  picture.addEventListener("pointermove", (event) => {
    const frame = picture.getBoundingClientRect();
    const at = (event.clientX - frame.left) / frame.width * width;
    let nearest = 0;
    points.forEach((_, number) => {
      nearest = Math.abs(x(number) - at) < Math.abs(x(nearest) - at) ? number : nearest;
    });
    const point = points[nearest];
    mark.setAttribute("x1", x(nearest));
    mark.setAttribute("x2", x(nearest));
    dot.setAttribute("cx", x(nearest));
    dot.setAttribute("cy", y(point.total));
    [mark, dot].forEach((it) => it.setAttribute("visibility", "visible"));
    tip.show(event, point.it.tags.join(", "), `${minute(point.time)} UTC`, `added ${size(point.it.added)}`, `${size(point.total)} until then`);
  });
  picture.addEventListener("pointerleave", () => {
    tip.hide();
    [mark, dot].forEach((it) => it.setAttribute("visibility", "hidden"));
  });
  box.append(picture);
}

function bar(name, parts, most, said, ...more) {
  const track = element("div", { class: "track" });
  for (const [bytes, kind] of parts) {
    const part = element("i", kind ? { class: kind } : {});
    part.style.width = `${most > 0 ? 100 * bytes / most : 0}%`;
    track.append(part);
  }
  const made = element("div", { class: "bar" }, element("span", {}, name), track, element("span", { class: "number" }, said));
  hint(made, name, ...more);
  return made;
}

function showOwners() {
  const owners = data.snapshots.filter((it) => it.own > 0).sort((one, other) => other.own - one.own).slice(0, 10);
  const most = owners.length > 0 ? owners[0].own : 0;
  byId("owners").append(...owners.map((it) => bar(it.tags.join(", "), [[it.own]], most, size(it.own),
    `${size(it.own)} in no other snapshot`, `added ${size(it.added)} when it was committed`)));
  if (owners.length === 0) {
    byId("owners").append(element("p", { class: "quiet" }, "No tag has anything for itself."));
  }
}

function showChains() {
  const box = byId("chains");
  const chains = [...data.chains].sort((one, other) => other.needed_stored_bytes - one.needed_stored_bytes);
  const most = chains.length > 0 ? chains[0].needed_stored_bytes : 0;
  box.append(element("div", { class: "quiet" },
    element("span", { class: "key" }, element("i"), "for this chain only"),
    element("span", { class: "key" }, element("i", { class: "other" }), "other chains need it, too")));
  const shown = chains.slice(0, 16);
  box.append(...shown.map((chain) => {
    const [needed, own] = [chain.needed_stored_bytes, chain.exclusive_stored_bytes];
    const smaller = needed > 0 ? `, ${(chain.nonzero_bytes / needed).toFixed(1)}\u00d7 smaller` : "";
    return bar(chain.chain, [[own], [needed - own, "other"]], most,
      `${size(needed)} for ${many(chain.tags.length, "tag", "tags")}${smaller}`,
      `${size(own)} for this chain only`, `${size(needed - own)} other chains need, too`,
      `its snapshots hold ${size(chain.nonzero_bytes)} in pages that are not zero`);
  }));
  if (chains.length > shown.length) {
    const rest = sum(chains.slice(shown.length).map((chain) => chain.exclusive_stored_bytes));
    box.append(element("p", { class: "quiet" }, `and ${many(chains.length - shown.length, "chain", "chains")} more, with ${size(rest)} of their own`));
  }
  if (chains.length === 0) {
    box.append(element("p", { class: "quiet" }, "There are none yet."));
  }
}
