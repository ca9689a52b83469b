"""Guards `baton bench gate`: what counts as a right decision, the sizes that force the disk, and its rate."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from baton.benchmark.cluster import gate as bench
from baton.benchmark.cluster.gate import GateCase
from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.lower import NoLowerTier, ReadDone, WriteDone
from baton.launch.supervisor import ChildSpec
from baton.testing.paced_store import PacedLower, rate_of

SIZES = bench.GateSizes(64, 1 << 23, (8192, 2048), 64)


@pytest.mark.parametrize(
    ("case", "tie", "right"),
    [
        (GateCase(1.0, 0.5, took_load=4, requests=5), False, 4),
        (GateCase(0.5, 1.0, took_load=4, requests=5), False, 1),
        (GateCase(1.0, 1.05, took_load=5, requests=5), True, 0),
        (GateCase(1.05, 1.0, took_load=0, requests=5), True, 0),
    ],
)
def test_a_decision_is_right_where_its_side_was_faster(case: GateCase, tie: bool, right: int) -> None:
    """A coin's toss between equals is no merit and no fault."""
    assert (case.tie, case.right) == (tie, right)


@pytest.mark.parametrize("length", SIZES.lengths)
def test_a_prompt_has_left_pool_and_ram_when_its_turn_comes(length: int) -> None:
    """What is loaded from RAM is not paced, and would be called a fast disk."""
    others = (SIZES.num_prompts(length) - 1) * SIZES.blocks(length)
    assert others > SIZES.pool_blocks + SIZES.ram_blocks
    assert SIZES.ram_blocks // 4 >= SIZES.blocks(length)  # may all wait for the disk at once


def test_only_the_store_is_paced() -> None:
    """Its options are those that scripts/serve gives it."""
    store = ChildSpec(
        name="store", group="store", argv=("py", "-P", "-m", "baton.kvtransfer", "--ram-gib", "1"), env={}
    )
    worker = ChildSpec(name="decode-0", group="decode", argv=("py", "-P", "-m", "baton.decode"), env={})
    program, _, _, module, *rest = bench.slowed(store, Path("pace")).argv
    assert (program, module, rest) == ("py", "baton.testing.paced_store", ["pace", "--ram-gib", "1"])
    assert bench.slowed(worker, Path("pace")) is worker


class Instant(NoLowerTier):
    """A disk that reads a block at once."""

    def __init__(self) -> None:
        self.done: list[ReadDone | WriteDone] = []

    def has(self, key: Key) -> bool:
        return True

    def read(self, key: Key, into: memoryview) -> None:
        self.done.append(ReadDone(key, b"digest"))

    def poll(self) -> list[ReadDone | WriteDone]:
        done, self.done = self.done, []
        return done


KEYS = [Key(b"n", bytes([number])) for number in range(3)]


def test_reads_are_delayed_and_writes_are_not() -> None:
    """A read that ends early makes the disk faster than its rate; the loop must be woken for one that was delayed."""
    lower, woken = Instant(), threading.Semaphore(0)
    slow = PacedLower(lower, woken.release, lambda: 1000.0)
    begin = time.monotonic()
    for key in KEYS:
        slow.read(key, memoryview(bytearray(10)))
    lower.done.append(WriteDone(KEYS[0]))
    found = slow.poll()
    assert found[0] == WriteDone(KEYS[0])
    while len(found) < 4:
        assert woken.acquire(timeout=60)
        found += slow.poll()
    assert [each.key for each in found[1:]] == KEYS
    assert time.monotonic() - begin >= 0.03 - 0.002


def test_other_calls_pass_through() -> None:
    """A method that a LowerTier gets later must reach the disk."""
    slow = PacedLower(Instant(), lambda: None, lambda: float("inf"))
    assert slow.has(KEYS[0]) and slow.stats() == {}


def test_an_empty_file_sets_no_rate(tmp_path: Path) -> None:
    """Filling the disk is not what is measured."""
    (tmp_path / "pace").write_text("")
    assert rate_of(tmp_path / "pace") == float("inf")
    (tmp_path / "pace").write_text("1e9")
    assert rate_of(tmp_path / "pace") == 1e9
