"""Starts a GPU's runner of the model in each folder, without a GPU and without a kernel that runs, as its own process.

Prints one JSON line a folder: launches of the rehearsal and of the start itself, and the kernels of the start that were
not rehearsed. Gluon's kernels are asked for on a GPU only, so they are not among them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from baton.kernels.triton.compiling import Kernel, launched_by
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.products import untuned
from baton.models.cuda.queue import Hole, T, Work, leave_out
from baton.models.cuda.runner import CudaRunner
from baton.models.weights import load_weights
from baton.testing.late_queue import LateQueue
from baton.tests.unit.kernels.compile_sm90 import NoDevice

BLOCK, LONGEST = 64, 4096


class RehearsingQueue(LateQueue):
    """A GPU's queue as far as it decides what is launched."""

    num_sms = 132
    pdl = True

    def __init__(self) -> None:
        super().__init__()
        self.rehearsed: list[Kernel] = []
        self.launches = 0

    def rehearse(self, work: Work) -> None:
        before = Launches.count
        self.rehearsed = launched_by(work)
        self.launches = Launches.count - before

    def capture_around(self, work: Callable[[Hole], T]) -> Callable[[Hole], T]:
        work(leave_out)
        return work


class Launches:
    count = 0


def count_launches() -> None:
    run = JITFunction.run

    def counted(self, *args, **options):
        Launches.count += 1
        return run(self, *args, **options)

    JITFunction.run = counted


def rehearse(folder: Path) -> None:
    Launches.count = 0
    config, queue = ModelConfig.from_folder(folder), RehearsingQueue()
    weights = load_weights(config, folder, torch.bfloat16, pack=False)
    runner = CudaRunner(config, weights, queue, StepLimits(20, 256), LONGEST, untuned)
    shape = (2 * LONGEST // BLOCK, config.num_kv_heads, config.num_layers, 2, BLOCK, config.head_dim)

    def start() -> None:
        runner.bind_pool(torch.zeros(shape, dtype=torch.bfloat16), LONGEST)
        runner.warm_up()

    started = launched_by(start)
    forgotten = [kernel.name for kernel in started if kernel not in queue.rehearsed]
    launches = Launches.count - queue.launches
    print(json.dumps({"rehearsal": queue.launches, "start": launches, "kernels": len(started), "forgotten": forgotten}))


def main() -> None:
    driver.set_active(NoDevice())
    count_launches()
    for folder in map(Path, sys.argv[1:]):
        rehearse(folder)


if __name__ == "__main__":
    main()
