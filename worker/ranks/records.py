"""What rank 0 tells the others: a step by its rows, without what only the drawing of tokens needs; or a filled slot.

Of how a row draws they need to know whether all ranks draw it together (models.cpu.cut_vocabulary), and with which
noise. Histories, masks and penalties stay at rank 0, so a record is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.models.adapters.flat import Directory
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cpu.cut_vocabulary import PlainDraw, plain_draw
from baton.node.messages.control import SamplingSpec
from baton.worker.ranks.messages import SharedBytes

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
    adapter: int | None


class FillRecord(msgspec.Struct, frozen=True, tag=True):
    """A slot that rank 0 has filled, with an adapter in its process's memory."""

    slot: int
    pid: int
    memory: SharedBytes
    directory: Directory


def encode_fill(record: FillRecord) -> bytes:
    return msgspec.msgpack.encode(record)


def encode_rows(rows: Sequence[Row], vocab_size: int) -> bytes:
    """A step. vocab_size: of the whole model, by which a draw is plain or not."""
    return msgspec.msgpack.encode([_record(row, vocab_size) for row in rows])


def _record(row: Row, vocab_size: int) -> RowRecord:
    plain = None if row.draw is None else plain_draw(row.draw, vocab_size)
    draws = row.draw is not None
    return RowRecord(tuple(row.token_ids), row.start, tuple(row.blocks), draws, plain, row.targets, row.adapter)


class RecordDecoder:
    """Makes rows of what `encode_rows` has made of some; a filled slot stays as it is."""

    def __init__(self) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[RowRecord] | FillRecord]
        self._decoder = msgspec.msgpack.Decoder(list[RowRecord] | FillRecord)

    def decode(self, data: bytes) -> list[Row] | FillRecord:
        found = self._decoder.decode(data)
        if isinstance(found, FillRecord):
            return found
        return [
            Row(each.token_ids, each.start, each.blocks, _draw(each), targets=each.targets, adapter=each.adapter)
            for each in found
        ]


def _draw(record: RowRecord) -> Draw | None:
    if record.plain is not None:
        sampling = SamplingSpec(max_tokens=1, temperature=record.plain.temperature, seed=record.plain.seed)
        return Draw(sampling, (), 0, 0)
    return OTHER_DRAW if record.draws else None
