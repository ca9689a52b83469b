// Draws one chart over time on a canvas: lines, or areas on top of each other, with an axis and a readout under the mouse.

const LEFT = 56;
const BOTTOM = 18;
const TOP = 8;

/** Round steps for an axis up to `top`: at most `count` of them, 1, 2 or 5 times a power of ten. */
export function ticks(top, count = 4) {
  if (!(top > 0)) return [0];
  const raw = top / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw * (1 - 1e-9));
  const marks = [];
  for (let mark = 0; mark <= top + step * 1e-6; mark += step) marks.push(mark);
  return marks;
}

/** 1234567 -> "1.23M". */
export function plain(value) {
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return `${trim(value / limit)}${letter}`;
  }
  return trim(value);
}

export const percent = (value) => `${trim(value * 100)} %`;
export const bytes = (value) => `${plain(value)}B`;

/** Seconds, in the unit that needs the fewest digits. */
export function seconds(value) {
  if (value < 1e-3 && value > 0) return `${trim(value * 1e6)} µs`;
  return value < 1 ? `${trim(value * 1e3)} ms` : `${trim(value)} s`;
}

function trim(value) {
  return String(Number(value.toPrecision(3)));
}

export class Chart {
  /**
   * `canvas` is drawn on; `format` makes text of a value; `stacked` puts areas on each other; `top` fixes the axis.
   */
  constructor(canvas, { format = plain, stacked = false, top = 0 } = {}) {
    this.canvas = canvas;
    this.format = format;
    this.stacked = stacked;
    this.top = top;
    this.mouse = null;
    this.drawn = null;
    canvas.addEventListener("mousemove", (event) => this.point(event.offsetX));
    canvas.addEventListener("mouseleave", () => this.point(null));
  }

  point(x) {
    this.mouse = x;
    if (this.drawn) this.draw(...this.drawn);
  }

  /** `names` of the series; `rows` of {time, values}, a value may be null; the axis runs from `from` to `to` seconds. */
  draw(names, rows, from, to) {
    this.drawn = [names, rows, from, to];
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.canvas);
    const plot = { left: LEFT, right: width - 8, top: TOP, bottom: height - BOTTOM };
    const layers = this.stacked ? stack(rows) : rows.map(({ values }) => values);
    const highest = Math.max(0, ...layers.flat().filter((value) => value !== null && Number.isFinite(value)));
    const marks = ticks(this.top || highest || 1);
    const top = this.top || Math.max(marks[marks.length - 1], highest) || 1;
    const x = (time) => plot.left + ((time - from) / (to - from)) * (plot.right - plot.left);
    const y = (value) => plot.bottom - (value / top) * (plot.bottom - plot.top);
    this.grid(pen, style, plot, marks, y, from, to, x);
    for (let index = names.length - 1; index >= 0; index--) {
      const color = style.getPropertyValue(`--series-${index % 7}`);
      const points = rows.map(({ time }, row) => [x(time), layers[row][index]]).filter(([at]) => at >= plot.left - 1);
      if (this.stacked) area(pen, points, y, plot.bottom, color);
      else line(pen, points, y, color);
    }
    if (this.mouse !== null && rows.length) this.readout(pen, style, plot, names, rows, x);
  }

  grid(pen, style, plot, marks, y, from, to, x) {
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const mark of marks) {
      const at = Math.round(y(mark)) + 0.5;
      pen.beginPath();
      pen.moveTo(plot.left, at);
      pen.lineTo(plot.right, at);
      pen.stroke();
      pen.fillText(this.format(mark), plot.left - 6, at);
    }
    pen.textBaseline = "alphabetic";
    for (const part of [0, 0.5, 1]) {
      const time = from + (to - from) * part;
      pen.textAlign = part === 0 ? "left" : part === 1 ? "right" : "center";
      pen.fillText(new Date(time * 1000).toLocaleTimeString(), x(time), plot.bottom + 14);
    }
  }

  readout(pen, style, plot, names, rows, x) {
    const nearest = rows.reduce((best, row) => (Math.abs(x(row.time) - this.mouse) < Math.abs(x(best.time) - this.mouse) ? row : best));
    const at = x(nearest.time);
    pen.strokeStyle = style.getPropertyValue("--muted");
    pen.beginPath();
    pen.moveTo(at, plot.top);
    pen.lineTo(at, plot.bottom);
    pen.stroke();
    const texts = names.map((name, index) => `${name}  ${nearest.values[index] === null ? "–" : this.format(nearest.values[index])}`);
    const width = Math.max(...texts.map((text) => pen.measureText(text).width)) + 24;
    const left = at + width + 12 > plot.right ? at - width - 6 : at + 6;
    pen.fillStyle = style.getPropertyValue("--panel");
    pen.fillRect(left, plot.top, width, texts.length * 15 + 6);
    pen.textAlign = "left";
    texts.forEach((text, index) => {
      const line_y = plot.top + 14 + index * 15;
      pen.fillStyle = style.getPropertyValue(`--series-${index % 7}`);
      pen.fillRect(left + 5, line_y - 8, 8, 8);
      pen.fillStyle = style.getPropertyValue("--text");
      pen.fillText(text, left + 18, line_y);
    });
  }
}

function stack(rows) {
  return rows.map(({ values }) => {
    let sum = 0;
    return values.map((value) => (sum += value ?? 0));
  });
}

function line(pen, points, y, color) {
  pen.strokeStyle = color;
  pen.lineWidth = 1.6;
  pen.beginPath();
  let open = false;
  for (const [x, value] of points) {
    if (value === null) open = false;
    else if (open) pen.lineTo(x, y(value));
    else {
      pen.moveTo(x, y(value));
      pen.lineTo(x + 0.1, y(value)); // a lone point is seen too
      open = true;
    }
  }
  pen.stroke();
}

function area(pen, points, y, bottom, color) {
  if (!points.length) return;
  pen.fillStyle = color;
  pen.beginPath();
  pen.moveTo(points[0][0], bottom);
  for (const [x, value] of points) pen.lineTo(x, y(value));
  pen.lineTo(points[points.length - 1][0], bottom);
  pen.fill();
}
