// What the dashboard shows: each panel's numbers out of the scrapes of the proxy's metrics page. No drawing in here.

import { growth, mean, quantiles, rate } from "./exposition.js";
import { bytes, percent, plain, seconds } from "./charts.js";

const PROMPT_TOKENS = "baton:prompt_tokens_total";
const SOURCES = ["gpu", "ram", "disk", "peer", "computed"];
const QUANTILES = { p50: 0.5, p90: 0.9, p99: 0.99 };
const RATE_S = 5; // a rate is taken over the last so many seconds
const SPREAD_S = 30; // and so are quantiles, which need more observations

/** The last scrapes: enough to look back from the newest one. */
export class Recent {
  constructor() {
    this.scrapes = [];
  }

  add(scrape) {
    this.scrapes.push(scrape);
    while (scrape.time - this.scrapes[0].time > SPREAD_S + 2) this.scrapes.shift();
  }

  get now() {
    return this.scrapes[this.scrapes.length - 1];
  }

  /** The newest scrape that is at least so old, or the oldest. */
  before(ago_s) {
    const until = this.now.time - ago_s + 0.05;
    return this.scrapes.findLast(({ time }) => time <= until) ?? this.scrapes[0];
  }
}

function latency(metric) {
  return ({ now, before }) => {
    const found = quantiles(before(SPREAD_S), now, metric, Object.values(QUANTILES));
    return Object.fromEntries(Object.keys(QUANTILES).map((name, index) => [name, found[index]]));
  };
}

function by_label(now, metric, label, value) {
  return Object.fromEntries(now.values(metric, label).map((name) => [name, value(name)]));
}

/** Prompt tokens a second by source; a source that no worker has is left out. */
function sources({ now, before }) {
  const present = SOURCES.filter((source) => now.select(PROMPT_TOKENS, { source }).length);
  return Object.fromEntries(present.map((source) => [source, rate(before(RATE_S), now, PROMPT_TOKENS, { source })]));
}

/** Part of the prompt tokens that came from each tier, over half a minute. */
function hit_rate({ now, before }) {
  const old = before(SPREAD_S);
  const total = growth(old, now, PROMPT_TOKENS);
  const tiers = SOURCES.filter((source) => source !== "computed" && now.select(PROMPT_TOKENS, { source }).length);
  return Object.fromEntries(
    tiers.map((source) => [source, total > 0 ? growth(old, now, PROMPT_TOKENS, { source }) / total : null]),
  );
}

function occupancy({ now }) {
  const shown = {};
  for (const role of ["prefill", "decode"]) {
    const total = now.sum("baton:worker_total_blocks", { role });
    if (total) shown[`gpu, ${role}`] = 1 - now.sum("baton:worker_free_blocks", { role }) / total;
  }
  for (const tier of now.values("baton:tier_capacity_bytes", "tier")) {
    const capacity = now.sum("baton:tier_capacity_bytes", { tier });
    if (capacity) shown[tier] = now.sum("baton:tier_used_bytes", { tier }) / capacity;
  }
  return shown;
}

function transfers({ now, before }) {
  const metric = "baton:transfer_bytes_total";
  const old = before(RATE_S);
  const shown = {};
  for (const { labels } of now.select(metric)) {
    const { prefill, decode } = labels;
    shown[`${prefill} → ${decode}`] = rate(old, now, metric, { prefill, decode });
  }
  return shown;
}

function ttft_by_source({ now, before }) {
  const metric = "baton:ttft_by_source_seconds";
  const old = before(SPREAD_S);
  return by_label(now, `${metric}_count`, "source", (source) => mean(old, now, metric, { source }));
}

/** Mean seconds of a request in each stage before its first token. */
function stages({ now, before }) {
  const metric = "baton:request_stage_seconds";
  const old = before(SPREAD_S);
  const requests = growth(old, now, "vllm:time_to_first_token_seconds_count");
  const until = "first_token";
  const mean_of = (stage) => (requests > 0 ? growth(old, now, `${metric}_sum`, { stage, until }) / requests : null);
  return Object.fromEntries(now.values(`${metric}_sum`, "stage", { until }).map((stage) => [stage, mean_of(stage)]));
}

/** Generations a second by adapter. */
function adapters({ now, before }) {
  const metric = "baton:adapter_generations_total";
  return by_label(now, metric, "adapter", (adapter) => rate(before(RATE_S), now, metric, { adapter }));
}

