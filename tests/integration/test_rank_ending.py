"""Processes of ranks whose kernels wait for one another, with a fake of what a GPU does: a step that never ends.

The process of the test is rank 0. What CPUs compute is in test_ranks.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from baton.worker.io_thread import RankLost
from baton.worker.ranks import group as groups
from baton.worker.ranks.group import RankGroup, rank_start
from baton.worker.ranks.links import RankLink
from baton.worker.ranks.messages import (
    DeviceShare,
    ModelPart,
    RankBeat,
    RankReady,
    RankStart,
    SharedBytes,
    encode,
)

WAIT_S = 120.0  # of a machine that is busy with other tests

RANK = """
import sys, threading
from pathlib import Path
from types import ModuleType

def join_on_device(start, peers, control, load_s):
    folder, forever = Path(sys.argv[2]), threading.Event()

    def join():
        if start.model.folder == str(start.index):
            raise RuntimeError("a launch failed")
        forever.wait()

    def give_up():
        (folder / str(start.index)).touch()
        forever.wait()

    return join, give_up

sys.modules["baton.worker.ranks.device"] = device = ModuleType("device")
device.join_on_device = join_on_device
from baton.worker.ranks import ending
ending.GIVE_UP_S = 5.0  # of a busy machine
from baton.worker.ranks.__main__ import main
sys.exit(main(sys.argv[1:2]))
"""
"""A rank whose thread never comes back from a step, and whose driver does not come back from what would end that."""


class Group:
    """Rank 0 and two others. failing: the rank whose first step fails; 0: none does."""

    def __init__(self, folder: Path, failing: int) -> None:
        part = ModelPart(
            folder=str(failing),
            dtype="auto",
            kv_dtype="auto",
            load_format="auto",
            quantization=None,
            max_model_len=None,
            vocab_size=9,
        )
        share = DeviceShare(
            gpu=0,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            run_ahead=1,
            deterministic=False,
            most_drafts=0,
            block_tokens=16,
            gpu_memory_utilization=None,
        )

        def start(index: int, fds: dict[int, int], memory: SharedBytes) -> RankStart:
            described = rank_start(part, 3, "worker", "info", 1, index, fds, memory)
            return msgspec.structs.replace(described, device=share)

        self.folder = folder
        self.gave_up = threading.Event()
        self.lost: list[RankLost] = []
        self.ranks = RankGroup(3, start)
        self.ranks.give_up = self.gave_up.set
        self.ranks.answers(RankReady)

    def process(self, rank: int) -> subprocess.Popen[bytes]:
        return self.ranks._processes[rank - 1]

    def demand_end(self, rank: int, status: int = 0) -> None:
        """The rank has ended its kernels' waits, and then by itself."""
        assert self.process(rank).wait(WAIT_S) == status
        assert (self.folder / str(rank)).exists()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Group]]:
    def start(module: str, control: RankLink, fds: Sequence[int]) -> subprocess.Popen[bytes]:
        argv = (sys.executable, "-P", "-c", RANK, str(control.fileno()), str(tmp_path))
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[control.fileno(), *fds])

    made: list[Group] = []

    def make(failing: int = 0) -> Group:
        made.append(Group(tmp_path, failing))
        return made[0]

    monkeypatch.setattr(groups, "start_process", start)
    yield make
    for group in made:
        group.ranks.close()


def test_the_loss_of_a_rank_is_that_of_all(make: Callable[..., Group]) -> None:
    """Guards against kernels of rank 0 and of the third rank that wait until the GPU's clock ends them, and a process
    that stays since its thread waits for them."""
    group = make()
    group.ranks.watch(group.lost.append)
    os.kill(group.process(1).pid, signal.SIGSTOP)
    assert group.gave_up.wait(WAIT_S)
    group.demand_end(2)
    assert len(group.lost) == 1
    group.ranks.close()
    assert group.process(1).wait(WAIT_S) == -signal.SIGKILL


def test_a_step_that_fails_ends_all(make: Callable[..., Group]) -> None:
    """Guards against a rank with an error whose process waits for its own kernels before its links close."""
    group = make(failing=1)
    group.ranks.watch(group.lost.append)
    assert group.gave_up.wait(WAIT_S)
    group.demand_end(1, status=1)
    group.demand_end(2)


def test_ranks_end_when_rank_0_is_frozen(make: Callable[..., Group]) -> None:
    """Guards against GPUs that are busy with waiting for as long as rank 0's process stands still. Before its first
    beat rank 0 may take its time."""
    group = make()
    for control in group.ranks._controls:
        control.send(encode(RankBeat()))
    for rank in (1, 2):
        group.demand_end(rank)
    assert not group.gave_up.is_set()
    group.ranks.close()
    assert group.gave_up.is_set(), "or rank 0 waits for its own kernels when it frees what they use"
