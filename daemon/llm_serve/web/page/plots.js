// The plots: columns of numbers over one window of time, with the values under the pointer, or the last ones, in words.

const HEIGHT = 118;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const clockWithSeconds = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });

/** A number in at most four characters and a letter, as people read it on an axis. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return size >= 10 ? value.toFixed(1) : value.toFixed(2).replace(/\.?0+$/, "");
}

export const percent = (value) => (value === null || value === undefined ? "–" : `${short(value * 100)} %`);

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds === 0) return "0";
  return seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${short(seconds)} s`;
}

function tellTimes(_, times, __, ___, step) {
  return times.map((at) => (step < 60 ? clockWithSeconds : clock).format(at * 1000));
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** One plot. `series` are {label, color, dash, values(columns)}; `top(columns)` is the least upper end of the axis. */
class Plot {
  constructor(host, spec, group) {
    this.spec = spec;
    this.values = spec.series.map(() => element("b", { textContent: "–" }));
    const keys = spec.series.map(({ label, color }, number) => {
      const swatch = element("i");
      swatch.style.setProperty("--series", `var(${color})`);
      return element("span", {}, swatch, label ? `${label} ` : "", this.values[number]);
    });
    const box = element("div");
    const title = element("h3", {}, `${spec.title} `, element("small", { textContent: spec.unit ?? "" }));
    this.figure = element("figure", { className: "plot" }, title, element("div", { className: "keys" }, ...keys), box);
    host.append(this.figure);
    this.data = [[], ...spec.series.map(() => [])];
    this.plot = new uPlot(this.options(group), this.data, box);
    this.observer = new ResizeObserver(() => this.plot.setSize({ width: box.clientWidth, height: HEIGHT }));
    this.observer.observe(box);
  }

  options(group) {
    const { spec } = this;
    const axis = {
      font: "11px system-ui, sans-serif",
      stroke: () => css("--quiet"),
      grid: { stroke: () => css("--grid"), width: 1 },
      ticks: { show: false },
    };
    return {
      width: 280,
      height: HEIGHT,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: group }, drag: { x: false, y: false }, points: { size: 5 }, y: false },
      scales: { x: { time: true }, y: { range: (_, __, most) => [0, Math.max(this.top, (most ?? 0) * 1.1) || 1] } },
      axes: [
        { ...axis, size: 22, gap: 2, space: 60, values: tellTimes, incrs: [10, 20, 30, 60, 120, 300] },
        { ...axis, size: 46, gap: 3, space: 21, values: (_, all) => all.map(spec.tick ?? spec.format) },
      ],
      series: [
        {},
        ...spec.series.map(({ color, dash, fill }) => ({
          stroke: () => css(color),
          width: 1.5,
          dash,
          fill: fill ? () => `${css(color)}22` : undefined,
          points: { show: false },
        })),
      ],
      hooks: { setCursor: [() => this.tell()] },
    };
  }

  get top() {
    return this.least ?? 0;
  }

  update(columns, from, to) {
    this.least = this.spec.top?.(columns) ?? 0;
    this.data = [columns.time, ...this.spec.series.map(({ values }) => values(columns))];
    this.plot.batch(() => {
      this.plot.setData(this.data, false);
      this.plot.setScale("x", { min: from, max: to });
    });
    this.tell();
  }

  /** The values under the pointer, or the last ones. */
  tell() {
    const index = this.plot?.cursor.idx ?? this.data[0].length - 1;
    this.values.forEach((value, number) => {
      const text = this.spec.format(this.data[number + 1][index]);
      if (value.textContent !== text) value.textContent = text;
    });
    this.figure.title = this.plot?.cursor.idx == null ? "" : clockWithSeconds.format(this.data[0][index] * 1000);
  }

  redraw() {
    this.plot.redraw(false, true);
  }

  remove() {
    this.observer.disconnect();
    this.plot.destroy();
    this.figure.remove();
  }
}

/** All plots of one place. */
export class Plots {
  constructor(host) {
    this.host = host;
    this.plots = [];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plots.forEach((plot) => plot.redraw()));
  }

  show(specs) {
    this.plots.forEach((plot) => plot.remove());
    this.plots = specs.map((spec) => new Plot(this.host, spec, "llm-serve"));
  }

  update(columns, from, to) {
    this.plots.forEach((plot) => plot.update(columns, from, to));
  }
}

const column = (name) => (columns) => columns[name];

export const REQUESTS = [
  {
    title: "Tokens", unit: "/s", format: short,
    series: [
      { label: "generated", color: "--s1", fill: true, values: column("generated_tokens_per_s") },
      { label: "read", color: "--s2", values: column("prompt_tokens_per_s") },
    ],
  },
  {
    title: "Time to first token", unit: "of the last 10 s", format: duration,
    series: [
      { label: "median", color: "--s1", values: column("ttft_median_s") },
      { label: "P99", color: "--s2", dash: [4, 3], values: column("ttft_p99_s") },
    ],
  },
  {
    title: "Requests", format: short, top: () => 4,
    series: [
      { label: "running", color: "--s1", fill: true, values: column("running") },
      { label: "queued", color: "--s2", values: column("waiting") },
      { label: "held", color: "--s4", dash: [4, 3], values: column("held") },
    ],
  },
  {
    title: "KV cache", unit: "in use", format: percent, top: () => 1,
    series: [{ label: "", color: "--s1", fill: true, values: column("kv_cache_usage") }],
  },
];

const GIB = 2 ** 30;
const COLORS = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7", "--s8"];

/** The plots of these GPUs (of /status), in whose order the samples have them. */
export function ofGpus(gpus) {
  const each = (name, factor = 1) =>
    gpus.map(({ index }, number) => ({
      label: gpus.length > 1 ? `${index}` : "",
      color: COLORS[number % COLORS.length],
      dash: number < COLORS.length ? undefined : [4, 3],
      values: (columns) => columns.gpus.map((all) => (all[number]?.[name] ?? null) === null ? null : all[number][name] / factor),
    }));
  const most = (name, factor = 1) => Math.max(0, ...gpus.map((gpu) => (gpu[name] ?? 0) / factor));
  return [
    { title: "Temperature", unit: "°C", format: short, top: () => 90, series: each("temperature_celsius") },
    { title: "Power", unit: "W", format: short, top: () => most("power_limit_watts"), series: each("power_watts") },
    { title: "Memory", unit: "GiB", format: short, top: () => most("memory_total_bytes", GIB), series: each("memory_used_bytes", GIB) },
    { title: "Busy", unit: "share of time", format: percent, top: () => 1, series: each("utilization_ratio") },
  ];
}
