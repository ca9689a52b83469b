"""A step on GPUs as rank 0 tells it to the others: whole rows, since every rank draws all tokens by itself.

What a slot keeps on the device is not sent again: of a row that continues what its slot has, no history.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from baton.models.batch import Draw, Row


class StepBegun(msgspec.Struct, frozen=True, tag=True):
    """A step is launched."""

    rows: list[Row]


class MasksCame(msgspec.Struct, frozen=True, tag=True):
    """The masks of the step that was launched last; int32 [rows, words]."""

    num_rows: int
    masks: bytes

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.masks, dtype=np.int32).reshape(self.num_rows, -1)


_decoder = msgspec.msgpack.Decoder(StepBegun | MasksCame)


def encode_step(rows: Sequence[Row]) -> bytes:
    return msgspec.msgpack.encode(StepBegun([_told(row) for row in rows]))


def encode_masks(masks: np.ndarray) -> bytes:
    return msgspec.msgpack.encode(MasksCame(len(masks), np.ascontiguousarray(masks, dtype=np.int32).tobytes()))


def decode_record(data: bytes) -> StepBegun | MasksCame:
    return _decoder.decode(data)


def _told(row: Row) -> Row:
    return row._replace(token_ids=tuple(row.token_ids), blocks=tuple(row.blocks), draw=_draw(row))


def _draw(row: Row) -> Draw | None:
    if row.draw is None or row.token_ids:
        return None if row.draw is None else row.draw._replace(history=tuple(row.draw.history))
    return row.draw._replace(history=(), prediction=())
