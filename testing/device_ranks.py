"""The ranks of a group that compute on a GPU, in one process: all on one GPU, or in Triton's interpreter.

    ranks = DeviceRanks(config, load, queues, limits, max_len, dtype)     # load(rank): its weights
    ranks.bind_pools(pools, max_model_len)
    drawn = ranks.launch(rows).read()

On a GPU each rank has a stream, and the kernels of ranks wait for one another side by side. The interpreter runs one
kernel at a time, so there ranks are threads that take turns: one runs until it has sent its part of an exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from baton.models.batch import Drawn, Launched, Row
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.peers import DevicePeers, RankMemory
from baton.models.cuda.products import Policy
from baton.models.cuda.queue import Queue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import EagleConfig
from baton.models.eagle_weights import EagleWeights
from baton.models.layer_weights import Weights
from baton.models.partition import Rank
from baton.node.messages.control import PromptLogprob

T = TypeVar("T")

MEET_S = 60.0
SIDE_BY_SIDE_PROGRAMS = 128
"""Of all ranks' sums at a time, one a row: those of all but one may wait while the last rank's products run."""


class OneAtATime:
    """One thread of `count` runs at a time; `meet` lets the others get as far."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(count, timeout=MEET_S)

    def meet(self) -> None:
        self.wait(self._barrier.wait)

    def wait(self, call: Callable[[], T]) -> T:
        """`call`, which waits for what the others do meanwhile."""
        self._lock.release()
        try:
            return call()
        finally:
            self._lock.acquire()

    def run(self, call: Callable[[], T]) -> T:
        with self:
            return call()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._barrier.abort()
        self._lock.release()


class DeviceRanks:
    """A group with the calls of a runner; every rank has to draw the same."""

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[Rank], Weights],
        queues: Sequence[Queue],
        limits: StepLimits,
        max_len: int,
        policy: Policy | None = None,
        draft: Callable[[Rank, Weights], tuple[EagleConfig, EagleWeights]] | None = None,
    ) -> None:
        """queues: of each rank, on one device. draft: of a rank with its weights of the model."""
        count, self._turns = len(queues), None if queues[0].device.startswith("cuda") else OneAtATime(len(queues))
        self.config, self.run_ahead = config, limits.run_ahead
        self.memories: list[torch.Tensor] = []
        self.peers: list[DevicePeers] = []
        self.runners: list[CudaRunner] = []
        for index, queue in enumerate(queues):
            rank = Rank(index, count)
            weights = load(rank)
            layout = RankMemory.of(
                config, rank, weights.embedding.dtype, min(limits.max_tokens, SIDE_BY_SIDE_PROGRAMS // count)
            )
            memory = torch.zeros(layout.size_bytes, dtype=torch.uint8, device=queue.device)
            meet = None if self._turns is None else self._turns.meet
            peers = DevicePeers(layout, memory, config.vocab_size, meet)
            eagle = None if draft is None else draft(rank, weights)
            self.runners.append(CudaRunner(config, weights, queue, limits, max_len, policy, peers=peers, eagle=eagle))
            self.memories.append(memory)
            self.peers.append(peers)

    def bind_pools(
        self, pools: Sequence[torch.Tensor], max_model_len: int, alone: Callable[[int], None] | None = None
    ) -> None:
        """pools: of each rank, with its heads. alone: called of each rank before it knows the others."""

        def bind(index: int) -> None:
            self.runners[index].bind_pool(pools[index], max_model_len)
            if alone is not None:
                alone(index)

        self.all(bind)
        for peers in self.peers:
            peers.connect([memory.data_ptr() for memory in self.memories])

    def launch(self, rows: Sequence[Row]) -> RanksLaunched:
        choice = self.runners[0].choose(rows)
        return RanksLaunched(self, self.all(lambda index: self.runners[index].launch_chosen(rows, choice)))

    def all(self, call: Callable[[int], T], *, waits: bool = False) -> list[T]:
        """`call` of each rank. waits: for what the others do as well, so that it has to be under way for all."""
        indices = range(len(self.runners))
        if self._turns is None and not waits:
            return [call(index) for index in indices]
        run = (lambda call: call()) if self._turns is None else self._turns.run
        with ThreadPoolExecutor(len(indices)) as threads:
            running = [threads.submit(run, partial(call, index)) for index in indices]
            return [each.result() for each in running]


class RanksLaunched:
    """A step that all ranks have launched."""

    device_time = None

    def __init__(self, ranks: DeviceRanks, steps: Sequence[Launched]) -> None:
        self._ranks, self._steps = ranks, steps
        self.prompt_logprobs: Mapping[int, tuple[PromptLogprob, ...]] = {}

    @property
    def masked_drafts(self) -> Sequence[Sequence[int]]:
        return self._steps[0].masked_drafts

    def complete(self, masks: np.ndarray) -> None:
        self._ranks.all(lambda index: self._steps[index].complete(masks))

    def read(self) -> list[Drawn | None]:
        first, *others = self._ranks.all(lambda index: self._steps[index].read())
        assert all(other == first for other in others), f"ranks draw {first} and {others}"
        self.prompt_logprobs = self._steps[0].prompt_logprobs
        return first
