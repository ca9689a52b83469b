// Prometheus' text format into samples, and what can be asked of one scrape or of two. Knows no page and no metric's name.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/** One reading of a metrics page: `time` in seconds, and samples by metric name. */
export class Scrape {
  constructor(text, time) {
    this.time = time;
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const match = SAMPLE.exec(line);
      if (!match || line.startsWith("#")) continue;
      const labels = {};
      for (const [, key, value] of (match[2] ?? "").matchAll(LABEL)) {
        labels[key] = value.replace(/\\[\\"n]/g, (escape) => ESCAPES[escape]);
      }
      if (!this.samples.has(match[1])) this.samples.set(match[1], []);
      this.samples.get(match[1]).push({ labels, value: Number(match[3]) });
    }
  }

  has(name) {
    return this.samples.has(name);
  }

  /** The samples of a metric whose labels hold all of `where`. */
  select(name, where = {}) {
    const wanted = Object.entries(where);
    return (this.samples.get(name) ?? []).filter(({ labels }) => wanted.every(([key, value]) => labels[key] === value));
  }

  sum(name, where = {}) {
    return this.select(name, where).reduce((total, { value }) => total + value, 0);
  }

  /** Values of one label, in order of first appearance. */
  values(name, label, where = {}) {
    return [...new Set(this.select(name, where).map(({ labels }) => labels[label]))];
  }
}

/** How much a counter grew between two scrapes. One that fell belongs to a process that began anew: it grew from 0. */
export function growth(before, now, name, where = {}) {
  const key = ({ labels }) => JSON.stringify(Object.entries(labels).sort());
  const old = new Map(before.select(name, where).map((sample) => [key(sample), sample.value]));
  let total = 0;
  for (const sample of now.select(name, where)) {
    const was = old.get(key(sample)) ?? 0;
    total += sample.value >= was ? sample.value - was : sample.value;
  }
  return total;
}

/** Growth a second. */
export function rate(before, now, name, where = {}) {
  const seconds = now.time - before.time;
  return seconds > 0 ? growth(before, now, name, where) / seconds : 0;
}

/**
 * Quantiles of what a histogram observed between two scrapes, by linear interpolation inside a bucket, as PromQL's
 * histogram_quantile does; null where it observed nothing.
 */
export function quantiles(before, now, name, wanted, where = {}) {
  const bounds = now.values(`${name}_bucket`, "le", where);
  const buckets = bounds
    .map((le) => ({ le: le === "+Inf" ? Infinity : Number(le), count: growth(before, now, `${name}_bucket`, { ...where, le }) }))
    .sort((a, b) => a.le - b.le);
  const total = buckets.length ? buckets[buckets.length - 1].count : 0;
  return wanted.map((quantile) => (total > 0 ? inside(buckets, quantile * total) : null));
}

function inside(buckets, rank) {
  const index = buckets.findIndex(({ count }) => count >= rank);
  const low = index > 0 ? buckets[index - 1] : { le: 0, count: 0 };
  const high = buckets[index];
  if (high.le === Infinity) return low.le;
  const part = high.count > low.count ? (rank - low.count) / (high.count - low.count) : 1;
  return low.le + (high.le - low.le) * part;
}

/** Mean of what a histogram observed between two scrapes; null where it observed nothing. */
export function mean(before, now, name, where = {}) {
  const count = growth(before, now, `${name}_count`, where);
  return count > 0 ? growth(before, now, `${name}_sum`, where) / count : null;
}
