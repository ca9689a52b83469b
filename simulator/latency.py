"""The latency model that replaces the GPUs, and the profile file with one machine's coefficients.

    prefill step  a + b * sum(l) + c * sum(l^2)            l: tokens of the prompts in the step
    decode step   a + b * sum(context) + c * batch

A chunk of l tokens behind s known ones counts ((s + l)^2 - s^2) for l^2: the chunks of a prompt then add up to the
whole. A step with both kinds of rows takes the prefill's time plus the cost of the decoding rows without the fixed
part. Tokens of prompts cost at least as much as the same number of decoding rows without context: measured prompts are
long, and a short one also reads all weights.
Coefficients are in seconds; simulator.fit finds them from measured steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from baton.kvtransfer.blocks.layout import KVLayout
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError

PROFILES = Path(__file__).resolve().parent / "profiles"
Positive = Annotated[float, Meta(ge=0.0)]


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`a + b * x + c * y`, in seconds."""

    a: Positive
    b: Positive
    c: Positive

    def seconds(self, x: float, y: float) -> float:
        return self.a + self.b * x + self.c * y


class RowWork(msgspec.Struct, frozen=True):
    """One row of a step: `length` tokens behind `start` known ones."""

    start: int
    length: int


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of kvtransfer.blocks.layout.KVLayout that the simulator needs."""

    num_layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    scales: Literal["none", "token"] = "none"
    planes: int = 2


class StoreCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Costs of a host's KV store. Bandwidths are in bytes a second, of the whole host."""

    host_workers: Annotated[int, Meta(ge=1)]
    """Workers that share a host, and its store."""
    answer_s: Positive
    """From a question to its answer."""
    gpu_bytes_s: Annotated[float, Meta(gt=0.0)]
    """Between RAM and the workers' pools, both directions together."""
    disk_read_bytes_s: Annotated[float, Meta(gt=0.0)]
    disk_write_bytes_s: Annotated[float, Meta(gt=0.0)]


class RankSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Steps of a worker of so many ranks, as measured."""

    ranks: Annotated[int, Meta(ge=2)]
    about: str
    prefill: Cost
    decode: Cost


class RankSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What it takes longer that a norm sums one row of so many ranks."""

    ranks: Annotated[int, Meta(ge=2)]
    seconds: Positive


class Parallel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of workers of several GPUs; simulator.parallel reckons with it."""

    gpu_bytes: Annotated[int, Meta(gt=0)]
    """Of one GPU, for weights and KV."""
    weights_bytes: Annotated[int, Meta(gt=0)]
    hidden_bytes: Annotated[int, Meta(gt=0)]
    """Of a token's residual."""
    sums: tuple[RankSum, ...]
    measured: tuple[RankSteps, ...] = ()
    """They count before arithmetic."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The costs of one model on one machine. docs/benchmarks/simulator.md gives the source of the shipped profiles."""

    name: str
    about: str
    prefill: Cost
    decode: Cost
    request_s: Positive
    """From a request's first byte to the router: HTTP, template, tokeniser."""
    stream_s: Positive
    """From the proxy's session to the client: detokeniser, HTTP."""
    message_s: Positive
    """One control message, from the call that sends it to the loop that reads it."""
    chunk_s: Positive
    """What a movement of KV costs whatever its size."""
    link_bytes_s: Annotated[float, Meta(gt=0.0)]
    """Bandwidth of a worker in each direction, in bytes a second."""
    store: StoreCosts
    layout: Layout
    num_blocks: Annotated[int, Meta(ge=2)]
    max_model_len: Annotated[int, Meta(ge=1)]
    max_num_seqs: Annotated[int, Meta(ge=1)]
    prefill_budget_tokens: Annotated[int, Meta(ge=1)]
    """Token budget of a prefill worker's step, and its longest chunk."""
    prefill_chunk_tokens: Annotated[int, Meta(ge=1)]
    decode_budget_tokens: Annotated[int, Meta(ge=1)]
    """Token budget of a decode worker's step, and the longest chunk of a prompt that it computes itself."""
    decode_chunk_tokens: Annotated[int, Meta(ge=1)]
    chunk_mib: Annotated[float, Meta(gt=0.0)]
    """KV bytes in one transfer message."""
    parallel: Parallel | None = None
    """None: workers have one GPU each."""

    def kv_layout(self) -> KVLayout:
        return KVLayout.of_model(**msgspec.structs.asdict(self.layout))

    def step_s(self, rows: Sequence[RowWork]) -> float:
        """Seconds of one step over these rows."""
        tokens = pairs = context = decoding = 0
        for row in rows:
            if row.length == 1:
                decoding += 1
                context += row.start + 1
            else:
                tokens += row.length
                pairs += (row.start + row.length) ** 2 - row.start**2
        if not tokens:
            return self.decode.seconds(context, decoding)
        beside = self.decode.seconds(context, decoding) - self.decode.a
        return max(self.prefill.seconds(tokens, pairs), self.decode.seconds(0, tokens)) + beside


def load_profile(name: str) -> Profile:
    """A profile by the name of a shipped one, or by its file; raises SettingsError."""
    path = Path(name) if "/" in name or name.endswith(".json") else PROFILES / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.json")))
        raise SettingsError(f"there is no profile {name}; shipped are {known}") from None
    except (OSError, *DECODE_ERRORS) as error:
        raise SettingsError(f"{path} is no profile: {error}") from None
