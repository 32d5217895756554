// The test videos of a report: small pictures once they come into sight, a large one at a click.
const scores = readJson("scores");
function chartOf(element) {
  const { index } = element.closest("tbody").dataset;
  const packed = new Uint16Array(Uint8Array.from(atob(scores.curves[index]), (letter) => letter.charCodeAt(0)).buffer);
  const [count, duration] = [packed.length / scores.branches.length, Math.max(scores.seconds[index], 1e-3)];
  const step = scores.step ?? duration / count; // no step: snippets are equal parts of the video
  const times = Array.from({ length: count }, (_, at) => Math.min((at + 0.5) * step, duration));
  const curves = scores.branches.map((name, branch) => {
    const values = Array.from(packed.subarray(branch * count, (branch + 1) * count), (value) => value / scores.scale);
    return { name, values, colour: `--curve-${branch + 1}` };
  });
  const spans = (scores.spans[index] ?? []).map(([start, end, label]) => ({ start, end, label, colour: "--truth" }));
  return { duration, times, curves, spans };
}
const drawSmall = (place) => place.firstChild || draw(place, chartOf(place));
const sight = new IntersectionObserver((rows) => rows.forEach((row) => row.isIntersecting && drawSmall(row.target)));
all("#videos .small").forEach((place) => sight.observe(place));
addEventListener("beforeprint", () => all("#videos .small").forEach(drawSmall));
one("#videos").addEventListener("click", ({ target }) => {
  const row = target.closest("tr.row");
  if (!row) return;
  const opened = row.nextElementSibling;
  one(".open", row).ariaExpanded = String(!opened);
  if (opened) return opened.remove();
  const cell = Object.assign(row.parentElement.insertRow(), { className: "detail" }).insertCell();
  cell.colSpan = row.cells.length;
  const [chart, place, text] = [chartOf(row), addDiv(cell, "timeline"), addDiv(cell, "readout")];
  timeline(place, chart, (time) => (text.textContent = time === null ? "" : readout(chart, time)));
});
