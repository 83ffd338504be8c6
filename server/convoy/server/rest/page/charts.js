// Charts of the last five minutes, drawn by uPlot. Without a pointer the readouts cover all of it.

import { duration, node, number } from "./format.js";

const SHOWN_S = 300;
const HEIGHT_PX = 136;
const perSecond = (value) => (value === null ? "–" : `${number(value)}/s`);

// Each line: its name, and the name of its values. `scale` is from the values' unit to the axis's.
const CHARTS = [
  { title: "Latency", unit: "ms", scale: 1000, shown: duration,
    lines: [["p50", "p50_s"], ["p90", "p90_s"], ["p99", "p99_s"]] },
  { title: "Requests", unit: "per second", scale: 1, shown: perSecond,
    lines: [["answered", "answered_per_s"], ["failed", "failed_per_s"]] },
  { title: "Where the time goes, mean", unit: "ms", scale: 1000, shown: duration,
    lines: [["decode", "decode_s"], ["queue", "queue_s"], ["inference", "inference_s"]] },
  { title: "Batch size, mean", unit: "images", scale: 1, shown: number,
    lines: [["mean", "batch_size"]] },
  { title: "Waiting, at most", unit: "images", scale: 1, shown: number,
    lines: [["for a batch", "queued_images"], ["for decoding, all models", "decode_queued_images"]] },
];

// A color of the style sheet; its light-dark() is a color only where it is used.
function resolved(name) {
  const probe = node("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

// The points between two gaps, which no line shows.
function lonePoints(plot, series) {
  const values = plot.data[series];
  const missing = (at) => values[at] === null || values[at] === undefined;
  return values.flatMap((value, at) => (!missing(at) && missing(at - 1) && missing(at + 1) ? [at] : []));
}

function ago(seconds) {
  return seconds === 0 ? "now" : `${number(seconds / 60)} min`;
}

class Chart {
  constructor({ title, unit, scale, shown, lines }) {
    Object.assign(this, { title, unit, scale, shown, lines });
    this.readout = node("span", { className: "readout" });
    this.plot = node("div", { className: "plot", attributes: { role: "img" } });
    const caption = node("figcaption", {}, node("span", { className: "title" }, `${title} (${unit})`), this.readout);
    this.figure = node("figure", {}, caption, this.plot);
    this.traffic = null;
  }

  draw() {
    this.drawn?.destroy();
    const ink = resolved("--faint"), grid = { stroke: resolved("--line"), width: 1 };
    const axis = { stroke: ink, grid, ticks: { ...grid, size: 4 }, font: "12px system-ui, sans-serif" };
    this.drawn = new uPlot({
      width: this.#width(), height: HEIGHT_PX, legend: { show: false },
      scales: { x: { time: false, range: [-SHOWN_S, 0] }, y: { range: (_, low, high) => [0, high > 0 ? 1.1 * high : 1] } },
      axes: [
        { ...axis, size: 26, splits: (plot) => (plot.width < 360 ? [-300, -150, 0] : [-300, -240, -180, -120, -60, 0]), values: (_, at) => at.map(ago) },
        { ...axis, size: 52, values: (_, at) => at.map(number) },
      ],
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "traffic" }, points: { size: 7 } },
      series: [{}, ...this.lines.map(([label], nth) => ({
        label, stroke: resolved(["--first", "--second", "--third"][nth]), width: 2,
        points: { show: true, size: 5, filter: lonePoints },
      }))],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx)] },
    }, this.#data(), this.plot);
  }

  show(traffic) {
    this.traffic = traffic;
    if (this.drawn) this.drawn.setData(this.#data());
    else this.draw();
    this.#read(this.drawn.cursor.left >= 0 ? this.drawn.cursor.idx : null);
  }

  resize() {
    this.drawn?.setSize({ width: this.#width(), height: HEIGHT_PX });
  }

  #width() { return Math.max(160, this.plot.clientWidth || 400); }

  #data() {
    const { times_s: times, now_s: now, series } = this.traffic;
    const scaled = (values) => values.map((value) => (value === null ? null : value * this.scale));
    return [times.map((at) => at - now), ...this.lines.map(([, key]) => scaled(series[key]))];
  }

  // Of the window, or of the interval under the pointer.
  #read(index) {
    if (!this.traffic) return;
    const { series, window, times_s: times } = this.traffic;
    const inside = index !== null && index !== undefined && index < times.length;
    const values = this.lines.map(([name, key], nth) => {
      const value = inside ? series[key][index] : key in window ? window[key] : Math.max(0, ...series[key]);
      return [name, this.shown(value), nth];
    });
    const when = inside ? `${new Date(times[index] * 1000).toLocaleTimeString()}: ` : "";
    this.readout.replaceChildren(when, ...values.map(([name, text, nth]) => node(
      "span", {}, node("i", { className: `c${nth}` }), `${name} `, node("b", {}, text))));
    this.plot.setAttribute("aria-label", `${this.title} over the last five minutes: `
      + values.map(([name, text]) => `${name} ${text}`).join(", "));
  }
}

export class Charts {
  constructor(place) {
    this.charts = CHARTS.map((chart) => new Chart(chart));
    place.replaceChildren(...this.charts.map(({ figure }) => figure));
    new ResizeObserver(() => this.charts.forEach((chart) => chart.resize())).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.charts.filter(({ drawn }) => drawn).forEach((chart) => chart.draw());
    });
  }

  show(traffic) {
    this.charts.forEach((chart) => chart.show(traffic));
  }
}
