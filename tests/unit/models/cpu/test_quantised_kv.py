"""Steps over KV of 8-bit floats: all attention reads what is in the pool, so the way into the pool does not matter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.models.batch import Row
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.kv_scales import kv_format_of, read_kv_scales
from baton.node.errors import InvariantBroken, SettingsError
from baton.tests.unit.models.conftest import GREEDY, Sequences, kv_pool

WINDOWED = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
PROMPT = torch.randint(0, 131, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def with_scales(folder: Path, names: dict[str, torch.Tensor]) -> Path:
    """The folder with more tensors, by their names behind `model.layers.I.self_attn.`, in all layers."""
    held = load_file(folder / "model.safetensors")
    for layer in range(3):
        held |= {f"model.layers.{layer}.self_attn.{name}": value.clone() for name, value in names.items()}
    save_file(held, folder / "model.safetensors")
    return folder


ONE_EACH = {"k_scale": torch.tensor([0.02]), "v_scale": torch.tensor([0.03])}


@pytest.fixture(params=["fp8", "fp8_static"])
def runner(request, make_model) -> ModelRunner:
    folder = make_model("qwen3", **WINDOWED).folder
    return ModelRunner.load(with_scales(folder, ONE_EACH), kv_dtype=request.param)


@pytest.mark.parametrize(("chunk", "block_tokens"), [(1, 16), (7, 64), (64, 16)])
def test_chunks_give_the_same_tokens(runner, chunk, block_tokens):
    """Guards against a chunk that attends to keys and values of its own as they were before they were rounded."""
    whole, expected = Sequences(runner, 1, 200).greedy(0, PROMPT, 20)
    cut, logits = Sequences(runner, 1, 200, block_tokens).greedy(0, PROMPT, 20, chunk)
    assert cut == whole
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_a_token_of_a_chunk_attends_to_what_the_pool_holds(runner):
    """The same, bit for bit: a chunk whose prefix is in the pool, after its own keys and values were replaced by those
    that an earlier step wrote, gives what it gave."""
    run = Sequences(runner, 2, 200)
    ((row,), other) = run.chunks(0, PROMPT, 1000), run.tables[1]
    _, first = runner.compute([row])
    for source, target in zip(row.blocks, other, strict=True):
        run.pool.data.view(torch.uint8)[target] = run.pool.data.view(torch.uint8)[source]
        if run.pool.scales is not None:
            run.pool.scales[target] = run.pool.scales[source]
    step = Row(PROMPT[-1:], len(PROMPT) - 1, row.blocks, GREEDY)
    moved = Row(PROMPT[-1:], len(PROMPT) - 1, other, GREEDY)
    assert torch.equal(runner.compute([step])[1], runner.compute([moved])[1])
    assert (runner.compute([step])[1] - first).norm() < 0.02 * first.norm()


def test_it_is_near_what_plain_kv_gives(make_model, prompt):
    """Guards a scale that is applied twice or not at all, which tests of equality would not see."""
    folder = make_model("llama").folder
    plain, exact = Sequences(ModelRunner.load(folder), 1, 64).greedy(0, prompt, 1)
    near, found = Sequences(ModelRunner.load(folder, kv_dtype="fp8"), 1, 64).greedy(0, prompt, 1)
    assert near == plain and (found - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize(
    ("names", "keys", "values"),
    [
        (ONE_EACH, [0.02, 0.02], [0.03, 0.03]),
        ({"k_proj.k_scale": torch.tensor(0.5), "v_proj.v_scale": torch.tensor(2.0)}, [0.5, 0.5], [2.0, 2.0]),
        ({"kv_scale": torch.tensor(0.25)}, [0.25, 0.25], [0.25, 0.25]),
        ({"k_scale": torch.tensor([[[1.0]], [[2.0]]]), "v_scale": torch.tensor([3.0, 4.0])}, [1.0, 2.0], [3.0, 4.0]),
    ],
    ids=["compressed-tensors", "modelopt", "one for both", "a head each"],
)
def test_scales_of_checkpoints(make_model, names, keys, values):
    """Guards the names that tools write, and scales of heads exchanged."""
    folder = with_scales(make_model("llama").folder, names)
    config = ModelConfig.from_folder(folder)
    scales = read_kv_scales(Checkpoint.open(folder), config)
    assert torch.equal(scales, torch.tensor([[keys, values]] * 3))
    assert kv_format_of("fp8_static", config, folder, torch.float32).scales_digest() != ""


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({}, "layers.0.self_attn.k_scale is missing"),
        ({"k_scale": torch.tensor([0.02])}, "layers.0.self_attn.v_scale is missing"),
        (ONE_EACH | {"v_scale": torch.tensor([0.0])}, "v_scale is no number above zero"),
        (ONE_EACH | {"k_scale": torch.tensor([float("nan")])}, "k_scale is no number above zero"),
        (ONE_EACH | {"k_scale": torch.ones(3)}, "k_scale has 3 scales, expected 1 or 2"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(make_model, names, reason):
    """Guards against scales that are guessed."""
    with pytest.raises(SettingsError, match=reason):
        ModelRunner.load(with_scales(make_model("llama").folder, names), kv_dtype="fp8_static")


def test_heads_whose_scales_would_not_be_aligned_are_refused(make_model):
    with pytest.raises(SettingsError, match="heads of 18 elements"):
        ModelRunner.load(make_model("llama", head_dim=18).folder, kv_dtype="fp8")


def test_a_pool_of_another_format_is_refused(make_model):
    """Guards against scales that are read from the next layer's numbers."""
    folder = make_model("llama").folder
    plain, quantised = ModelRunner.load(folder), ModelRunner.load(folder, kv_dtype="fp8")
    data, scales = kv_pool(quantised, 4, 16)
    for runner, pool in (
        (quantised, (data,)),
        (quantised, (torch.zeros(data.shape), scales)),
        (quantised, (data.contiguous(), scales)),
        (plain, (data, scales)),
        (plain, (torch.zeros(data.shape), scales)),
    ):
        with pytest.raises(InvariantBroken):
            runner.bind_pool(*pool)
