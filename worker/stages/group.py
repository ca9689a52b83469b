"""The first stage's side of a pipeline: starts the other stages, gives them their pools, watches and ends them.

Each is a process that in turn starts the other ranks of its stage. The loss of any of them is the loss of the worker.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from baton.kvtransfer.blocks.pool import BlockPool
from baton.worker.ranks.links import RankLink, pair
from baton.worker.ranks.members import (
    Deliver,
    MemberWatch,
    NoRanks,
    Ranks,
    answers,
    pool_made,
    reap,
    start_process,
    tell,
)
from baton.worker.ranks.messages import DeviceShare, ModelPart, RankMessage, RankReady, StageStart, encode
from baton.worker.stages.links import stage_pair

T = TypeVar("T")


def on_cpu(stage: int) -> None:
    """A stage's share of a GPU."""


class StageGroup:
    """The stages after the first, and the other ranks of the first. Made in the main thread, which outlives them."""

    def __init__(
        self,
        model: ModelPart,
        num_ranks: int,
        name: str,
        log_level: str,
        threads: int,
        share: Callable[[int], DeviceShare | None] = on_cpu,
    ) -> None:
        """model: as the first stage has it; share: of a GPU, by stage. The stages begin to load at once."""
        count = model.num_stages
        links = [stage_pair(index, (index + 1) % count) for index in range(count)]
        self.following, self.last = links[0][0], links[-1][1]
        self._controls: list[RankLink] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: Ranks = NoRanks()
        for index in range(1, count):
            own, theirs = pair(0, index, "stage")
            entering, leaving = links[index - 1][1], links[index][0]
            fds = [entering.fileno(), leaving.fileno()]
            start = StageStart(
                starter_pid=os.getpid(),
                name=f"{name}/stage-{index}",
                log_level=log_level,
                entering_fd=entering.fileno(),
                leaving_fd=leaving.fileno(),
                model=msgspec.structs.replace(model, stage=index),
                num_ranks=num_ranks,
                threads=threads,
                device=share(index),
            )
            self._controls.append(own)
            self._processes.append(start_process("baton.worker.stages", theirs, fds))
            own.send(encode(start))
            theirs.close()
        for index in range(1, count):
            for link in (links[index - 1][1], links[index][0]):
                link.close()
        self._watch = MemberWatch(self._controls, [self.following, self.last])

    def with_ranks(self, ranks: Ranks) -> StageGroup:
        """From now on it watches and ends these too."""
        self._ranks = ranks
        return self

    def share_pools(self, pools: Sequence[BlockPool]) -> None:
        """Give the stages after the first their pools, and wait until they can join steps."""
        self.tell([pool_made(pool) for pool in pools])
        self.answers(RankReady)

    def tell(self, messages: Sequence[RankMessage]) -> None:
        """One to each stage after the first, which starts. SettingsError if one has ended."""
        tell(self._controls, messages)

    def answers(self, kind: type[T]) -> list[T]:
        """A message of this kind from each stage after the first, in order. SettingsError if one cannot start."""
        return answers(self._controls, kind)

    def watch(self, deliver: Deliver) -> None:
        self._watch.begin(deliver)
        self._ranks.watch(deliver)

    def close(self) -> None:
        self._watch.end()
        for control in self._controls:
            control.shut()
        for link in (self.following, self.last):
            link.shut()
        reap(self._processes)
        self._watch.join()
        self._ranks.close()
