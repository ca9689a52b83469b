"""What the counters of engine, workers and stores mean: the help of their metrics, a line each in docs/metrics.md.

A counter that is not listed here is shown all the same, without a meaning; a test asks for it.
"""

from __future__ import annotations

from baton.node.messages.store import TIER_NAMES
from baton.proxy.routing.router import CHOICE_REASONS

PROMPT_SOURCES = ("gpu", *TIER_NAMES, "computed")
"""Where the KV of a prompt's tokens may come from: the pool of the worker, a tier below it, or a step."""

ENGINE_COUNTERS: dict[str, str] = {
    "requests_total": "Generations asked for.",
    "retries_total": "Attempts that failed and were followed by another, or by an error.",
    "busy_total": "Attempts that a worker had no room for.",
    "worker_lost_total": "Workers that went away, drained or not.",
    "rejected_queue_full_total": "Requests turned away because the queue was full.",
    "routed_disaggregated_total": "Attempts with a prefill and a decode worker.",
    "routed_local_short_total": "Attempts prefilled by decode because the prompt was short.",
    "routed_local_sooner_total": "Attempts prefilled by decode because prefill would have been later.",
    "routed_local_always_total": "Attempts prefilled by decode because all are.",
    "routed_local_no_prefill_worker_total": "Attempts prefilled by decode because there was no prefill worker.",
    **{
        f"routed_{role}_{why}_total": f"Attempts whose {role} worker was chosen because {text}."
        for role in ("prefill", "decode")
        for why, text in CHOICE_REASONS.items()
    },
    "kv_hit_predicted_tokens_total": "Tokens of prompts that the router expected to be cached.",
    "kv_hit_actual_tokens_total": "Tokens of the same prompts that were.",
    "kv_hit_missed_tokens_total": "Tokens that were expected to be cached, and were not.",
    "kv_hit_unforeseen_tokens_total": "Tokens that were cached, and not expected to be.",
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
    "device_busy_s": "Seconds in which the GPU computed steps.",
    "device_gaps": "Steps that were launched while another was under way.",
    "device_gaps_short": "Those of them that began within 50 microseconds of its end.",
    "device_gap_s": "Seconds between the ends of steps and the begins of those that were launched behind them.",
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
    "store_attached": "1 while the worker has the host's store.",
    "store_lookups": "Prompts that the store was asked for.",
    "store_lookups_lost": "Lookups without an answer, because there was no store.",
    "store_lookups_late": "Lookups that were not waited for any longer.",
    "store_loads": "Prompts with KV loaded from the store.",
    "store_loads_stopped": "Loads that took longer than computing would have.",
    "store_gate_refused": "Prompts whose KV was there, and computed because that was quicker.",
    "store_loaded_bytes": "KV loaded from the store.",
    "store_predicted_s": "Seconds that loads were expected to take.",
    "store_actual_s": "Seconds that the same loads took.",
    "store_written_blocks": "Blocks written to the store.",
    "store_written_bytes": "KV written to the store.",
    "store_dropped_blocks": "Blocks not written, because too many were being written.",
    "store_damaged_blocks": "Blocks that the store gave and that were not what they should be.",
    "store_failed_blocks": "Blocks that the store had found and then did not give.",
    "store_times_lost": "Times that the store went away.",
}

STORE_COUNTERS: dict[str, str] = {
    "ram_blocks": "Blocks in the host's memory.",
    "ram_used_bytes": "Their size.",
    "ram_size_bytes": "Size of the arena.",
    "workers": "Workers that are attached.",
    "holders": "Leases on blocks.",
    "ram_evictions_room": "Blocks that gave way to others of their kind.",
    "ram_evictions_region": "Blocks that gave way to those of another model.",
    "ram_evictions_damaged": "Blocks that were not any more what they should be.",
    "lookups": "Prompts that were asked for.",
    "lookup_blocks": "Blocks in them.",
    "found_ram": "Blocks found in memory.",
    "found_disk": "Blocks found on disk.",
    "found_peer": "Blocks found at another host's store.",
    "put_blocks": "Blocks offered by workers.",
    "put_granted": "Blocks that were wanted.",
    "put_committed": "Blocks that came.",
    "loads_disk_ok": "Blocks brought from disk to memory for somebody.",
    "loads_disk_failed": "Blocks that could not be.",
    "loads_peer_ok": "Blocks brought from another host's store.",
    "loads_peer_failed": "Blocks that could not be.",
    "peer_bytes": "KV received from other hosts.",
    "disk_blocks": "Blocks on disk.",
    "disk_used_bytes": "Their size.",
    "disk_size_bytes": "Room on disk; 0 while it is out of service.",
    "disk_writing_blocks": "Blocks that wait to be written.",
    "disk_writing_bytes": "Their size.",
    "disk_open_failures": "Times that the disk could not be used.",
    "disk_queries": "Blocks looked for on disk.",
    "disk_hits": "Blocks read and found right.",
    "disk_read_bytes": "KV read.",
    "disk_read_s": "Seconds that it took.",
    "disk_stored": "Blocks written.",
    "disk_written_bytes": "KV written.",
    "disk_write_s": "Seconds that it took.",
}
"""The disk's misses, refusals, evictions and drops come by reason beside these: disk_miss_corrupt and so on."""

GAUGES = frozenset(
    {
        "store_attached",
        "ram_blocks",
        "ram_used_bytes",
        "ram_size_bytes",
        "workers",
        "holders",
        "disk_blocks",
        "disk_used_bytes",
        "disk_size_bytes",
        "disk_writing_blocks",
        "disk_writing_bytes",
    }
)
"""What may fall."""
