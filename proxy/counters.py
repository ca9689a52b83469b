"""What the counters of the engine and of the workers mean: the help of their metrics, a line each in docs/metrics.md.

A counter that is not listed here is shown all the same, without a meaning; a test asks for it.
"""

from __future__ import annotations

PROMPT_SOURCES = ("gpu", "ram", "disk", "peer", "computed")
"""Where the KV of a prompt's tokens may come from: the pool of the worker, a tier below it, or a step."""

ENGINE_COUNTERS: dict[str, str] = {
    "requests_total": "Generations asked for.",
    "retries_total": "Attempts that failed and were followed by another, or by an error.",
    "busy_total": "Attempts that a worker had no room for.",
    "worker_lost_total": "Workers that went away, drained or not.",
    "rejected_queue_full_total": "Requests turned away because the queue was full.",
    "routed_disaggregated_total": "Attempts with a prefill and a decode worker.",
    "routed_local_short_total": "Attempts prefilled by decode because the prompt was short.",
    "routed_local_always_total": "Attempts prefilled by decode because all are.",
    "routed_local_no_prefill_worker_total": "Attempts prefilled by decode because there was no prefill worker.",
    "rejected_messages_total": "Messages that no worker should send to a proxy.",
    "queued_requests": "Generations that wait in the proxy for a worker.",
    "kv_index_blocks": "Blocks that the router knows a holder of.",
    "kv_index_evictions_total": "Blocks that the router forgot because there were too many.",
    "kv_event_batches_total": "Messages about gained and lost blocks.",
    "kv_event_blocks_total": "Blocks in them.",
    "kv_event_gaps_total": "Times that such a message was missing.",
    "kv_event_replays_total": "Times that a holder was asked for what is missing.",
    "kv_event_snapshots_total": "Whole lists of blocks that holders sent instead.",
}

WORKER_COUNTERS: dict[str, str] = {
    "steps": "Steps of the model.",
    "prompt_tokens": "Tokens of prompts taken on.",
    "local_prefill_tokens": "Tokens of prompts that a decode worker was to compute itself.",
    "generated_tokens": "Tokens drawn by decode.",
    "prefix_queries_tokens": "Tokens looked up in the worker's own pool.",
    "prefix_hits_tokens": "Tokens found there.",
    "prompt_tokens_gpu": "Tokens of prompts whose KV was in the worker's own pool.",
    "prompt_tokens_ram": "Tokens of prompts whose KV came from the host's memory.",
    "prompt_tokens_disk": "Tokens of prompts whose KV came from the host's disk.",
    "prompt_tokens_peer": "Tokens of prompts whose KV came from another host's store.",
    "prompt_tokens_computed": "Tokens of prompts that were computed.",
    "preemptions": "Sequences that gave up their KV.",
    "evictions": "Cached blocks that gave way to others.",
    "sent_blocks": "Blocks sent to decode.",
    "received_blocks": "Blocks received from prefill.",
    "transfers_sent": "Transfers handed over whole.",
    "transfers_received": "Transfers received whole.",
    "transfers_cancelled": "Transfers that nobody wanted any more.",
    "transfers_failed": "Transfers that went wrong.",
    "pairs_refused": "Workers that this one cannot exchange KV with.",
    "strange_messages": "Messages that fit no transfer.",
    "digest_retries": "Chunks that arrived damaged and were asked for once more.",
    "transfer_s_sum": "Seconds of all transfers together.",
}
