"""A step as stages pass it on: its rows and the residual of its tokens; and what the last one has drawn.

Another stage that sends something else is broken: PeerLost, by which its worker ends as when a stage is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from baton.models.batch import Drawn, Row
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import PeerLost
from baton.node.messages.control import PromptLogprob
from baton.worker.ranks.records import FillRecord


class StepDrawn(msgspec.Struct, frozen=True, array_like=True):
    """From the last stage to the first."""

    drawn: list[Drawn | None]
    prompt_logprobs: dict[int, tuple[PromptLogprob, ...]]


class GivenFill(msgspec.Struct, frozen=True, tag=True):
    """A slot that the first stage has filled, with an adapter that it has given to stages of other hosts."""

    slot: int
    number: int
    """Of the adapter."""


SlotFill = FillRecord | GivenFill

_rows: msgspec.msgpack.Decoder[list[Row] | SlotFill] = msgspec.msgpack.Decoder(list[Row] | SlotFill)
_drawn = msgspec.msgpack.Decoder(StepDrawn)


def encode_rows(rows: Sequence[Row]) -> bytes:
    return msgspec.msgpack.encode(list(rows))


def decode_rows(record: bytes) -> list[Row] | SlotFill:
    """Of a step; or a slot that the first stage has filled, between two steps."""
    try:
        return _rows.decode(record)
    except DECODE_ERRORS as error:
        raise PeerLost(f"a stage sent no step: {error}") from None


def encode_drawn(drawn: StepDrawn) -> bytes:
    return msgspec.msgpack.encode(drawn)


def decode_drawn(record: bytes, num_rows: int) -> StepDrawn:
    """Of a step of so many rows."""
    try:
        step = _drawn.decode(record)
    except DECODE_ERRORS as error:
        raise PeerLost(f"a stage sent no tokens: {error}") from None
    if len(step.drawn) != num_rows or not all(0 <= row < num_rows for row in step.prompt_logprobs):
        raise PeerLost(f"a stage drew for {len(step.drawn)} rows, of {num_rows}")
    return step


def bytes_of(residual: torch.Tensor) -> memoryview:
    """Of [N, hidden] of any dtype."""
    return residual.contiguous().view(torch.uint8).numpy().data.cast("B")


def residual_of(data: bytearray, dtype: torch.dtype, num_tokens: int) -> torch.Tensor:
    """[N, hidden] out of `bytes_of`; it keeps the memory."""
    if not data or len(data) % max(1, num_tokens * dtype.itemsize):
        raise PeerLost(f"a stage sent {len(data)} bytes, which are no residual of {num_tokens} tokens")
    return torch.frombuffer(data, dtype=dtype).view(num_tokens, -1)


def encode_masks(masks: np.ndarray) -> tuple[bytes, memoryview]:
    """A record and data. masks: int32 [rows, words]."""
    plain = np.ascontiguousarray(masks, dtype=np.int32)
    return msgspec.msgpack.encode(len(plain)), plain.data.cast("B")


def decode_masks(record: bytes, data: bytearray) -> np.ndarray:
    """int32 [rows, words]."""
    try:
        return np.frombuffer(data, np.int32).reshape(msgspec.msgpack.decode(record, type=int), -1)
    except (*DECODE_ERRORS, ValueError) as error:
        raise PeerLost(f"a stage sent no masks: {error}") from None
