// The map of an image: a pixel a page as long as there are not too many.
const KINDS = ["zero", "shared with parent", "shared with others", "own", "in the working set"];
const COLOURS = ["--zero", "--parent", "--shared", "--own", "--set"];
const MOST_PIXELS = 1 << 22;
const GUTTER = 104;

class PageMap {
  constructor(map) {
    this.map = map;
    this.pages = Math.ceil(map.bytes / data.page_bytes);
    const runs = map.runs.length / 2;
    this.starts = new Float64Array(runs);
    this.codes = new Uint8Array(runs);
    let page = 0;
    for (let run = 0; run < runs; run += 1) {
      this.starts[run] = page;
      this.codes[run] = map.runs[2 * run + 1];
      page += map.runs[2 * run];
    }
    // Powers of two, so that rows begin at round addresses.
    this.perPixel = 1;
    while (this.pages / this.perPixel > MOST_PIXELS) {
      this.perPixel *= 2;
    }
    const pixels = Math.ceil(this.pages / this.perPixel);
    this.width = 8;
    while (this.width * this.width < pixels * 1.5) {
      this.width *= 2;
    }
    this.height = Math.ceil(pixels / this.width);
    this.pixels = pixels;
  }

  end(run) {
    return run + 1 < this.starts.length ? this.starts[run + 1] : this.pages;
  }

  // The run that a page is in.
  find(page) {
    let [low, high] = [0, this.starts.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= page) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // What is drawn of a code: its kind, or that it is in the working set; -1 if it is off.
  static shown(code, on) {
    if (code >= 4 && on[4]) {
      return 4;
    }
    return on[code % 4] ? code % 4 : -1;
  }

  bitmap(on) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.width, this.height);
    const words = new Uint32Array(image.data.buffer);
    const inks = COLOURS.map((name) => {
      context.fillStyle = colour(name);
      const digits = context.fillStyle;
      const part = (at) => parseInt(digits.slice(at, at + 2), 16);
      return ((255 << 24) | (part(5) << 16) | (part(3) << 8) | part(1)) >>> 0;
    });
    if (this.perPixel === 1) {
      for (let run = 0; run < this.starts.length; run += 1) {
        const shown = PageMap.shown(this.codes[run], on);
        words.fill(shown < 0 ? 0 : inks[shown], this.starts[run], this.end(run));
      }
    } else {
      // Of several pages the last kind is shown, as in the terminal's map.
      const best = new Int8Array(this.pixels).fill(-1);
      for (let run = 0; run < this.starts.length; run += 1) {
        const shown = PageMap.shown(this.codes[run], on);
        const first = Math.floor(this.starts[run] / this.perPixel);
        const last = Math.floor((this.end(run) - 1) / this.perPixel);
        for (let pixel = first; pixel <= last; pixel += 1) {
          best[pixel] = Math.max(best[pixel], shown);
        }
      }
      best.forEach((shown, pixel) => { words[pixel] = shown < 0 ? 0 : inks[shown]; });
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }
}

// The canvas: what part of the bitmap is seen, and how large.
class MapView {
  constructor(canvas) {
    this.canvas = canvas;
    this.on = [true, true, true, true, true];
    this.listen();
  }

  show(map) {
    this.pages = new PageMap(map);
    this.repaint();
    this.fit();
  }

  repaint() {
    this.bitmap = this.pages.bitmap(this.on);
  }

  room() {
    return { width: this.canvas.clientWidth - GUTTER, height: this.canvas.clientHeight };
  }

  fit() {
    const { width, height } = this.pages;
    const wide = this.canvas.clientWidth - GUTTER;
    // A small image is not blown up to blocks that fill the window.
    this.scale = Math.min(wide / width, Math.max(520 / height, 1), 24);
    this.canvas.style.height = `${Math.round(Math.min(560, Math.max(60, height * this.scale)))}px`;
    this.scale = Math.min(this.scale, this.room().height / height);
    this.least = this.scale;
    [this.x, this.y] = [0, 0];
    this.draw();
  }

  zoom(factor, at) {
    const before = this.scale;
    this.scale = Math.min(48, Math.max(this.least, before * factor));
    const centre = at ?? { x: this.room().width / 2, y: this.room().height / 2 };
    this.x += centre.x / before - centre.x / this.scale;
    this.y += centre.y / before - centre.y / this.scale;
    this.draw();
  }

  move(x, y) {
    this.x += x / this.scale;
    this.y += y / this.scale;
    this.draw();
  }

