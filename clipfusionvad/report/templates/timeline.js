// Probabilities over the time of a video, on a canvas: small ones in lists, and large ones with axes and a cursor.
// A curve is {name, times, values, colour}, a span {start, end, colour, label}; times in seconds, colours as "--name".

/** 3.2 → "0:03.2", 3723 → "1:02:03"; tenths where ``tenths`` is set. */
function clock(seconds, tenths = false) {
  const whole = tenths ? Math.round(seconds * 10) / 10 : Math.round(seconds);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  const rest = (whole % 60).toFixed(tenths ? 1 : 0).padStart(tenths ? 4 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** A step for axis labels: about ``wanted`` of them over ``length`` seconds. */
function timeStep(length, wanted) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
  return steps.find((step) => length / step <= wanted) ?? Math.ceil(length / wanted / 86400) * 86400;
}

/** The index of the last of sorted ``times`` that is not after ``time``; 0 where all are. */
function indexAt(times, time) {
  let low = 0;
  let high = times.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (times[middle] <= time) low = middle;
    else high = middle;
  }
  return low;
}

/** A canvas made as sharp as the screen and cleared. */
function freshContext(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return [context, width, height];
}

function paintSpans(context, box, duration, spans) {
  for (const span of spans) {
    const left = box.left + (span.start / duration) * box.width;
    context.fillStyle = colour(span.colour);
    context.globalAlpha = span.alpha ?? 1;
    context.fillRect(left, box.top, Math.max(1.5, ((span.end - span.start) / duration) * box.width), box.height);
    context.globalAlpha = 1;
  }
}

/** A curve; where several values fall on one pixel, their range is drawn. */
function paintCurve(context, box, duration, curve, thickness) {
  const { times, values } = curve;
  const x = (index) => box.left + (times[index] / duration) * box.width;
  const y = (value) => box.top + (1 - value) * box.height;
  context.strokeStyle = colour(curve.colour);
  context.lineWidth = thickness;
  context.lineJoin = "round";
  context.beginPath();
  if (values.length === 1) {
    context.moveTo(box.left, y(values[0]));
    context.lineTo(box.left + box.width, y(values[0]));
  }
  let index = 0;
  while (index < values.length && values.length > 1) {
    const column = Math.floor(x(index));
    let [low, high, last] = [values[index], values[index], index];
    while (last + 1 < values.length && Math.floor(x(last + 1)) === column) {
      last += 1;
      low = Math.min(low, values[last]);
      high = Math.max(high, values[last]);
    }
    const start = [x(index), y(values[index])];
    if (index) context.lineTo(...start);
    else context.moveTo(...start);
    if (last > index) {
      context.lineTo(start[0], y(low));
      context.lineTo(start[0], y(high));
      context.lineTo(x(last), y(values[last]));
    }
    index = last + 1;
  }
  context.stroke();
}

/** A picture of a list: no axes. */
function drawSmall(canvas, { duration, curves, spans }) {
  const [context, width, height] = freshContext(canvas);
  const box = { left: 0, top: 2, width, height: height - 4 };
  paintSpans(context, { ...box, top: 0, height }, duration, spans);
  context.strokeStyle = colour("--line");
  context.beginPath();
  context.moveTo(0, height - 0.5);
  context.lineTo(width, height - 0.5);
  context.stroke();
  for (const curve of [...curves].reverse()) paintCurve(context, box, duration, curve, 1.3);
}

/** A large picture with axes, a line under the pointer and, given ``onSeek(seconds)``, a cursor to be moved. */
class Timeline {
  constructor(canvas, { duration, curves, spans, threshold = null, onSeek = null, onHover = () => {} }) {
    Object.assign(this, { canvas, duration, curves, spans, threshold, onSeek, onHover });
    this.cursor = onSeek ? 0 : null;
    this.hover = null;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
    if (onSeek) this.listenForSeeks();
    new ResizeObserver(() => this.draw()).observe(canvas);
    document.addEventListener("themechange", () => this.draw());
  }

