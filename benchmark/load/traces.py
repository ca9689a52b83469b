"""Published traces of real services: lines of a file in, arrivals with lengths (and shared blocks) out. Pure.

* Mooncake, JSON lines: {"timestamp": ms, "input_length", "output_length", "hash_ids": [one a block of 512 tokens]}.
  Equal ids are equal blocks after equal prefixes. Source: the traces published with "Mooncake: A KVCache-centric
  Disaggregated Architecture for LLM Serving".
* Azure, CSV: TIMESTAMP,ContextTokens,GeneratedTokens; no shared blocks. Source: AzurePublicDataset, 2023.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_QUANTUM_S = 3.0
"""The tick of the conversation trace's clock: replayed as it is, the trace has bursts that the users did not send."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    at_s: float
    """From the first request of the trace."""
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Ids of the prompt's blocks; empty where the trace has none."""


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """The requests of a trace in the order of time; raises SettingsError with the line that is wrong."""
    rows = [(number, line.strip("\ufeff \r\n")) for number, line in enumerate(lines, 1)]
    rows = [(number, line) for number, line in rows if line]
    if not rows:
        raise SettingsError("the trace is empty")
    read = _read_mooncake if rows[0][1].startswith("{") else _read_azure
    found = sorted(read(rows), key=lambda request: request.at_s)
    if not found:
        raise SettingsError("the trace holds no request")
    first_s = found[0].at_s
    return [TraceRequest(r.at_s - first_s, r.input_tokens, r.output_tokens, r.blocks) for r in found]


def quantum_of(requests: Sequence[TraceRequest]) -> float:
    """The tick of the trace's clock: 3 s where all arrivals but stragglers fall on such ticks, else 0 (exact)."""
    away = [abs(r.at_s - MOONCAKE_QUANTUM_S * round(r.at_s / MOONCAKE_QUANTUM_S)) for r in requests]
    on_tick = sum(distance < 0.005 for distance in away)
    return MOONCAKE_QUANTUM_S if len(requests) > 1 and on_tick >= 0.95 * len(requests) else 0.0


def _read_mooncake(rows: Sequence[tuple[int, str]]) -> list[TraceRequest]:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    found = []
    for number, text in rows:
        try:
            line = decode(text)
        except DECODE_ERRORS as error:
            raise SettingsError(f"line {number} of the trace: {error}") from None
        _check(number, line.input_length, line.output_length)
        blocks = tuple(line.hash_ids)
        if blocks and len(blocks) != -(-line.input_length // MOONCAKE_BLOCK_TOKENS):
            raise SettingsError(f"line {number} of the trace: {len(blocks)} blocks for {line.input_length} tokens")
        found.append(TraceRequest(line.timestamp / 1000, line.input_length, line.output_length, blocks))
    return found


def _read_azure(rows: Sequence[tuple[int, str]]) -> list[TraceRequest]:
    header = rows[0][1].split(",")
    wanted = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    if header[:3] != wanted:
        raise SettingsError(f"the trace is neither JSON lines nor a CSV that begins with {','.join(wanted)}")
    found = []
    for number, line in rows[1:]:
        try:
            row = next(csv.reader([line]))
            # Seven digits after the point are more than datetime takes.
            seconds, _, fraction = row[0].partition(".")
            at_s = datetime.fromisoformat(f"{seconds}+00:00").timestamp() + float(f"0.{fraction or 0}")
            lengths = int(row[1]), int(row[2])
        except (ValueError, IndexError, OverflowError, csv.Error):
            raise SettingsError(f"line {number} of the trace: {line[:80]!r} is no request") from None
        _check(number, *lengths)
        found.append(TraceRequest(at_s, *lengths, ()))
    return found


def _check(number: int, input_tokens: int, output_tokens: int) -> None:
    if input_tokens < 1 or output_tokens < 0:
        raise SettingsError(f"line {number} of the trace: lengths {input_tokens} and {output_tokens}")
