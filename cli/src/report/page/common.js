// What all parts of the page use. Text from the store is only ever set as text.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (bytes >= 1023.95 && unit + 1 < units.length) {
    bytes /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || bytes >= 99.95 ? 0 : 1;
  return `${bytes.toFixed(digits)}\u00a0${units[unit]}`;
}

const count = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const many = (number, one, more) => `${count(number)} ${number === 1 ? one : more}`;
const address = (bytes) => `0x${bytes.toString(16).padStart(10, "0")}`;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const day = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);
const minute = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const tip = {
  show(event, title, ...lines) {
    const box = byId("tip");
    box.replaceChildren(element("b", {}, title), ...lines.map((line) => element("div", {}, line)));
    box.hidden = false;
    const room = box.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - room.width - 8);
    const below = event.clientY + 16;
    const top = below + room.height + 8 > innerHeight ? event.clientY - room.height - 12 : below;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${Math.max(8, top)}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};

function hint(target, title, ...lines) {
  target.addEventListener("pointermove", (event) => tip.show(event, title, ...lines));
  target.addEventListener("pointerleave", tip.hide);
}
