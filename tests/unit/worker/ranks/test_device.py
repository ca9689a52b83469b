"""How ranks on GPUs map one another's memory, with a fake of CUDA IPC: a handle names a tensor of this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")
from baton.models.adapters.cut import share_of
from baton.models.adapters.room import ROOMS
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_bank import BankSlots
from baton.models.cuda.peers import DevicePeers, RankMemory
from baton.models.kv_format import KvFormat
from baton.models.partition import Rank, part_of
from baton.node.modelhub import locate_model
from baton.testing.late_queue import LateQueue
from baton.tests.unit.models.cuda.merged import random_adapter, with_vocabulary, with_wholes
from baton.tests.unit.worker.ranks.fake_gpus import build_ranks, device, device_loading
from baton.worker.ranks.messages import DeviceLoaded, DevicePoolsMade, ModelPart, RankStart, SharedBytes, decode, encode

DeviceRank, bank_shape, device_layout = device.DeviceRank, device.bank_shape, device_loading.device_layout
join_on_device = device.join_on_device

GPUS = (3, 5)


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_folder(locate_model("demo"))


@pytest.fixture
def start() -> RankStart:
    """Of rank 1 of 2."""
    part = ModelPart(
        folder="model",
        dtype="float32",
        kv_dtype="auto",
        load_format="auto",
        quantization=None,
        max_model_len=None,
        vocab_size=67,
        max_loras=2,
        max_lora_rank=16,
        lora_room=ROOMS,
    )
    memory = SharedBytes(0, 0, b"")
    return RankStart(
        index=1, count=2, starter_pid=1, name="", log_level="", peer_fds={}, memory=memory, model=part, threads=1
    )


class Mappings:
    """`mapped` over memory of this process; what was asked for is kept."""

    def __init__(self, memories: dict[bytes, torch.Tensor]) -> None:
        self._memories = memories
        self.asked: list[tuple[bytes, int, int]] = []

    def __call__(self, handle: bytes, size_bytes: int, gpu: int) -> torch.Tensor:
        self.asked.append((handle, size_bytes, gpu))
        return self._memories[handle]


def test_an_adapter_reaches_the_memory_of_each_rank(monkeypatch, config, start):
    """Guards against slots of another shape, rank or GPU than those that the rank's own steps read."""
    adapter = with_vocabulary(with_wholes(random_adapter(config, [8] * config.num_layers, 1), config), config)
    shapes = [bank_shape(config, Rank(index, 2), start.model, torch.float32) for index in range(2)]
    memories = [torch.zeros(shape.size_bytes, dtype=torch.uint8) for shape in shapes]
    maps, queues = Mappings({b"bank": memories[1]}), [LateQueue(), LateQueue()]
    monkeypatch.setattr(build_ranks, "mapped", maps)
    monkeypatch.setattr(build_ranks, "CudaQueue", {GPUS[1]: queues[1]}.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    runner = SimpleNamespace(config=config, adapters=BankSlots(shapes[0], queues[0], memories[0]))
    own = SimpleNamespace(bank=object(), runner=runner, share=SimpleNamespace(gpu=GPUS[0]))

    slots = build_ranks._slots(own, start, [b"bank"], GPUS)
    assert maps.asked == [(b"bank", shapes[1].size_bytes, GPUS[1])]
    assert slots.fill(1, slots.prepare(adapter)).done
    for index, (shape, memory) in enumerate(zip(shapes, memories, strict=True)):
        alone = BankSlots(shape, LateQueue(), expected := torch.zeros_like(memory))
        assert alone.fill(1, alone.prepare(share_of(adapter, config, Rank(index, 2)))).done
        assert memory.any() and torch.equal(memory, expected)


def test_a_rank_sends_into_the_memory_that_each_handle_names(monkeypatch, config):
    """Guards against sums that go to another rank, or over another process's address of this rank's own memory."""
    layout = RankMemory.of(config, Rank(1, 2), torch.float32, 8)
    memories = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for _ in range(2)]
    peers = DevicePeers(layout, memories[1], config.vocab_size)
    opened = {b"first": memories[0].data_ptr()}
    monkeypatch.setattr(device.cudart, "use_device", lambda gpu: None)
    monkeypatch.setattr(device.cudart, "open_handle", opened.__getitem__)
    rank = SimpleNamespace(
        rank=layout.rank,
        share=SimpleNamespace(gpu=GPUS[1]),
        exchange=SimpleNamespace(pointer=memories[1].data_ptr()),
        peers=peers,
    )
    DeviceRank.connect(rank, (b"first", b"own"))
    for inbox, shape, offset in zip((peers.sums, peers.drawn), layout.inboxes, layout.offsets, strict=False):
        sent = offset + shape.offset(1, 2)
        assert inbox.targets.tolist() == [memory.data_ptr() + sent for memory in memories]


@pytest.mark.parametrize("has_draft", [False, True])
def test_a_rank_uses_its_own_pool_of_those_that_rank_0_made(monkeypatch, config, start, has_draft):
    """Guards against keys and values in another rank's pool, and a pool without room for a draft's layer."""
    own_layout = device_layout(part_of(config, Rank(1, 2)), KvFormat.plain(torch.float32), 16, has_draft=has_draft)
    calls: dict[str, Any] = {}

    class Loaded:
        bank, num_blocks, rank, layout = SimpleNamespace(handle=b"bank"), 9, Rank(1, 2), own_layout
        exchange, share = SimpleNamespace(handle=b"exchange"), SimpleNamespace(gpu=GPUS[1])
        runner = SimpleNamespace(launch_chosen=None, run_ahead=1)
        peers = SimpleNamespace(give_up=len)

        def bind(self, tensors: Any, max_model_len: int) -> None:
            calls["bound"] = tuple(tensors.data.shape), max_model_len

        def connect(self, exchanges: Any) -> None:
            calls["connected"] = exchanges

    made = DevicePoolsMade(pools=(b"0", b"1"), exchanges=(b"first", b"own"), num_blocks=3, max_model_len=40)
    sent: list[bytes] = []
    control = SimpleNamespace(send=sent.append, receive=lambda timeout_s: encode(made))
    maps = Mappings({b"1": torch.zeros(3 * own_layout.block_bytes, dtype=torch.uint8)})
    monkeypatch.setattr(device, "mapped", maps)
    monkeypatch.setattr(DeviceRank, "load", lambda start: Loaded())
    _, give_up = join_on_device(start, SimpleNamespace(), control, 1.0)
    assert give_up is Loaded.peers.give_up
    assert [decode(each) for each in sent] == [DeviceLoaded(exchange=b"exchange", bank=b"bank", num_blocks=9)]
    assert maps.asked == [(b"1", 3 * own_layout.block_bytes, GPUS[1])]
    heads = config.num_kv_heads // 2 or 1
    shape = (3, heads, config.num_layers + has_draft, 2, 16, config.head_dim)
    assert calls == {"bound": (shape, 40), "connected": (b"first", b"own")}
