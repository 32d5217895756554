// A video and its curves, side by side in time: where one goes, the other follows.
const found = JSON.parse(document.getElementById("detection").textContent);
const video = document.getElementById("video");
const readout = document.getElementById("readout");
const canvas = document.getElementById("timeline");
const duration = Math.max(found.duration, found.seconds.at(-1) ?? 0, 1e-3);

// Classes that were found come first, so that their colours differ.
const labels = [...new Set([...found.segments.map((segment) => segment.label), ...Object.keys(found.classes)])];
const colourOf = (label) => `--curve-${(labels.indexOf(label) % 7) + 2}`;

const curves = [{ name: "anomaly", values: found.anomaly, colour: "--curve-1" }];
for (const label of labels.filter((name) => name in found.classes)) {
  curves.push({ name: label, values: found.classes[label], colour: colourOf(label), thin: true, hidden: true });
}
// The value under the pointer is that of the snippet whose middle is nearest.
const edges = found.seconds.map((time, at) => (at ? (time + found.seconds[at - 1]) / 2 : 0));
curves.forEach((curve) => Object.assign(curve, { times: found.seconds, edges }));
const spans = found.segments.map(({ start, end, label }) => ({ start, end, label, colour: colourOf(label), alpha: 0.3 }));

let playable = video !== null;
const timeline = new Timeline(canvas, {
  duration,
  curves,
  spans,
  threshold: found.threshold,
  onSeek: (time) => {
    // A file that is a little shorter than what was decoded of it stays at its last frame.
    if (playable) video.currentTime = Math.min(time, video.duration || time);
    showTime(time);
  },
  onHover: (time) => showValues(time ?? timeline.cursor),
});

function showValues(time) {
  readout.textContent = curves[0].values.length ? readValues(curves, time) : "";
}

function showTime(time) {
  timeline.moveTo(time);
  if (timeline.hover === null) showValues(timeline.cursor);
  canvas.setAttribute("aria-valuenow", timeline.cursor.toFixed(1));
  canvas.setAttribute("aria-valuetext", clock(timeline.cursor, true));
  for (const row of document.querySelectorAll("#segments tbody tr")) {
    row.classList.toggle("now", Number(row.dataset.start) <= time && time < Number(row.dataset.end));
  }
}

document.querySelectorAll("#segments tbody tr").forEach((row) => {
  const mark = row.querySelector(".mark");
  mark.style.background = `var(${colourOf(mark.dataset.label)})`;
  row.addEventListener("click", () => timeline.onSeek(Number(row.dataset.start)));
});

const choices = document.getElementById("classes");
for (const curve of choices ? curves.slice(1) : []) {
  const choice = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !curve.hidden });
  const mark = Object.assign(document.createElement("span"), { className: "mark" });
  mark.style.background = `var(${curve.colour})`;
  choice.append(box, mark, curve.name);
  choices.append(choice, " ");
  box.addEventListener("change", () => {
    curve.hidden = !box.checked;
    timeline.draw();
    showValues(timeline.cursor);
  });
}

if (video) {
  const giveUp = () => {
    playable = false;
    video.hidden = true;
    document.getElementById("unplayable").hidden = false;
  };
  // A browser that knows the sound but not the pictures plays a video without size.
  const check = () => video.videoWidth || giveUp();
  const follow = () => {
    if (playable) showTime(video.currentTime);
    if (!video.paused && !video.ended) requestAnimationFrame(follow);
  };
  if (video.error) giveUp();
  else if (video.readyState >= HTMLMediaElement.HAVE_METADATA) check();
  video.addEventListener("error", giveUp);
  video.addEventListener("loadedmetadata", check);
  for (const name of ["play", "seeking", "timeupdate"]) video.addEventListener(name, follow);
}
showTime(0);
