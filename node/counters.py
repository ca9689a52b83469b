"""What workers count, for their heartbeats: one field a metric, with its help beside it.

A field's name is its metric's name: `preemptions` is counted under this name, sent under it, and shown by the proxy as
`baton:worker_preemptions_total`. Time is in `_seconds`, sizes in `_bytes`; the exposition format appends `_total` to
what only grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class MetricInfo(NamedTuple):
    """What /metrics says of a metric."""

    help: str
    is_gauge: bool = False
    """It may fall."""


def counted(help: str) -> Any:
    """A dataclass field that starts at 0 and only grows."""
    return field(default=0, metadata={"metric": MetricInfo(help)})


def measured(help: str) -> Any:
    """A dataclass field that starts at 0 and may fall."""
    return field(default=0, metadata={"metric": MetricInfo(help, is_gauge=True)})


@dataclass(slots=True)
class WorkerCounters:
    """What every worker counts."""

    steps: int = counted("Steps of the model.")
    prompt_tokens: int = counted("Tokens of the prompts that were taken on.")
    prefix_queries_tokens: int = counted("Tokens looked up in the worker's own pool.")
    prefix_hits_tokens: int = counted("Tokens found in the worker's own pool.")
    prompt_tokens_gpu: int = counted("Tokens of prompts whose KV was in the worker's own pool.")
    prompt_tokens_computed: int = counted("Tokens of prompts that were computed.")
    evictions: int = counted("Cached blocks that were evicted.")
    masked_steps: int = counted("Steps with rows that have grammars.")
    mask_seconds: float = counted("Seconds in which the host made the masks of these rows.")


MOST_DRAFTS = 15
"""Drafts that a step verifies of one sequence at most."""
DRAFT_SOURCES = ("history", "prediction", "answers", "eagle", "grammar")


def _accepted_at(place: int) -> Any:
    return counted(f"Times that draft number {place} behind a sequence's last token was accepted.")


@dataclass(slots=True)
class DecodeCounters(WorkerCounters):
    """What a decode worker counts besides."""

    local_prefill_tokens: int = counted("Tokens of prompts that a decode worker was to compute itself.")
    generated_tokens: int = counted("Tokens drawn by decode.")
    spec_decode_num_drafts: int = counted("Times that drafts of a sequence were verified.")
    spec_decode_num_draft_tokens: int = counted("Draft tokens that were verified.")
    spec_decode_num_accepted_tokens: int = counted("Draft tokens that were accepted.")
    spec_decode_accepted_history: int = counted("Of these, those found among the sequence's own tokens.")
    spec_decode_accepted_prediction: int = counted("Of these, those that the client predicted.")
    spec_decode_accepted_answers: int = counted("Of these, those found in answers to similar prompts.")
    spec_decode_accepted_eagle: int = counted("Of these, those of an EAGLE-3 draft.")
    spec_decode_accepted_grammar: int = counted("Of these, those that a grammar allowed alone.")
    spec_decode_cooled_sequences: int = measured(
        "Running sequences with few drafts, since none was accepted for a while."
    )
    spec_decode_accepted_at_0: int = _accepted_at(0)
    spec_decode_accepted_at_1: int = _accepted_at(1)
    spec_decode_accepted_at_2: int = _accepted_at(2)
    spec_decode_accepted_at_3: int = _accepted_at(3)
    spec_decode_accepted_at_4: int = _accepted_at(4)
    spec_decode_accepted_at_5: int = _accepted_at(5)
    spec_decode_accepted_at_6: int = _accepted_at(6)
    spec_decode_accepted_at_7: int = _accepted_at(7)
    spec_decode_accepted_at_8: int = _accepted_at(8)
    spec_decode_accepted_at_9: int = _accepted_at(9)
    spec_decode_accepted_at_10: int = _accepted_at(10)
    spec_decode_accepted_at_11: int = _accepted_at(11)
    spec_decode_accepted_at_12: int = _accepted_at(12)
    spec_decode_accepted_at_13: int = _accepted_at(13)
    spec_decode_accepted_at_14: int = _accepted_at(14)
    preemptions: int = counted("Sequences that were preempted: they gave up their KV.")
    grammar_late_steps: int = counted(
        "Steps whose logits waited on the GPU for masks of grammars, for 50 microseconds or more."
    )
    grammar_late_seconds: float = counted("Seconds in which they waited.")
    device_busy_seconds: float = counted("Seconds in which the GPU computed steps.")
    device_gaps: int = counted("Steps that were launched while another was in flight.")
    device_gaps_short: int = counted("Steps of these that began within 50 microseconds of its end.")
    device_gap_seconds: float = counted(
        "Seconds between the end of a step and the begin of the one launched behind it."
    )


@dataclass(slots=True)
class TransferCounters:
    """What a worker's end of the transfer protocol counts."""

    sent_blocks: int = counted("Blocks sent to decode.")
    received_blocks: int = counted("Blocks received from prefill.")
    transfers_sent: int = counted("Transfers that were handed over.")
    transfers_received: int = counted("Transfers that were received.")
    transfers_cancelled: int = counted("Transfers that were cancelled.")
    transfers_failed: int = counted("Transfers that failed.")
    pairs_refused: int = counted("Workers that this one cannot exchange KV with.")
    unexpected_messages: int = counted("Messages that fit no transfer.")
    digest_retries: int = counted("Chunks that arrived damaged and were requested once more.")
    transfer_seconds: float = counted("Total time of all transfers, in seconds.")


