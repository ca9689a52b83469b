"""Prefill workers of several stages on GPUs from their settings to their tokens, with fakes of CUDA: a handle names
memory of the host, kernels are interpreted, and the stages behind the first are threads.

What is compiled or captured ahead of the first step is left out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="Triton is made for Linux only")
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda import prefill_pieces
from baton.models.cuda.runner import CudaRunner
from baton.models.cuda.stage import AdvancingStage
from baton.models.weights import load_weights
from baton.node.errors import PeerLost, SettingsError
from baton.node.messages.control import SamplingSpec
from baton.prefill.settings import PrefillSettings
from baton.tests.unit.models.conftest import kv_pool
from baton.tests.unit.models.cuda.ahead import GRAMMAR, mask_after
from baton.tests.unit.worker.ranks.fake_gpus import FakeMemory, LazyQueue, device_loading, device_pool
from baton.worker import build_stages
from baton.worker.ranks.messages import DeviceShare, ModelPart, RankReady, StageStart, decode, encode
from baton.worker.stages import device, late
from baton.worker.stages.late import Leaving
from baton.worker.stages.links import StageLink, stage_pair

from baton.kvtransfer.blocks import cudart, device_stage_pools  # isort: skip  # where fakes of CUDA are

T = TypeVar("T")
WAIT_S = 120.0
GPUS = (2, 4, 5)
BLOCK, NUM_BLOCKS = 16, 12


class SharedQueue(LazyQueue):
    """One of several in threads, of which one at a time runs its work: there is one interpreter."""

    turn = threading.Lock()

    def run_to(self, count: int) -> None:
        with self.turn:
            super().run_to(count)


class FakeStages:
    """Memory by GPU and handle, and the stages behind the first."""

    def __init__(self, room: Sequence[int]) -> None:
        """room: blocks for which each stage's GPU has memory."""
        self.room = dict(zip(GPUS, room, strict=True))
        self.handles: dict[bytes, FakeMemory] = {}
        self.groups: list[FakeGroup] = []
        self.leaving: list[Leaving] = []
        self.copied: list[FakeMemory] = []
        """Memory that the store's copies are of."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("set_device", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "device_count", lambda: 1 + max(GPUS))
        patch.setattr(torch.cuda, "mem_get_info", lambda gpu: (self.room[gpu],) * 2)
        patch.setattr(torch.cuda, "memory_reserved", lambda gpu: 0)
        patch.setattr(device_loading, "plan_blocks", lambda memory, utilization, block_bytes: memory.free_bytes)
        patch.setattr(device_loading, "load_weights", self._load_weights)
        patch.setattr(device_pool, "DeviceMemory", partial(FakeMemory, self.handles))
        patch.setattr(device, "mapped", self._mapped)
        patch.setattr(cudart, "lock_pages", lambda pointer, size_bytes: None, raising=False)
        patch.setattr(device, "CudaQueue", lambda gpu: SharedQueue())
        patch.setattr(prefill_pieces, "SMALLEST", (8, 16))  # padding takes time too
        patch.setattr(CudaRunner, "warm_up", lambda runner: None)
        patch.setattr(AdvancingStage, "warm_up", lambda stage: stage._leaving.take(1))  # which takes a turn
        patch.setattr(build_stages, "StageGroup", self._group)
        patch.setattr(device_stage_pools, "DeviceCopies", self._copies)
        for module in (late, device):
            patch.setattr(module, "Leaving", self._leave)

    def end(self, model: Any) -> None:
        """No thread goes on computing, which would disturb the interpreter in tests to come."""
        model.ranks.close()
        for leaving in self.leaving:
            leaving.put(ended)
        for thread in threading.enumerate():
            if thread.name == "leaving":
                thread.join(WAIT_S)
                assert not thread.is_alive()

    def _copies(self, memory: FakeMemory, part: object) -> SimpleNamespace:
        self.copied.append(memory)
        return SimpleNamespace(batch_blocks=1)

    def _leave(self, *given: Any) -> Leaving:
        self.leaving.append(Leaving(*given))
        return self.leaving[-1]

    def _group(self, *given: Any) -> FakeGroup:
        self.groups.append(FakeGroup(*given))
        return self.groups[-1]

    def _mapped(self, handle: bytes, size_bytes: int, gpu: int) -> torch.Tensor:
        memory = self.handles[handle]
        assert (memory.payload_bytes, memory.device_index) == (size_bytes, gpu)
        return memory.data.view(-1)

    def _load_weights(self, config: Any, folder: Path, dtype: torch.dtype, where: str, *more: Any, **named: Any) -> Any:
        assert where == f"cuda:{GPUS[named['stage'].index]}"
        return load_weights(config, folder, dtype, "cpu", *more, **named)


def ended() -> NoReturn:
    """The last message of a stage."""
    raise PeerLost("the test has ended")


class FakeGroup:
    """StageGroup whose stages are threads."""

    def __init__(
        self,
        model: ModelPart,
        num_ranks: int,
        name: str,
        log_level: str,
        threads: int,
        share: Callable[[int], DeviceShare],
    ) -> None:
        links = [stage_pair(index, (index + 1) % model.num_stages) for index in range(model.num_stages)]
        self.links = [end for both in links for end in both]
        self.following, self.last = links[0][0], links[-1][1]
        self.stages = [
            FakeStage(model, share(index), index, links[index - 1][1], links[index][0])
            for index in range(1, model.num_stages)
        ]

    def tell(self, messages: Sequence[Any]) -> None:
        for stage, message in zip(self.stages, messages, strict=True):
            stage.inbox.put(encode(message))

    def answers(self, kind: type[T]) -> list[T]:
        found = [decode(stage.outbox.get(timeout=WAIT_S)) for stage in self.stages]
        assert all(isinstance(each, kind) for each in found)
        return found

    def close(self) -> None:
        for link in self.links:
            link.shut()
        for stage in self.stages:
            stage.thread.join(WAIT_S)
            assert not stage.thread.is_alive()


class FakeStage:
    """A stage's process, and its end of the control link."""

    def __init__(self, model: ModelPart, share: DeviceShare, index: int, before: StageLink, after: StageLink) -> None:
        self.inbox: SimpleQueue[bytes] = SimpleQueue()
        self.outbox: SimpleQueue[bytes] = SimpleQueue()
        self.send = self.outbox.put
        start = StageStart(
            starter_pid=os.getpid(),
            name="",
            log_level="",
            entering_fd=0,
            leaving_fd=0,
            model=msgspec.structs.replace(model, stage=index),
            num_ranks=1,
            threads=1,
            device=share,
        )
        self.thread = threading.Thread(target=self._run, args=(start, before, after))
        self.thread.start()

    def receive(self, wait_s: float) -> bytes:
        return self.inbox.get(timeout=WAIT_S)

    def _run(self, start: StageStart, before: StageLink, after: StageLink) -> None:
        stage = device.join_on_device(start, self, WAIT_S)
        self.send(encode(RankReady()))
        with pytest.raises(PeerLost):
            stage.work(before, after)
        for link in (before, after):  # as the end of its process does
            link.shut()