/** What a sequence gets of a step that verified drafts of its: those that were accepted, and one more. */
function tokens_a_step({ now, before }) {
  const old = before(SPREAD_S);
  const drafted = growth(old, now, "vllm:spec_decode_num_drafts_total");
  const accepted = growth(old, now, "vllm:spec_decode_num_accepted_tokens_total");
  return { "tokens a step": drafted > 0 ? 1 + accepted / drafted : null };
}

export const PANELS = [
  { id: "hit-rate", title: "KV hit rate by tier", format: percent, stacked: true, top: 1, of: hit_rate },
  { id: "sources", title: "Prompt tokens/s by source", format: plain, stacked: true, of: sources },
  { id: "occupancy", title: "KV occupancy", format: percent, top: 1, of: occupancy },
  { id: "transfers", title: "KV transfers by pair, B/s", format: bytes, stacked: true, of: transfers },
  { id: "ttft", title: "Time to first token", format: seconds, of: latency("vllm:time_to_first_token_seconds") },
  { id: "tbt", title: "Time between tokens", format: seconds, of: latency("vllm:inter_token_latency_seconds") },
  { id: "e2e", title: "End to end", format: seconds, of: latency("vllm:e2e_request_latency_seconds") },
  { id: "ttft-by-source", title: "Mean TTFT by where the prompt's KV came from", format: seconds, of: ttft_by_source },
  { id: "stages", title: "Where the time went, mean a request", format: seconds, stacked: true, of: stages },
  {
    id: "tokens",
    title: "Tokens/s",
    format: plain,
    of: ({ now, before }) => ({
      generated: rate(before(RATE_S), now, "vllm:generation_tokens_total"),
      prompt: rate(before(RATE_S), now, "vllm:prompt_tokens_total"),
    }),
  },
  { id: "drafts", title: "Tokens a step with drafts", format: plain, of: tokens_a_step },
  { id: "adapters", title: "Generations/s by adapter", format: plain, stacked: true, of: adapters },
  {
    id: "queue",
    title: "Requests",
    format: plain,
    of: ({ now }) => ({
      running: now.sum("vllm:num_requests_running"),
      waiting: now.sum("vllm:num_requests_waiting"),
      "queued in the proxy": now.sum("baton:queued_requests"),
    }),
  },
  {
    id: "trouble",
    title: "Retries, busy answers and failures a second",
    format: plain,
    of: ({ now, before }) => ({
      retries: rate(before(RATE_S), now, "baton:retries_total"),
      busy: rate(before(RATE_S), now, "baton:busy_total"),
      failures: rate(before(RATE_S), now, "baton:request_failures_total"),
    }),
  },
];

/** The row of numbers at the top: [caption, text]. */
export function tiles({ now, before }) {
  const old = before(SPREAD_S);
  const [ttft, ttft_99] = quantiles(old, now, "vllm:time_to_first_token_seconds", [0.5, 0.99]);
  const [tbt, tbt_99] = quantiles(old, now, "vllm:inter_token_latency_seconds", [0.5, 0.99]);
  const total = growth(old, now, PROMPT_TOKENS);
  const computed = growth(old, now, PROMPT_TOKENS, { source: "computed" });
  const text = (value, format) => (value === null ? "–" : format(value));
  return [
    ["workers ready", plain(now.sum("baton:worker_up", { state: "ready" }))],
    ["running", plain(now.sum("vllm:num_requests_running"))],
    ["waiting", plain(now.sum("vllm:num_requests_waiting"))],
    ["tokens/s", plain(rate(before(RATE_S), now, "vllm:generation_tokens_total"))],
    ["KV hit rate", text(total > 0 ? 1 - computed / total : null, percent)],
    ["TTFT p50 / p99", `${text(ttft, seconds)} / ${text(ttft_99, seconds)}`],
    ["TBT p50 / p99", `${text(tbt, seconds)} / ${text(tbt_99, seconds)}`],
  ];
}

/** A row for each worker. */
export function workers({ now, before }) {
  const old = before(RATE_S);
  return now.select("baton:worker_up").map(({ labels: { worker, role, state } }) => {
    const value = (name) => now.sum(`baton:worker_${name}`, { worker, role });
    const total = value("total_blocks");
    return {
      worker,
      role,
      state,
      running: value("running"),
      waiting: value("waiting"),
      waiting_tokens: value("waiting_tokens"),
      used: total ? 1 - value("free_blocks") / total : 0,
      steps: rate(old, now, "baton:worker_steps_total", { worker, role }),
    };
  });
}
