// A video and its curves side by side in time: each follows the other.
const [found, place, video, text] = [readJson("detection"), one("#timeline"), one("#video"), one("#readout")];
let playable = video !== null;
const show = (time) => (text.textContent = readout(found, time ?? Number(place.ariaValueNow)));
const chart = timeline(place, found, show, seek);
function seek(time) {
  // A file that is a little shorter than what was decoded stays at its last frame.
  if (playable) video.currentTime = Math.min(time, video.duration || time);
  moveTo(time);
}
function moveTo(time) {
  const now = Math.min(time, found.duration);
  chart.moveTo(now);
  Object.assign(place, { ariaValueNow: now.toFixed(1), ariaValueText: clock(now) });
  if (!place.matches(":hover")) show(now);
  for (const { dataset: { start, end }, classList } of all("#segments tbody tr")) {
    classList.toggle("now", Number(start) <= time && time < Number(end));
  }
}
all("#segments tbody tr").forEach((row) => row.addEventListener("click", () => seek(Number(row.dataset.start))));
all("#moments button").forEach((moment) => moment.addEventListener("click", () => seek(Number(moment.dataset.time))));
all("#classes input").forEach((box, index) => box.addEventListener("change", () => {
  found.curves[index + 1].hidden = !box.checked;
  chart.redraw();
  show(null);
}));
if (video) {
  const giveUp = () => {
    [playable, video.hidden, one("#unplayable").hidden] = [false, true, false];
  };
  // A browser that knows the sound but not the pictures plays a video without size.
  const check = () => video.videoWidth || giveUp();
  const follow = () => {
    if (playable) moveTo(video.currentTime);
    if (!video.paused && !video.ended) requestAnimationFrame(follow);
  };
  if (video.error || video.readyState) check();
  const listeners = { error: giveUp, loadedmetadata: check, play: follow, seeking: follow, timeupdate: follow };
  for (const [name, listener] of Object.entries(listeners)) video.addEventListener(name, listener);
}
moveTo(0);