  listenForSeeks() {
    const seek = (event) => this.onSeek(this.timeAt(event));
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      seek(event);
    });
    this.canvas.addEventListener("pointermove", (event) => event.buttons && seek(event));
    this.canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10 }[event.key];
      if (!move) return;
      event.preventDefault();
      this.onSeek(Math.min(this.duration, Math.max(0, this.cursor + move)));
    });
  }

  get box() {
    return { left: 34, top: 22, width: this.canvas.clientWidth - 46, height: this.canvas.clientHeight - 46 };
  }

  timeAt(event) {
    const { left, width } = this.box;
    const share = (event.clientX - this.canvas.getBoundingClientRect().left - left) / width;
    return Math.min(1, Math.max(0, share)) * this.duration;
  }

  point(event) {
    this.hover = event && this.timeAt(event);
    this.onHover(this.hover);
    this.draw();
  }

  moveTo(seconds) {
    this.cursor = Math.min(seconds, this.duration);
    this.draw();
  }

  draw() {
    if (!this.canvas.clientWidth) return;
    const [context] = freshContext(this.canvas);
    const box = this.box;
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    paintSpans(context, box, this.duration, this.spans);
    this.drawAxes(context, box);
    for (const curve of [...this.curves].reverse()) {
      if (!curve.hidden) paintCurve(context, box, this.duration, curve, curve.thin ? 1.2 : 2);
    }
    this.drawLabels(context, box);
    if (this.hover !== null) this.drawLine(context, box, this.hover, "--muted", 1);
    if (this.cursor !== null) this.drawLine(context, box, this.cursor, "--text", 2);
  }

  drawAxes(context, box) {
    context.lineWidth = 1;
    context.fillStyle = colour("--muted");
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const value of [0, 0.25, 0.5, 0.75, 1]) {
      const y = Math.round(box.top + (1 - value) * box.height) + 0.5;
      this.drawRule(context, box, y, "--line", []);
      if (value % 0.5 === 0) context.fillText(String(value), box.left - 6, y);
    }
    context.textBaseline = "top";
    context.textAlign = "center";
    const step = timeStep(this.duration, Math.max(2, box.width / 80));
    for (let time = 0; time <= this.duration + 1e-6; time += step) {
      const text = clock(time, step < 1);
      const room = box.left + box.width + 10 - context.measureText(text).width / 2;
      const x = Math.min(box.left + (time / this.duration) * box.width, room);
      context.fillText(text, x, box.top + box.height + 6);
    }
    if (this.threshold !== null) {
      this.drawRule(context, box, box.top + (1 - this.threshold) * box.height, "--alarm", [5, 4]);
    }
  }

  drawRule(context, box, y, name, dashes) {
    context.strokeStyle = colour(name);
    context.setLineDash(dashes);
    context.beginPath();
    context.moveTo(box.left, y);
    context.lineTo(box.left + box.width, y);
    context.stroke();
    context.setLineDash([]);
  }

  /** Names of spans over their beginning, as many as there is room for. */
  drawLabels(context, box) {
    let free = 0;
    context.textAlign = "left";
    context.textBaseline = "bottom";
    for (const span of [...this.spans].sort((one, other) => one.start - other.start)) {
      const width = span.label ? context.measureText(span.label).width : 0;
      const right = box.left + box.width;
      const left = Math.min(box.left + (span.start / this.duration) * box.width, right - width);
      if (!width || left < free) continue;
      context.fillStyle = colour(span.labelColour ?? "--text");
      context.fillText(span.label, left, box.top - 4);
      free = left + width + 8;
    }
  }

  drawLine(context, box, time, name, thickness) {
    const x = box.left + (time / this.duration) * box.width;
    context.strokeStyle = colour(name);
    context.lineWidth = thickness;
    context.beginPath();
    context.moveTo(x, box.top);
    context.lineTo(x, box.top + box.height);
    context.stroke();
  }
}

/** "0:12.3 · coarse branch 0.83 · fine branch 0.21" */
function readValues(curves, time) {
  const shown = curves.filter((curve) => !curve.hidden);
  const values = shown.map((curve) => `${curve.name} ${curve.values[indexAt(curve.edges ?? curve.times, time)].toFixed(2)}`);
  return [clock(time, true), ...values].join(" · ");
}