def settings_of(folder: Path, **more: Any) -> PrefillSettings:
    sizes = {"block_tokens": BLOCK, "max_model_len": 64, "max_num_seqs": 3, "max_num_batched_tokens": 32}
    common = {"dtype": "float32", "pp": 3, "rank_gpus": GPUS}
    return PrefillSettings(model=str(folder), device="cuda", **common | sizes | more)


def load(folder: Path, **more: Any) -> Any:
    settings = settings_of(folder, **more)
    return build_stages.load_stages_on_cuda(settings, settings.worker_sizes("cuda"), "prefill", folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=67, num_hidden_layers=4, max_position_embeddings=64, eos_token_id=7, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(tmp_path)
    return tmp_path


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7, 1, 8], [10, 20, 30, 40, 50, 60]]
SPECS = [
    SamplingSpec(max_tokens=9, temperature=0.0),
    SamplingSpec(max_tokens=9, temperature=1.1, seed=6),
    SamplingSpec(max_tokens=9, temperature=0.0, grammar=GRAMMAR),
]


def steps() -> Iterator[list[Row]]:
    """Of more prompts than are in flight; the first one in two chunks, with log probabilities of the second."""
    blocks = [list(range(3 * slot, 3 * slot + 3)) for slot in range(3)]
    draws = [Draw(spec, prompt, len(prompt), 0) for spec, prompt in zip(SPECS, PROMPTS, strict=True)]
    yield [Row(PROMPTS[0][:9], 0, blocks[0], None, 0)]
    yield [Row(PROMPTS[1], 0, blocks[1], draws[1], 1)]
    yield [Row(PROMPTS[0][9:], 9, blocks[0], draws[0], 0, PromptTargets(0, PROMPTS[0][10:], 1))]
    yield [Row(PROMPTS[1], 0, blocks[1], draws[1], 1)]
    yield [Row(PROMPTS[2], 0, blocks[2], draws[2], 2)]


