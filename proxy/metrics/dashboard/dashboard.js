// The page: asks for the metrics once a second, keeps a quarter of an hour of each panel's values, and draws them.

import { Chart, percent, plain } from "./charts.js";
import { Scrape } from "./exposition.js";
import { PANELS, Recent, tiles, workers } from "./panels.js";

const POLL_MS = 1000;
const KEEP_S = 900;
const KEY = "baton-api-key";

const $ = (id) => document.getElementById(id);

function element(tag, { text = "", ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(text, ...children);
  return made;
}

/** A panel on the page, with what it has shown so far. */
class Panel {
  constructor(spec) {
    this.spec = spec;
    this.rows = [];
    this.names = [];
    const canvas = element("canvas");
    this.legend = element("p", { className: "legend" });
    $("panels").append(element("section", { id: spec.id }, element("h2", { text: spec.title }), canvas, this.legend));
    this.chart = new Chart(canvas, spec);
  }

  add(recent, time) {
    const values = this.spec.of({ now: recent.now, before: (ago_s) => recent.before(ago_s) });
    this.rows.push({ time, values });
    while (time - this.rows[0].time > KEEP_S) this.rows.shift();
    const known = new Set(this.names);
    for (const name of Object.keys(values)) known.add(name);
    this.names = [...known];
  }

  draw(to, window_s) {
    const from = to - window_s;
    const visible = this.rows.filter(({ time }) => time >= from);
    const rows = visible.map(({ time, values }) => ({ time, values: this.names.map((name) => values[name] ?? null) }));
    this.chart.draw(this.names, rows, from, to);
    const last = rows.length ? rows[rows.length - 1].values : [];
    this.legend.replaceChildren(
      ...this.names.map((name, index) => {
        const value = last[index] ?? null;
        const shown = value === null ? "–" : this.spec.format(value);
        return element("span", { className: `series-${index % 7}`, text: `${name} ` }, element("b", { text: shown }));
      }),
    );
  }
}

const recent = new Recent();
const panels = PANELS.map((spec) => new Panel(spec));

async function scrape() {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch("metrics", { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (answer.status === 401) $("key").hidden = false;
  if (!answer.ok) throw new Error(`the proxy answered ${answer.status}`);
  $("key").hidden = true;
  return new Scrape(await answer.text(), Date.now() / 1000);
}

function draw() {
  const window_s = Number($("window").value);
  const to = recent.now.time;
  for (const panel of panels) panel.draw(to, window_s);
}

function show() {
  const view = { now: recent.now, before: (ago_s) => recent.before(ago_s) };
  for (const panel of panels) panel.add(recent, recent.now.time);
  $("tiles").replaceChildren(
    ...tiles(view).map(([caption, text]) => element("div", {}, element("b", { text }), element("span", { text: caption }))),
  );
  $("workers").tBodies[0].replaceChildren(...workers(view).map(worker_row));
  draw();
}

function worker_row(worker) {
  const { running, waiting, waiting_tokens, used, steps } = worker;
  const cells = [running, waiting, waiting_tokens, steps].map((value) => element("td", { text: plain(value) }));
  const meter = element("meter", { value: used, max: 1, title: percent(used) });
  return element(
    "tr",
    { className: worker.state },
    ...[worker.worker, worker.role, worker.state].map((text) => element("td", { text })),
    ...cells,
    element("td", {}, meter, ` ${percent(used)}`),
  );
}

async function poll() {
  try {
    recent.add(await scrape());
    show();
    $("status").textContent = `live, ${new Date().toLocaleTimeString()}`;
    $("status").className = "good";
  } catch (error) {
    $("status").textContent = `no data: ${error.message}`;
    $("status").className = "bad";
  }
  setTimeout(poll, POLL_MS);
}

$("window").addEventListener("change", () => recent.now && draw());
window.addEventListener("resize", () => recent.now && draw());
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, new FormData($("key")).get("key"));
});
poll();
