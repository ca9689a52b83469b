"""A step as rank 0 tells it to the others: the rows, without what only the drawing of tokens needs.

Of how a row draws they need to know whether all ranks draw it together (models.cpu.cut_vocabulary), and with which
noise. Histories, masks and penalties stay at rank 0, so a record is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cpu.cut_vocabulary import PlainDraw, plain_draw
from baton.node.messages.control import SamplingSpec

OTHER_DRAW = Draw(SamplingSpec(max_tokens=1, logprobs=True), (), 0, 0)
"""Stands for any draw that only rank 0 makes."""


class RowRecord(msgspec.Struct, frozen=True, array_like=True):
    """Of a Row."""

    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    draws: bool
    plain: PlainDraw | None
    targets: PromptTargets | None


def encode_rows(rows: Sequence[Row], vocab_size: int) -> bytes:
    return msgspec.msgpack.encode([_record(row, vocab_size) for row in rows])


def _record(row: Row, vocab_size: int) -> RowRecord:
    plain = None if row.draw is None else plain_draw(row.draw, vocab_size)
    return RowRecord(tuple(row.token_ids), row.start, tuple(row.blocks), row.draw is not None, plain, row.targets)


class RecordDecoder:
    """Makes rows of what `encode_rows` has made of some."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[RowRecord])

    def decode(self, data: bytes) -> list[Row]:
        return [
            Row(record.token_ids, record.start, record.blocks, _draw(record), targets=record.targets)
            for record in self._decoder.decode(data)
        ]


def _draw(record: RowRecord) -> Draw | None:
    if record.plain is not None:
        sampling = SamplingSpec(max_tokens=1, temperature=record.plain.temperature, seed=record.plain.seed)
        return Draw(sampling, (), 0, 0)
    return OTHER_DRAW if record.draws else None
