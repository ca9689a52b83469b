"""worker.settings: sizes derived from the device, and sizes set by the user."""

from __future__ import annotations

import pytest

from baton.decode.settings import DecodeSettings
from baton.node.settings import parse
from baton.prefill.settings import PrefillSettings


@pytest.mark.parametrize("kind", [DecodeSettings, PrefillSettings])
def test_sizes_that_are_not_set_depend_on_the_device(kind: type[DecodeSettings | PrefillSettings]) -> None:
    """Guards against a loop that runs without a size."""
    cpu, gpu = kind().sizes("cpu"), kind().sizes("cuda")
    assert (cpu.worker.block_tokens, gpu.worker.block_tokens) == (16, 64)
    assert (cpu.worker.plane[0], gpu.worker.plane[0]) == ("shm", "cuda_ipc")
    for sizes in (cpu, gpu):
        worker = sizes.worker
        assert min(worker.max_num_seqs, worker.max_num_batched_tokens, worker.chunk_mib, sizes.max_chunk_tokens) > 0
    assert cpu.worker.kv_memory_gib == 0.5
    assert gpu.worker.kv_memory_gib is None, "on a GPU the pool is planned from what is free"


@pytest.mark.parametrize("kind", [DecodeSettings, PrefillSettings])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_given_sizes_are_kept(kind: type[DecodeSettings | PrefillSettings], device: str) -> None:
    """Guards against a device default that overrides the user's value."""
    sizes = kind(block_tokens=32, max_chunk_tokens=7, plane=("zmq",), max_num_batched_tokens=9).sizes(device)
    assert (sizes.worker.block_tokens, sizes.max_chunk_tokens, sizes.worker.plane) == (32, 7, ("zmq",))
    assert sizes.worker.max_num_batched_tokens == 9


def test_a_prefill_step_on_a_gpu_is_a_chunk() -> None:
    """Guards the overlap of transfer and compute: KV of a chunk is sent while the next chunk is computed."""
    sizes = PrefillSettings().sizes("cuda")
    assert sizes.worker.max_num_batched_tokens == sizes.max_chunk_tokens == 4096
    assert DecodeSettings().sizes("cuda").worker.max_num_batched_tokens == 8192


def test_experts_want_longer_steps() -> None:
    """Guards against steps in which experts get so few rows that reading their weights is all the work."""
    sizes = PrefillSettings().sizes("cuda", 8192)
    assert sizes.worker.max_num_batched_tokens == sizes.max_chunk_tokens == sizes.full_step_tokens == 8192
    assert PrefillSettings().sizes("cpu", 8192) == PrefillSettings().sizes("cpu")
    assert PrefillSettings(max_chunk_tokens=1024).sizes("cuda", 8192).max_chunk_tokens == 1024


@pytest.mark.parametrize("option", ["--block-tokens", "--max-num-seqs", "--num-blocks", "--max-model-len", "--threads"])
def test_a_size_of_zero_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against 0 as a special value: a size left to the device is not given at all."""
    with pytest.raises(SystemExit):
        parse(DecodeSettings, [option, "0"], prog="baton decode", description="")
    assert f"{option}:" in capsys.readouterr().err