def drawn_by(runner: Any) -> list[Any]:
    """Of all steps, as many in flight as the runner lets, masks given when all before were read."""
    in_flight: list[Any] = []
    found: list[Any] = []

    def read() -> None:
        launched = in_flight.pop(0)
        tokens = [drawn and drawn.token_ids for drawn in launched.read()]
        found.append((tokens, {row: [each.rank for each in own] for row, own in launched.prompt_logprobs.items()}))

    for rows in steps():
        if len(in_flight) > runner.run_ahead:
            read()
        in_flight.append(runner.launch(rows))
        if any(row.draw is not None and row.draw.is_masked for row in rows):
            while len(in_flight) > 1:
                read()
            in_flight[0].complete(np.stack([mask_after(PROMPTS[2], runner.config.vocab_size)]))
    while in_flight:
        read()
    return found


def test_stages_draw_what_one_process_draws(monkeypatch, folder):
    """Guards against steps that overtake one another, another stage's layers, pool or GPU, a pool that is larger than
    the fullest GPU has room for, masks that do not come, and stages that outlive the first."""
    gpus = FakeStages((30, NUM_BLOCKS, 20))
    gpus.install(monkeypatch)
    monkeypatch.setattr(build_stages, "device_plane_by_layer", lambda *given: SimpleNamespace(given=given))
    plain = ModelRunner.load(folder)
    pool, _ = kv_pool(plain, NUM_BLOCKS, BLOCK)
    plain.bind_pool(pool)
    model = load(folder, store="tcp://127.0.0.1:1")
    try:
        assert model.runner.run_ahead == 3 and drawn_by(model.runner) == drawn_by(plain)
        pools = model.pool.pools
        assert [pool.memory.device_index for pool in pools] == list(GPUS)
        assert [tuple(pool.tensor.shape[:3]) for pool in pools] == [(NUM_BLOCKS, 2, layers) for layers in (2, 1, 1)]
        assert model.layout.num_layers == 4 and (model.pool.num_blocks, model.max_model_len) == (NUM_BLOCKS, 64)
        found = torch.cat([pool.tensor for pool in pools], 2)
        torch.testing.assert_close(found, pool, rtol=1e-3, atol=1e-3)
        assert gpus.copied == [pool.memory for pool in pools]
        assert model.host_copies.block_bytes == model.layout.block_bytes
        (plane,) = model.make_planes("context", "worker", "host")
        assert plane.given[:2] == (model.pool.cut, pools)
    finally:
        gpus.end(model)


def test_the_loss_of_a_stage_ends_the_steps_in_flight(monkeypatch, folder):
    """Guards against a worker that waits for ever for a stage that is gone, and stages that wait for one another."""
    gpus = FakeStages((NUM_BLOCKS,) * 3)
    gpus.install(monkeypatch)
    model = load(folder, num_blocks=8)
    (group,) = gpus.groups
    try:
        assert model.pool.num_blocks == 8
        for link in group.links[2:4]:  # between the second stage and the third
            link.shut()
        step = model.runner.launch(next(steps()))
        with pytest.raises(PeerLost):
            step.read()
    finally:
        gpus.end(model)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tp": 2, "rank_gpus": (0, 1, 2, 3, 4, 5)}, "--tp 2 with --pp 3"),
        ({"stages_bind": "tcp://127.0.0.1:1"}, "--stages-bind with --pp 3"),
        ({"max_loras": 1}, "--max-loras with --pp 3"),
        ({"plane": ("nccl",)}, "--plane nccl with --pp 3"),
        ({"rank_gpus": (0, 1)}, "--rank-gpus names 2 GPUs for --pp 3"),
        ({"rank_gpus": (), "gpu": 4}, "--pp 3: needs the GPUs 4 5 6, and this torch sees 6"),
        ({"pp": 5}, "4 layers cannot be shared out to 5 stages"),
    ],
)
def test_what_stages_on_gpus_do_not_do_is_refused(monkeypatch, folder, given, named):
    """Guards against a worker that starts, and then computes without what was asked for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    with pytest.raises(SettingsError, match=named):
        load(folder, **given)
