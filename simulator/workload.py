"""The requests of a run: generated from a seed, or replayed from a trace. Pure; token ids are created when needed.

Mooncake's traces (FAST'25, one JSON object a line: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of
chained 512-token blocks) say which prompts share a prefix: two prompts have equal tokens exactly where they have equal
ids. Their time stamps are multiples of 3 s, so arrivals are spread over their 3 s. Azure's (2023, CSV) have lengths
alone.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError

TRACE_BLOCK_TOKENS = 512
QUANTUM_S = 3.0
"""Of the time stamps in Mooncake's traces."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. `prefix` names the prompt's blocks of `block_tokens` tokens; the last one may be partial."""

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...]
    block_tokens: int = TRACE_BLOCK_TOKENS
    tenant: str = ""
    adapter: int | None = None
    """Its number."""

    def prompt_ids(self) -> tuple[int, ...]:
        ids = chain.from_iterable(repeat(name, self.block_tokens) for name in self.prefix)
        return tuple(ids)[: self.prompt_tokens]


class _Line(msgspec.Struct, frozen=True):
    """One line of a trace; unknown fields are ignored."""

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: tuple[Annotated[int, Meta(ge=0, lt=1 << 30)], ...]


@dataclass(frozen=True, slots=True)
class LengthSampler:
    """Lognormal token counts of this mean; `spread` is the standard deviation of the logarithm, 0 makes all equal."""

    mean: int
    spread: float = 0.0
    longest: int = 1 << 20

    def draw(self, chance: random.Random) -> int:
        if not self.spread:
            return self.mean
        value = self.mean * chance.lognormvariate(-(self.spread**2) / 2, self.spread)
        return min(self.longest, max(1, round(value)))


def poisson(count: int, rate: float, prompt: LengthSampler, output: LengthSampler, seed: int) -> list[SimRequest]:
    """`count` requests at `rate` a second that share no prefix."""
    chance = random.Random(seed)
    requests: list[SimRequest] = []
    now = 0.0
    for number in range(count):
        now += chance.expovariate(rate)
        tokens = prompt.draw(chance)
        requests.append(SimRequest(number, now, tokens, output.draw(chance), (number,), tokens))
    return requests


def read_trace(path: Path, seed: int) -> list[SimRequest]:
    """All requests of a trace in order of arrival: Mooncake's, or, in a .csv file, Azure's. Raises SettingsError for an
    invalid line."""
    return _read_azure(path) if path.suffix == ".csv" else _read_mooncake(path, seed)


def _read_azure(path: Path) -> list[SimRequest]:
    """Azure's public LLM traces: a time, the tokens of a prompt that shares no prefix, and those of its answer."""
    requests: list[SimRequest] = []
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                prompt, output = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
                requests.append(SimRequest(number, at_s, prompt, output, (number,), prompt))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"cannot read the trace {path}: line {len(requests) + 2}: {error!r}") from None
    requests.sort(key=lambda request: request.arrival_s)
    first = requests[0].arrival_s if requests else 0.0
    return [replace(each, number=n, arrival_s=each.arrival_s - first) for n, each in enumerate(requests)]


def _read_mooncake(path: Path, seed: int) -> list[SimRequest]:
    chance = random.Random(seed)
    try:
        lines = path.read_bytes().splitlines()
        decoded = [msgspec.json.decode(line, type=_Line) for line in lines if line.strip()]
    except (OSError, *DECODE_ERRORS) as error:
        raise SettingsError(f"cannot read the trace {path}: {error}") from None
    for number, line in enumerate(decoded, 1):
        if len(line.hash_ids) != -(-line.input_length // TRACE_BLOCK_TOKENS):
            raise SettingsError(f"{path}:{number}: {line.input_length} tokens in {len(line.hash_ids)} blocks")
    jittered = [(line.timestamp / 1000 + chance.random() * QUANTUM_S, line) for line in decoded]
    jittered.sort(key=lambda pair: pair[0])
    return [
        SimRequest(number, at, line.input_length, line.output_length, line.hash_ids)
        for number, (at, line) in enumerate(jittered)
    ]


def speed_up(requests: Iterable[SimRequest], factor: float) -> list[SimRequest]:
    """The same requests, `factor` times as fast."""
    return [replace(request, arrival_s=request.arrival_s / factor) for request in requests]


def rate_of(requests: Sequence[SimRequest]) -> float:
    """Requests a second between the first and the last arrival."""
    return (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s) if len(requests) > 1 else 0.0


def gaps(times_s: Sequence[float]) -> list[float]:
    """Seconds between each time and the next, one fewer than times."""
    return [after - before for before, after in pairwise(times_s)]
