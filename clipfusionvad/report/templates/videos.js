// The curves of the test videos: small ones once they come into sight, a large one at a click.
const scores = JSON.parse(document.getElementById("scores").textContent);
const packed = Uint8Array.from(atob(scores.curves), (letter) => letter.charCodeAt(0));
const numbers = new DataView(packed.buffer);
// Where each video's numbers begin.
const firsts = [0];
for (const count of scores.snippets) firsts.push(firsts.at(-1) + count * scores.branches.length);

/** What timelines draw of a video; times are the middles of snippets, edges their beginnings. */
function chartOf(index) {
  const count = scores.snippets[index];
  const duration = Math.max(scores.seconds[index], 1e-3);
  const edges = Array.from({ length: count }, (_, at) => at * scores.step);
  const curves = scores.branches.map((name, branch) => ({
    name,
    edges,
    times: edges.map((edge) => Math.min(edge + scores.step / 2, duration)),
    values: edges.map((_, at) => numbers.getUint16(2 * (firsts[index] + branch * count + at), true) / scores.scale),
    colour: `--curve-${branch + 1}`,
  }));
  const spans = (scores.spans[index] ?? []).map(([start, end, label]) => ({ start, end, label, colour: "--truth" }));
  return { duration, curves, spans };
}

const smalls = [...document.querySelectorAll("#videos canvas.small")];
const indexOf = (element) => Number(element.closest("tbody").dataset.index);
const inSight = new Set();
const sight = new IntersectionObserver(
  (changes) => {
    for (const { target, isIntersecting } of changes) {
      if (!isIntersecting) inSight.delete(target);
      else {
        inSight.add(target);
        drawSmall(target, chartOf(indexOf(target)));
      }
    }
  },
  { rootMargin: "300px" },
);
smalls.forEach((canvas) => sight.observe(canvas));
const redraw = () => inSight.forEach((canvas) => drawSmall(canvas, chartOf(indexOf(canvas))));
document.addEventListener("themechange", redraw);
addEventListener("resize", redraw);
addEventListener("beforeprint", () => smalls.forEach((canvas) => drawSmall(canvas, chartOf(indexOf(canvas)))));

function openCurve(item) {
  const row = item.insertRow();
  row.className = "detail";
  const cell = row.insertCell();
  cell.colSpan = item.rows[0].cells.length;
  cell.innerHTML = '<div class="timeline"><canvas></canvas></div><p class="readout"></p>';
  const chart = chartOf(Number(item.dataset.index));
  const readout = cell.querySelector(".readout");
  const onHover = (time) => {
    readout.textContent = time === null ? "" : readValues(chart.curves, time);
  };
  new Timeline(cell.querySelector("canvas"), { ...chart, onHover });
}

document.getElementById("videos").addEventListener("click", (event) => {
  const row = event.target.closest("tr.row");
  if (!row) return;
  const item = row.parentElement;
  const opened = item.rows.length > 1;
  if (opened) item.deleteRow(1);
  else openCurve(item);
  row.querySelector(".open").setAttribute("aria-expanded", String(!opened));
});
