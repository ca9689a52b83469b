"""Workers of two ranks on GPUs from their settings to their tokens, with fakes of CUDA: what each rank is given.

What is compiled or captured ahead of the first step is left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")
from baton.decode.settings import DecodeSettings
from baton.models.cpu.runner import ModelRunner
from baton.tests.unit.models.conftest import kv_pool
from baton.tests.unit.models.cuda.ahead import Ahead, one_after_the_other
from baton.tests.unit.models.cuda.merged import random_adapter, with_magnitudes, with_wholes
from baton.tests.unit.models.eagle_folders import write_pair
from baton.tests.unit.worker.ranks.fake_gpus import FakeGpus, loaded

BLOCK = 16
PROMPT, TABLE = [10, 20, 30, 40, 50], [9, 3, 5]


def settings_of(folder: Path, **more) -> DecodeSettings:
    sizes = {"block_tokens": BLOCK, "max_model_len": 96, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    common = {"dtype": "float32", "speculate_tokens": 1} | sizes
    return DecodeSettings(model=str(folder), device="cuda", tp=2, rank_gpus=(3, 5), **common | more)


def generate(runner, count: int, most_drafts: int = 0, adapter: int | None = None) -> Ahead:
    """At least so many tokens."""
    run = Ahead(runner, most_drafts=most_drafts)
    run.adapters = {} if adapter is None else {0: adapter}
    run.start(0, PROMPT, TABLE)
    while len(run.known[0]) < len(PROMPT) + count:
        run.launch([0])
    return run


def test_ranks_with_a_draft_and_the_store(monkeypatch, tmp_path):
    """Guards against a draft of another rank or without its layer in a pool, and pools, copies or planes of another
    GPU."""
    folder, draft, gpus = tmp_path / "model", tmp_path / "draft", FakeGpus({3: 0, 5: 0})
    write_pair(folder, draft, num_layers=2)
    settings = settings_of(folder, num_blocks=24, speculate=f"eagle:{draft}", store="tcp://127.0.0.1:1")
    plain = ModelRunner.load(folder)
    plain.bind_pool(*kv_pool(plain, 24, BLOCK))
    with loaded(monkeypatch, gpus, settings, folder, draft) as model:
        run = generate(model.runner, 3, most_drafts=1)
        assert run.generated(0)[:3] == one_after_the_other(plain, PROMPT, TABLE, 3) and run.num_accepted
    assert model.layout.num_layers == 3 and (model.pool.num_blocks, model.max_model_len) == (24, 96)
    pools = [pool.memory for pool in model.pool.pools]
    assert [memory.device_index for memory in pools] == [3, 5] and all(memory.data.any() for memory in pools)
    assert gpus.copied == pools and model.host_copies.block_bytes == model.layout.block_bytes
    made = model.make_planes("context", "worker", "host")
    assert [plane.name for plane in made] == ["cuda_ipc_ranks", "nccl_ranks", "cuda_ipc_layers"]
    assert made[2].memories == pools and len(made[2].digest([1])) == 16
    assert (made[2].cut.ranks, made[2].cut.layers) == (2, (range(model.layout.num_layers),))
    ends = [(plane.name, plane.memory.pointer, plane.place, plane.warm) for plane in gpus.planes]
    assert ends == [
        (name, memory.pointer, ("context", f"worker/{rank}", "host"), False)
        for name in ("cuda_ipc", "nccl")
        for rank, memory in enumerate(pools)
    ]


def test_ranks_with_adapters_and_quantised_weights(monkeypatch, tmp_path):
    """Guards against an adapter in another slot, or of another rank, weights that are not kept as codes, drafts without
    room, and pools that are larger than the fuller GPU has room for."""
    folder, gpus = tmp_path / "model", FakeGpus({3: 30, 5: 24})
    write_pair(folder, tmp_path / "draft", num_layers=2, mlp_size=32)
    settings = settings_of(
        folder,
        quantization="int4",
        speculate="ngram",
        max_loras=2,
        max_lora_rank=16,
        lora_room=("modules_to_save", "dora"),
    )
    plain = ModelRunner.load(folder, quantization="int4", max_loras=2, max_lora_rank=16)
    plain.bind_pool(*kv_pool(plain, 24, BLOCK))
    adapter = with_magnitudes(with_wholes(random_adapter(plain.config, [12, 5], 1), plain.config), plain.config)
    plain.adapters.fill(1, plain.adapters.prepare(adapter))
    with loaded(monkeypatch, gpus, settings, folder) as model:
        assert model.pool.num_blocks == 24
        slots = model.adapter_slots
        assert slots.num_slots == 2 and slots.fill(1, slots.prepare(adapter)).done
        run = generate(model.runner, 3, most_drafts=1, adapter=1)
        expected = generate(plain, 3, adapter=1).generated(0)[:3]
        assert run.generated(0)[:3] == expected != generate(plain, 3).generated(0)[:3]
    assert ["int4_g32" in formats for formats in gpus.formats] == [True, True]
