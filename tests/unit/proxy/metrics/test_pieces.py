"""proxy.metrics.pieces: a long page does not hold the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from baton.proxy.metrics.metrics import ProxyMetrics
from baton.proxy.metrics.pieces import join_in_pieces
from baton.testing.fake_engine import FakeEngine


async def test_other_tasks_run_between_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards tokens and probes against a scrape of many workers: one piece at a time, and the text is whole."""
    monkeypatch.setattr("baton.proxy.metrics.pieces.PIECE_S", 0.0)
    done = 0

    def parts() -> Iterator[bytes]:
        nonlocal done
        for done in range(10):
            yield b"%d," % done

    seen: list[int] = []

    async def watch() -> None:
        while done < 9:
            seen.append(done)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    assert await join_in_pieces(parts()) == b"0,1,2,3,4,5,6,7,8,9,"
    await watching
    assert sorted(set(seen)) == list(range(9)), "several pieces were made at once"


def test_the_page_has_many_pieces() -> None:
    """Guards the size of a piece: families are made when they are asked for, and each is described once."""
    metrics = ProxyMetrics(FakeEngine(lambda call: []), ["m"])
    pieces = [*metrics.own(), *metrics.reported()]
    assert b"".join(pieces) == metrics.exposition()
    assert all(piece.startswith(b"# HELP ") and piece.endswith(b"\n") for piece in pieces)
    assert max(map(len, pieces)) < len(metrics.exposition()) / 2
