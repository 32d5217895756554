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
/** Buttons that close a video's curve and open that of the previous or next one in the table as it is shown. */
function addSteps(place, row) {
  const ways = [["‹ previous", "previousElementSibling"], ["next ›", "nextElementSibling"], ["all videos", null]];
  ways.forEach(([textContent, way], index) => {
    const button = place.appendChild(Object.assign(document.createElement("button"), { type: "button", textContent }));
    let other = way && row.parentElement[way];
    while (other?.hidden) other = other[way];
    button.disabled = way && !other?.dataset.index;
    button.addEventListener("click", () => {
      row.click();
      if (!other) return one("#videos-section").scrollIntoView();
      one(".row", other).click();
      other.scrollIntoView({ block: "nearest" });
      all(".steps button", other)[index].focus({ preventScroll: true });
    });
  });
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
  addSteps(addDiv(cell, "steps"), row);
  const [chart, place, text] = [chartOf(row), addDiv(cell, "timeline"), addDiv(cell, "readout")];
  timeline(place, chart, (time) => (text.textContent = time === null ? "" : readout(chart, time)));
});
