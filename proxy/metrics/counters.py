"""What the counters of the dispatcher, workers and stores mean: the help of their metrics, a line of docs/metrics.md.

Workers' counters are described in node/counters.py. A counter is shown under the name that it comes with; one that is
not described is shown all the same, and a test asks for its description.
"""

from __future__ import annotations

from baton.node.counters import WORKER_GROUPS, MetricInfo, infos
from baton.node.messages.store import TIER_NAMES
from baton.proxy.routing.router import CHOICE_REASONS

PROMPT_SOURCES = ("gpu", *TIER_NAMES, "computed")
"""Where the KV of a prompt's tokens may come from: the pool of the worker, a tier below it, or a step."""

ENGINE_COUNTERS: dict[str, str] = {
    "requests_total": "Generations that were requested.",
    "retries_total": "Attempts that failed and were followed by another, or by an error.",
    "busy_total": "Attempts that a worker had no room for.",
    "paused_total": "Attempts that ended because the client did not read.",
    "resumed_total": "Of these, those that another followed because it read again.",
    "worker_lost_total": "Workers that went away, drained or not.",
    "rejected_queue_full_total": "Requests refused because the queue was full.",
    "routed_disaggregated_total": "Attempts with a prefill and a decode worker.",
    "routed_local_short_total": "Attempts prefilled by decode because the prompt was short.",
    "routed_local_sooner_total": "Attempts prefilled by decode because a prefill worker would have been later.",
    "routed_local_transfer_failed_total": "Attempts prefilled by decode because transfers to it, or the request's own, "
    "failed.",
    "routed_local_always_total": "Attempts prefilled by decode because all prompts are.",
    "routed_local_no_prefill_worker_total": "Attempts prefilled by decode because there was no prefill worker.",
    **{
        f"routed_{role}_{why}_total": f"Attempts whose {role} worker was chosen because {text}."
        for role in ("prefill", "decode")
        for why, text in CHOICE_REASONS.items()
    },
    "kv_hit_predicted_tokens_total": "Tokens of prompts that the router expected to be cached.",
    "kv_hit_actual_tokens_total": "Tokens of the same prompts that were cached.",
    "kv_hit_missed_tokens_total": "Tokens that were expected to be cached, and were not.",
    "kv_hit_unforeseen_tokens_total": "Tokens that were cached, and not expected to be.",
    "rejected_messages_total": "Messages that no worker should send to a proxy.",
    "queued_requests": "Generations that wait in the proxy for a worker.",
    "orphaned": "1 while what started this proxy is gone: it drains --orphan-s later.",
    "mixed_prompt_workers": "Mixed workers that take no new answers, by the plan for the load.",
    "failed_pairs": "Pairs of a prefill and a decode worker that are avoided: a transfer failed, or no answer comes.",
    "kv_index_blocks": "Blocks for which the router knows a holder.",
    "kv_index_evictions_total": "Blocks evicted from the router's index, which was full.",
    "kv_event_batches_total": "Messages about blocks that holders gained and lost.",
    "kv_event_blocks_total": "Blocks in these messages.",
    "kv_event_gaps_total": "Times that such a message was missed.",
    "kv_event_replays_total": "Requests to a holder for the missing messages.",
    "kv_event_snapshots_total": "Full lists of blocks that holders sent instead.",
}

WORKER_COUNTERS = infos(*WORKER_GROUPS)

STORE_COUNTERS: dict[str, MetricInfo] = {
    **{
        name: MetricInfo(text, is_gauge=True)
        for name, text in {
            "ram_blocks": "Blocks in the host's memory.",
            "ram_used_bytes": "Size of the blocks in the host's memory.",
            "ram_size_bytes": "Size of the arena.",
            "workers": "Workers that are attached.",
            "holders": "Leases on blocks.",
            "disk_blocks": "Blocks on disk.",
            "disk_used_bytes": "Size of the blocks on disk.",
            "disk_size_bytes": "Capacity on disk; 0 while the disk is out of service.",
            "disk_writing_blocks": "Blocks that wait to be written to disk.",
            "disk_writing_bytes": "Size of the blocks that wait to be written to disk.",
        }.items()
    },
    **{
        name: MetricInfo(text)
        for name, text in {
            "ram_evictions_room": "Blocks evicted for others of the same model.",
            "ram_evictions_region": "Blocks evicted for those of another model.",
            "ram_evictions_damaged": "Blocks evicted because they failed their digest.",
            "lookups": "Prompts that were looked up.",
            "lookup_blocks": "Blocks in these prompts.",
            "found_ram": "Blocks found in memory.",
            "found_disk": "Blocks found on disk.",
            "found_peer": "Blocks found at another host's store.",
            "put_blocks": "Blocks offered by workers.",
            "put_granted": "Blocks that were accepted.",
            "put_committed": "Blocks that were written.",
            "loads_disk_ok": "Blocks brought from disk to memory for a load.",
            "loads_disk_failed": "Blocks that could not be brought from disk.",
            "loads_peer_ok": "Blocks brought from another host's store.",
            "loads_peer_failed": "Blocks that could not be brought from another host's store.",
            "peer_bytes": "KV received from other hosts.",
            "disk_open_failures": "Times that the disk could not be used.",
            "disk_queries": "Blocks looked up on disk.",
            "disk_hits": "Blocks read whose digest was right.",
            "disk_read_bytes": "KV read from disk.",
            "disk_read_seconds": "Seconds spent on reading from disk.",
            "disk_stored": "Blocks written to disk.",
            "disk_written_bytes": "KV written to disk.",
            "disk_write_seconds": "Seconds spent on writing to disk.",
        }.items()
    },
}
"""The disk's misses, refusals, evictions and drops come by reason beside these: disk_miss_corrupt and so on."""
