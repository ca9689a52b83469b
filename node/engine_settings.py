"""Options of workers that their launchers share with them: `baton serve` and `baton ray` pass them on to every worker.

It owns what users of one command set most often. Sizes that are not given depend on the device; workers know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from baton.node.settings import as_arguments, option


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Types of weights and KV, and sizes of steps. Without slots, so that a launcher's settings may have a second base
    class with some."""

    dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16"),
        help="dtype of weights and KV; auto: float32, on a GPU bfloat16",
    )
    kv_dtype: str = option(
        "auto",
        choices=("auto", "fp8", "fp8_static"),
        help="dtype of KV; auto: that of --dtype; fp8: with a scale for each token and head; fp8_static: with the "
        "scales of the checkpoint",
    )
    quantization: str | None = option(
        None,
        choices=("fp8", "fp8_block", "int8", "int4", "int4_zeros"),
        help="quantise the plain weights of a model while they are loaded; default: they stay as they are",
    )
    max_model_len: int | None = option(
        None, unit="tokens", help="longest sequence; default: what the model's config says", minimum=1
    )
    max_num_seqs: int | None = option(
        None,
        unit="sequences",
        help="most sequences that run at once in a worker; default 64, on a GPU 256",
        minimum=1,
        maximum=4096,
    )
    max_num_batched_tokens: int | None = option(
        None,
        unit="tokens",
        help="token budget of a step; default 512, on a GPU 8192, for prefill 4096",
        minimum=1,
        maximum=1 << 20,
    )


def engine_arguments(settings: EngineSettings) -> list[str]:
    """The command line of a worker with these settings."""
    values: Mapping[str, Any] = {each.name: getattr(settings, each.name) for each in fields(EngineSettings)}
    return as_arguments(EngineSettings, values)