  draw() {
    const { canvas, pages } = this;
    const { width, height } = this.room();
    this.x = Math.max(0, Math.min(this.x, pages.width - width / this.scale));
    this.y = Math.max(0, Math.min(this.y, pages.height - height / this.scale));
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, width, height);
    context.clip();
    context.imageSmoothingEnabled = this.scale < 1;
    context.drawImage(this.bitmap, GUTTER - this.x * this.scale, -this.y * this.scale,
      pages.width * this.scale, pages.height * this.scale);
    context.restore();
    this.drawAddresses(context, height);
  }

  drawAddresses(context, height) {
    const rowBytes = this.pages.width * this.pages.perPixel * data.page_bytes;
    let step = 1;
    while (step * this.scale < 34) {
      step *= 2;
    }
    context.fillStyle = colour("--quiet");
    context.font = "11px ui-monospace, Menlo, 'DejaVu Sans Mono', monospace";
    context.textBaseline = "top";
    const last = Math.min(this.pages.height, this.y + height / this.scale);
    for (let row = Math.ceil(this.y / step) * step; row < last; row += step) {
      const y = (row - this.y) * this.scale;
      if (y + 11 <= height) {
        context.fillText(address(row * rowBytes), 4, y);
        context.fillRect(GUTTER - 8, y, 6, 1);
      }
    }
  }

  // Where the pointer is, in pixels of what is drawn.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left - GUTTER, y: event.clientY - box.top };
  }

  tell(event) {
    const at = this.at(event);
    const [column, row] = [Math.floor(this.x + at.x / this.scale), Math.floor(this.y + at.y / this.scale)];
    const { pages } = this;
    const page = (row * pages.width + column) * pages.perPixel;
    if (at.x < 0 || column < 0 || column >= pages.width || row < 0 || page >= pages.pages) {
      tip.hide();
      return;
    }
    const run = pages.find(page);
    const code = pages.codes[run];
    const [start, end] = [pages.starts[run], pages.end(run)];
    const lines = [`page ${count(page)}: ${KINDS[code % 4]}`];
    if (code >= 4) {
      lines.push("in the working set");
    }
    const [from, to] = [start, end].map((number) => address(number * data.page_bytes));
    lines.push(`${many(end - start, "page", "pages")} alike, ${from} to ${to}`);
    tip.show(event, address(page * data.page_bytes), ...lines);
  }

  listen() {
    const { canvas } = this;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY };
      canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("moving");
    });
    canvas.addEventListener("pointerup", () => {
      drag = null;
      canvas.classList.remove("moving");
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag) {
        this.move(drag.x - event.clientX, drag.y - event.clientY);
        drag = { x: event.clientX, y: event.clientY };
      }
      this.tell(event);
    });
    canvas.addEventListener("pointerleave", tip.hide);
    canvas.addEventListener("wheel", (event) => {
      // The page is to scroll on, unless the map is what is meant.
      if (event.ctrlKey || document.activeElement === canvas) {
        event.preventDefault();
        this.zoom(event.deltaY < 0 ? 1.25 : 0.8, this.at(event));
      }
    }, { passive: false });
    const keys = {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(),
      ArrowLeft: () => this.move(-60, 0), ArrowRight: () => this.move(60, 0),
      ArrowUp: () => this.move(0, -60), ArrowDown: () => this.move(0, 60),
    };
    canvas.addEventListener("keydown", (event) => {
      if (keys[event.key]) {
        event.preventDefault();
        keys[event.key]();
      }
    });
    byId("zoom-in").addEventListener("click", () => this.zoom(1.5));
    byId("zoom-out").addEventListener("click", () => this.zoom(1 / 1.5));
    byId("zoom-fit").addEventListener("click", () => this.fit());
  }
}

function showMaps() {
  const drawable = data.maps.filter((map) => !map.error);
  if (drawable.length === 0) {
    return;
  }
  byId("map-card").hidden = false;
  const view = new MapView(byId("map"));
  const tabs = drawable.map((map) => {
    const tab = element("button", { type: "button", "aria-pressed": "false" }, `${map.tag}: ${map.image}`);
    tab.addEventListener("click", () => choose(map, tab));
    return tab;
  });
  byId("map-tabs").append(...(tabs.length > 1 ? tabs : []));

  function choose(map, chosen) {
    tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab === chosen)));
    view.show(map);
    const parent = map.parent === null ? "which has no parent here" : `whose parent is ${map.parent}`;
    const per = view.pages.perPixel;
    byId("map-about").textContent = `${map.image} of ${map.tag}, ${parent}: ${size(map.bytes)}, `
      + `${per === 1 ? "one page" : `${count(per)} pages`} of ${size(data.page_bytes)} a pixel, `
      + "addresses from left to right, then down.";
    byId("map").setAttribute("aria-label", `${map.image} of ${map.tag}: `
      + map.counts.map((pages, kind) => `${pages} pages ${KINDS[kind]}`).join(", "));
    byId("legend").replaceChildren(...KINDS.map((name, kind) => legendEntry(map, name, kind)));
  }

  function legendEntry(map, name, kind) {
    const pages = kind < 4 ? map.counts[kind] : map.set;
    const said = pages === null ? "none was recorded"
      : `${count(pages)} pages, ${size(pages * data.page_bytes)}`;
    const share = pages === null ? "" : `, ${(100 * pages / view.pages.pages).toFixed(1)}\u00a0%`;
    const entry = element("button", { type: "button", "aria-pressed": String(view.on[kind] && pages !== null) },
      element("i", { class: `k${kind}` }), element("span", {}, name, share, element("small", {}, said)));
    entry.disabled = pages === null;
    entry.addEventListener("click", () => {
      view.on[kind] = !view.on[kind];
      entry.setAttribute("aria-pressed", String(view.on[kind]));
      view.repaint();
      view.draw();
    });
    return entry;
  }

  choose(drawable[0], tabs[0]);
  addEventListener("resize", () => view.fit());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    view.repaint();
    view.draw();
  });
}
