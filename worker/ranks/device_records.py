"""A step on GPUs as rank 0 tells it to the others: whole rows, since every rank draws all tokens by itself.

What a slot keeps on the device is not sent again: of a row that continues what its slot has, the length of its history
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from baton.models.batch import Draw, Row
from baton.models.cuda.draft_budget import BudgetChoice


class StepBegun(msgspec.Struct, frozen=True, tag=True):
    """A step is launched."""

    rows: list[Row]
    known: list[int]
    """Of each row that draws, how many tokens its history has."""
    choice: BudgetChoice | None = None
    """Rank 0's, of the tokens of rows that decode."""


class MasksCame(msgspec.Struct, frozen=True, tag=True):
    """The masks of the step that was launched last; int32 [rows, words]."""

    num_rows: int
    masks: bytes

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.masks, dtype=np.int32).reshape(self.num_rows, -1)


_decoder = msgspec.msgpack.Decoder(StepBegun | MasksCame)


def encode_step(rows: Sequence[Row], choice: BudgetChoice | None = None) -> bytes:
    """choice: of the drafts that the step verifies, where it verifies any."""
    known = [0 if row.draw is None else len(row.draw.history) for row in rows]
    return msgspec.msgpack.encode(StepBegun([_sendable(row) for row in rows], known, choice))


def encode_masks(masks: np.ndarray) -> bytes:
    """masks: int32 [rows, words]."""
    return msgspec.msgpack.encode(MasksCame(len(masks), np.ascontiguousarray(masks, dtype=np.int32).tobytes()))


def decode_record(data: bytes) -> StepBegun | MasksCame:
    """Rows have histories of the right length, of which what was not sent is never read."""
    found = _decoder.decode(data)
    if isinstance(found, StepBegun):
        rows = [_of_length(row, known) for row, known in zip(found.rows, found.known, strict=True)]
        return msgspec.structs.replace(found, rows=rows)
    return found


def _of_length(row: Row, known: int) -> Row:
    """With a history of so many tokens."""
    if row.draw is None or row.draw.history:
        return row
    return row._replace(draw=row.draw._replace(history=range(known)))


def _sendable(row: Row) -> Row:
    """With plain tuples, and without what its slot has."""
    return row._replace(token_ids=tuple(row.token_ids), blocks=tuple(row.blocks), draw=_draw(row))


def _draw(row: Row) -> Draw | None:
    if row.draw is None or row.token_ids:
        return None if row.draw is None else row.draw._replace(history=tuple(row.draw.history))
    return row.draw._replace(history=(), prediction=(), past_answers=())