@dataclass(slots=True)
class PrefixCounters:
    """What a worker counts of loading prefixes from the host's store, and of writing blocks behind."""

    store_attached: int = measured("1 while the worker has the host's store.")
    prompt_tokens_ram: int = counted("Tokens of prompts whose KV came from the host's memory.")
    prompt_tokens_disk: int = counted("Tokens of prompts whose KV came from the host's disk.")
    prompt_tokens_peer: int = counted("Tokens of prompts whose KV came from another host's store.")
    store_lookups_late: int = counted("Lookups that the worker stopped waiting for.")
    store_loads: int = counted("Prompts with KV loaded from the store.")
    store_loads_stopped: int = counted("Loads that were stopped because they took longer than computing would have.")
    store_gate_refused: int = counted("Prompts with KV in the store that were computed because that was quicker.")
    store_predicted_seconds: float = counted("Seconds that loads were expected to take.")
    store_actual_seconds: float = counted("Seconds that these loads took.")
    store_written_blocks: int = counted("Blocks written to the store.")
    store_dropped_blocks: int = counted("Blocks not written, because too many were being written.")


@dataclass(slots=True)
class StoreClientCounters:
    """What a worker's client of the host's store counts."""

    store_lookups: int = counted("Prompts that were looked up in the store.")
    store_lookups_lost: int = counted("Lookups without an answer, because there was no store.")
    store_loaded_bytes: int = counted("KV loaded from the store.")
    store_written_bytes: int = counted("KV written to the store.")
    store_damaged_blocks: int = counted("Blocks from the store that failed their digest.")
    store_failed_blocks: int = counted("Blocks that the store had found and then did not give.")
    store_disconnects: int = counted("Times that the connection to the store was lost.")


@dataclass(slots=True)
class GrammarCounters:
    """What a worker counts of compiling grammars."""

    grammar_requests: int = counted("Requests with grammars.")
    grammar_hits: int = counted("Requests with grammars whose grammar was compiled already.")
    grammars_compiled: int = counted("Grammars compiled; those that run at once are compiled several times.")
    grammar_compile_seconds: float = counted("Seconds of processor time that this took.")


@dataclass(slots=True)
class AdapterCounters:
    """What a worker counts of adapters."""

    adapter_loads: int = counted("Adapters read from their folders.")
    adapter_load_failures: int = counted("Adapters that could not be read, or not be used.")
    adapter_load_seconds: float = counted("Seconds that reading adapters took, beside the steps.")
    adapter_fills: int = counted("Adapters copied from the host's memory into a slot of the model.")
    adapter_wait_seconds: float = counted("Seconds from the arrival of requests until their adapters were in slots.")
    adapters_in_slots: int = measured("Adapters in slots of the model.")
    adapters_in_memory: int = measured("Adapters in the host's memory that are in no slot.")


Counters = WorkerCounters | TransferCounters | PrefixCounters | StoreClientCounters | GrammarCounters | AdapterCounters
WORKER_GROUPS: tuple[type[Counters], ...] = (
    DecodeCounters,
    TransferCounters,
    PrefixCounters,
    StoreClientCounters,
    GrammarCounters,
    AdapterCounters,
)


def values(*groups: Counters) -> dict[str, float]:
    """All fields by name."""
    return {each.name: float(getattr(group, each.name)) for group in groups for each in fields(group)}


def infos(*groups: type[Counters]) -> dict[str, MetricInfo]:
    """What each field means, by name."""
    return {each.name: each.metadata["metric"] for group in groups for each in fields(group)}
