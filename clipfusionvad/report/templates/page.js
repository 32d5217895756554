// The script of all pages: light and dark, tables that sort and filter, curves over time. Curves are SVG; CSS colours them.
"use strict";
const one = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const readJson = (id) => JSON.parse(document.getElementById(id).textContent);
const addDiv = (place, className, textContent = "") =>
  place.appendChild(Object.assign(document.createElement("div"), { className, textContent }));

// Light and dark: the system's choice until the button is pressed. A page opened as a file may not be allowed to store it.
const root = document.documentElement;
try { root.dataset.theme = localStorage.getItem("theme") ?? ""; } catch {}
one("#theme").addEventListener("click", () => {
  const theme = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch {}
});

// Tables. Each <tbody> is an item; the cells of its first row hold the values.
function sortItems(table, column, descending) {
  const value = ({ dataset, textContent }) => dataset.value ?? textContent.trim();
  const items = [...table.tBodies].map((item) => [value(item.rows[0].cells[column]), item]);
  items.sort(([a], [b]) => {
    // Items without a value come last in both orders.
    if (a === "" || b === "") return (a === "") - (b === "");
    return (descending ? -1 : 1) * (a - b || a.localeCompare(b, undefined, { numeric: true }));
  });
  table.append(...items.map(([, item]) => item));
}
for (const button of all("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    // Numbers start with the highest.
    const descending = heading.ariaSort ? heading.ariaSort === "ascending" : heading.classList.contains("number");
    all("th", heading.parentElement).forEach((other) => other.removeAttribute("aria-sort"));
    heading.ariaSort = descending ? "descending" : "ascending";
    sortItems(heading.closest("table"), heading.cellIndex, descending);
  });
}
for (const toolbar of all(".toolbar")) {
  const [input, select, count] = ["input", "select", "output"].map((name) => one(name, toolbar));
  const items = [...document.getElementById(toolbar.dataset.for).tBodies];
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const item of items) {
      const [text, group] = [item.rows[0].textContent.toLowerCase(), select?.value];
      const inGroup = !group || JSON.parse(item.dataset.groups).includes(group);
      item.hidden = !inGroup || !words.every((word) => text.includes(word));
    }
    const shown = items.filter((item) => !item.hidden).length;
    count.value = `${shown === items.length ? "" : `${shown} of `}${items.length} videos`;
  };
  toolbar.addEventListener("input", filter);
  filter();
}

// Curves. A chart is {duration, times, curves, spans, threshold}: times are the middles of snippets in seconds, a curve
// is {name, values, colour}, a span {start, end, label, colour}; truth is spans of an annotation. Colours are names of CSS variables.
/** 3.2 → "0:03.2", 3723 → "1:02:03.0" */
function clock(seconds, digits = 1) {
  const rounded = Number(seconds.toFixed(digits));
  const [hours, minutes] = [Math.floor(rounded / 3600), String(Math.floor(rounded / 60) % 60)];
  const rest = (rounded % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return hours ? `${hours}:${minutes.padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** The points of a curve; a long one is reduced to the lowest and the highest value of each of 800 stretches. */
function curvePoints(values, times, duration) {
  const heights = values.map((value) => 100 - 100 * value);
  const point = (at, time = times[at]) => `${((1000 * time) / duration).toFixed(1)},${heights[at].toFixed(2)}`;
  if (values.length === 1) return `${point(0, 0)} ${point(0, duration)}`;
  const [points, size] = [[], Math.ceil(values.length / 800)];
  for (let first = 0; first < values.length; first += size) {
    const stretch = heights.slice(first, first + size);
    const ends = [Math.min(...stretch), Math.max(...stretch)].map((height) => first + stretch.indexOf(height));
    points.push(...new Set(ends.sort((a, b) => a - b)));
  }
  return points.map((at) => point(at)).join(" ");
}

/** Draw a chart as an SVG that fills its place. */
function draw(place, { duration, times, curves, spans, threshold = null, truth = [] }) {
  const x = (seconds) => (1000 * seconds) / duration;
  const areas = spans.map(({ start, end, colour }) =>
    `<rect x="${x(start)}" width="${Math.max(2, x(end - start))}" height="100" fill="var(${colour})"/>`);
  const band = truth.map(({ start, end }) =>
    `<rect class="truth" x="${x(start)}" y="94" width="${Math.max(2, x(end - start))}" height="6"/>`);
  const lines = curves.filter((curve) => !curve.hidden).reverse().map(({ values, colour, thin }) => {
    const points = curvePoints(values, times, duration);
    return `<polyline points="${points}" stroke="var(${colour})"${thin ? ' class="thin"' : ""}/>`;
  });
  const parts = [...areas, ...band, threshold === null ? "" : `<path d="M0 ${100 - 100 * threshold}H1000"/>`, ...lines];
  place.innerHTML = `<svg viewBox="0 0 1000 100" preserveAspectRatio="none">${parts.join("")}</svg>`;
}

/** A large chart with axes and a line under the pointer; onHover and onSeek get seconds. Returns what changes it. */
function timeline(place, chart, onHover, onSeek = () => {}) {
  const { duration, spans } = chart;
  const left = (seconds) => `${(100 * seconds) / duration}%`;
  const timeAt = ({ clientX }, { left, width } = place.getBoundingClientRect()) =>
    Math.min(1, Math.max(0, (clientX - left) / width)) * duration;
  const [drawing, hover, cursor] = ["drawing", "hover line", "cursor line"].map((name) => addDiv(place, name));
  draw(drawing, chart);
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
  const step = steps.find((length) => duration / length <= Math.max(2, place.clientWidth / 80)) ?? duration / 2;
  const ticks = Array.from({ length: Math.floor((0.98 * duration) / step) + 1 }, (_, index) => index * step);
  for (const time of ticks) addDiv(place, "tick", clock(time, step < 1 ? 1 : 0)).style.left = left(time);
  // A label has the room up to the next one; the last one stays inside.
  [...spans].sort((a, b) => a.start - b.start).forEach(({ start, label }, index, sorted) => {
    const [name, next] = [addDiv(place, "label", label), sorted[index + 1]];
    [name.title, name.style.maxWidth] = [label, next ? left(next.start - start) : "100%"];
    name.style.left = next ? left(start) : `max(0%, min(${left(start)}, 100% - ${label.length}ch))`;
  });
  for (const kind of ["pointerdown", "pointermove"]) place.addEventListener(kind, (event) => {
    hover.style.left = left(timeAt(event));
    onHover(timeAt(event));
    if (kind === "pointerdown") place.setPointerCapture(event.pointerId);
    if (event.buttons) onSeek(timeAt(event));
  });
  place.addEventListener("pointerleave", () => onHover(null));
  place.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10 }[event.key];
    if (move) onSeek(Math.min(duration, Math.max(0, Number(place.ariaValueNow) + move)));
    if (move) event.preventDefault();
  });
  return { redraw: () => draw(drawing, chart), moveTo: (time) => (cursor.style.left = left(time)) };
}

/** "0:12.3 · coarse branch 0.83 · fine branch 0.21": the values of the snippet whose middle is nearest. */
function readout({ curves, times }, time) {
  const at = Math.max(0, times.findLastIndex((middle, index) => (index ? middle + times[index - 1] : 0) / 2 <= time));
  const shown = curves.filter((curve) => !curve.hidden && curve.values.length);
  return [clock(time), ...shown.map(({ name, values }) => `${name} ${(values[at] ?? 0).toFixed(2)}`)].join(" · ");
}
