"""A worker of two ranks on GPUs in one process, with a fake of CUDA: a handle names memory of the host, kernels are
interpreted, and rank 1 is a thread.

Ranks take turns, as in testing.device_ranks: one that waits for a message of the other lets that one run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from baton.kvtransfer.planes.sharded import LayersDigest
from baton.kvtransfer.reshard import Cut
from baton.models.cuda.peers import DevicePeers
from baton.models.cuda.queue import Work
from baton.models.cuda.runner import CudaRunner
from baton.models.weights import load_weights
from baton.node.errors import PeerLost
from baton.testing.device_ranks import OneAtATime
from baton.testing.late_queue import LateQueue
from baton.worker.build_cpu import LoadedModel
from baton.worker.ranks.messages import RankMessage, RankReady, RankStart, SharedBytes, decode, encode
from baton.worker.settings import WorkerSettings

with pytest.MonkeyPatch.context() as patch:
    if find_spec("cuda") is None:  # only GPUs need it
        bindings = ModuleType("cuda.bindings")
        bindings.__dict__["runtime"] = ModuleType("cuda.bindings.runtime")
        patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        patch.setitem(sys.modules, "cuda.bindings", bindings)
    from baton.kvtransfer.blocks import device_pool
    from baton.worker import build_ranks
    from baton.worker.ranks import device, device_loading

WAIT_S = 120.0
T = TypeVar("T")


class FakeGpus:
    """Memory by GPU and handle, and what two ranks do on it."""

    def __init__(self, room: dict[int, int]) -> None:
        """room: blocks for which each rank's GPU has memory."""
        self.room = room
        self.turns = OneAtATime(2)
        self.queues: dict[int, LateQueue] = {}
        self.handles: dict[bytes, FakeMemory] = {}
        self.formats: list[list[str]] = []
        """Of the weights of each rank."""
        self.planes: list[FakePlane] = []
        self.copied: list[FakeMemory] = []
        """Memory that the store's copies are of."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("set_device", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "device_count", lambda: 1 + max(self.room))
        patch.setattr(torch.cuda, "mem_get_info", lambda gpu: (self.room[gpu],) * 2)
        patch.setattr(torch.cuda, "memory_reserved", lambda gpu: 0)
        patch.setattr(device_loading, "plan_blocks", lambda memory, utilization, block_bytes: memory.free_bytes)
        patch.setattr(device.cudart, "use_device", lambda gpu: None)
        patch.setattr(device.cudart, "open_handle", lambda handle: self.handles[handle].pointer)
        for module in (device, device_pool):
            patch.setattr(module, "DeviceMemory", partial(FakeMemory, self.handles))
        for module in (device, build_ranks):
            patch.setattr(module, "mapped", self._mapped)
        patch.setattr(device, "CudaQueue", lambda gpu: self.queues.setdefault(gpu, LazyQueue()))
        patch.setattr(device, "DevicePeers", partial(DevicePeers, meet=self.turns.meet))
        patch.setattr(device_loading, "load_weights", self._load_weights)
        patch.setattr(CudaRunner, "warm_up", lambda runner: None)
        patch.setattr(build_ranks, "CudaQueue", lambda gpu: LateQueue())
        patch.setattr(build_ranks, "RankGroup", partial(FakeGroup, self))
        patch.setattr(build_ranks, "DeviceCopies", self._copies)
        patch.setattr(build_ranks, "device_planes", self._make_planes)
        patch.setattr(build_ranks, "device_plane_by_layer", self._plane_by_layer)

    def _mapped(self, handle: bytes, size_bytes: int, gpu: int) -> torch.Tensor:
        memory = self.handles[handle]
        assert (memory.payload_bytes, memory.device_index) == (size_bytes, gpu)
        return memory.data.view(-1)

    def _load_weights(self, config: Any, folder: Path, dtype: torch.dtype, where: str, *more: Any, **named: Any) -> Any:
        assert where == f"cuda:{sorted(self.room)[named['rank'].index]}"
        weights = load_weights(config, folder, dtype, "cpu", *more, **named)
        self.formats.append(sorted(weights.size_bytes))
        return weights

    def _copies(self, memory: FakeMemory) -> SimpleNamespace:
        self.copied.append(memory)
        return SimpleNamespace(block_bytes=memory.block_bytes, batch_blocks=1)

    def _make_planes(self, memory: Any, *place: Any, names: tuple[str, ...], warm: bool) -> list[FakePlane]:
        self.planes.append(FakePlane(names[0], memory, place, warm))
        return self.planes[-1:]

    def _plane_by_layer(self, cut: Cut, pools: Sequence[Any], digest: LayersDigest) -> SimpleNamespace:
        memories = [pool.memory for pool in pools]
        return SimpleNamespace(name="cuda_ipc_layers", cut=cut, memories=memories, digest=digest)


class LazyQueue(LateQueue):
    """Runs no work ahead of the first step, which for an interpreter would take minutes."""

    def capture(self, work: Work) -> Work:
        return work


class FakePlane:
    pulls = True

    def __init__(self, name: str, memory: Any, place: tuple[Any, ...], warm: bool) -> None:
        self.name, self.memory, self.place, self.warm = name, memory, place, warm


class FakeMemory:
    """DeviceMemory of the host."""

    device_uuid, nonce = "", b""

    def __init__(
        self, handles: dict[bytes, FakeMemory], num_blocks: int, block_bytes: int, gpu: int, num_units: int = 1
    ) -> None:
        self.num_blocks, self.block_bytes, self.num_units, self.device_index = num_blocks, block_bytes, num_units, gpu
        self.payload_bytes = num_blocks * block_bytes
        self.data = torch.zeros(num_blocks, num_units, block_bytes // num_units, dtype=torch.uint8)
        self.pointer = self.data.data_ptr()
        self.handle = b"%d of GPU %d" % (len(handles), gpu)
        handles[self.handle] = self

    def close(self) -> None: ...


class FakeGroup:
    """RankGroup of two, whose other rank is a thread."""

    give_up: Callable[[], None]

    def __init__(
        self, gpus: FakeGpus, count: int, start: Callable[[int, dict[int, int], SharedBytes], RankStart]
    ) -> None:
        assert count == 2
        self.rank = FakeRank(gpus, start(1, {}, SharedBytes(0, 0, b"")))

    def tell(self, message: RankMessage) -> None:
        self.rank.inbox.put(encode(message))

    def answers(self, kind: type[T]) -> list[T]:
        found = self.rank.take(self.rank.answers)
        assert isinstance(found, kind)
        return [found]

    def peers(self, vocab_size: int) -> SimpleNamespace:
        return SimpleNamespace(tell=self.rank.inbox.put)

    def close(self) -> None:
        self.rank.inbox.put(PeerLost("rank 0 has ended"))
        self.rank.end()


class FakeRank:
    """Rank 1: its process, and its ends of the links to rank 0."""

    def __init__(self, gpus: FakeGpus, start: RankStart) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self._gpus, self._start = gpus, start
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._run)

    def send(self, message: bytes) -> None:
        self.answers.put(decode(message))

    def receive(self, wait_s: float) -> bytes:
        return self.take(self.inbox)

    hear = property(lambda self: partial(self.take, self.inbox))

    def end(self) -> None:
        self._gpus.turns.wait(self._thread.shutdown)

    def take(self, queue: SimpleQueue[Any]) -> Any:
        found = self._gpus.turns.wait(lambda: queue.get(timeout=WAIT_S))
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self) -> None:
        try:
            self._gpus.turns.run(self._join)
        except Exception as error:
            self.answers.put(error)

    def _join(self) -> None:
        join, _ = device.join_on_device(self._start, self, self, WAIT_S)
        self.send(encode(RankReady()))
        while True:
            join()
            self._gpus.queues[self._start.device.gpu].mark().wait()


@contextmanager
def loaded(
    patch: pytest.MonkeyPatch, gpus: FakeGpus, settings: WorkerSettings, folder: Path, draft: Path | None = None
) -> Iterator[LoadedModel]:
    """A decode worker with these GPUs; inside, it is rank 0's turn."""
    gpus.install(patch)
    with gpus.turns:
        model = build_ranks.load_ranks_on_cuda(settings, settings.worker_sizes("cuda"), "decode", folder, draft)
        try:
            yield model
        finally:
            model.ranks.close()
