"""The description of layers, and the order in which a step walks through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.kernels import DenseLinear
from baton.models.allocation import allocate
from baton.models.config import ModelConfig
from baton.models.layer_order import run_layers
from baton.models.layer_weights import AttentionWeights, DenseMlpWeights, LayerWeights, Weights
from baton.models.layers import describe
from baton.models.partition import WHOLE, Rank
from baton.models.quantization.recipe import RECIPES
from baton.models.weights import load_weights
from baton.node.errors import SettingsError


@pytest.fixture
def folder(make_model) -> Path:
    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    return make_model("qwen2", **window).folder


def test_each_layer_says_what_it_is(folder):
    """Guards against a window, or a bias, of the wrong layers: executors read nothing else."""
    shapes = describe(ModelConfig.from_folder(folder))
    assert [shape.attention.window for shape in shapes] == [None, 20, 20]
    assert all(shape.attention.qkv_bias and not shape.attention.o_bias for shape in shapes)
    assert (shapes[0].attention.num_heads, shapes[0].attention.num_kv_heads, shapes[0].mlp.width) == (4, 2, 80)


@pytest.mark.parametrize(
    ("rank", "heads", "key_heads"),
    [(Rank(1, 2), range(4, 8), range(1, 2)), (Rank(3, 4), range(6, 8), range(1, 2)), (Rank(0, 1), range(8), range(2))],
)
def test_a_rank_has_whole_groups_of_query_heads(rank, heads, key_heads):
    """Guards against query heads on a rank that has not the key head which they share."""
    assert rank.share(8, "query heads") == heads and rank.key_heads(2) == key_heads
    assert {head * 2 // 8 for head in heads} <= set(key_heads)


def test_what_cannot_be_shared_out_is_an_error():
    with pytest.raises(SettingsError, match="6 key heads"):
        Rank(0, 4).key_heads(6)


class Recorder:
    """LayerOps that note what they are asked for, by the names of the weights."""

    def __init__(self, stops_in: int = -1) -> None:
        self.seen: list[str] = []
        self._stops_in = stops_in

    def norm(self, weight, reader):
        return self._note(f"norm {weight.item():.0f}")

    def attention(self, index, layer, x):
        self._note(f"attention {index}")
        return None if index == self._stops_in else x

    def mlp(self, layer, x):
        return self._note(f"mlp {layer.input_norm.item():.0f}")

    def add_and_norm(self, added, output_norm, weight, reader):
        return self._note(f"{_normed(output_norm)}add {weight.item():.0f}")

    def finish(self, added, output_norm, weight):
        return self._note(f"{_normed(output_norm)}finish {weight.item():.0f}")

    def _note(self, what: str) -> torch.Tensor:
        self.seen.append(what)
        return torch.zeros(1)


def _normed(output_norm: torch.Tensor | None) -> str:
    return "" if output_norm is None else f"norm by {output_norm.item():.0f}, "


def numbered(num_layers: int, folder: Path, output_norms: bool = False) -> Weights:
    """Weights whose norms are numbered: 10 and 11 of layer 0, 20 and 21 of layer 1, and so on; 99 is the final one.

    Those of what attention and MLP add are 12 and 13, and so on.
    """
    shape, linear = describe(ModelConfig.from_folder(folder))[0], DenseLinear(torch.zeros(1, 1))
    attention, mlp = AttentionWeights(linear, None, linear), DenseMlpWeights(linear, linear)
    layers = tuple(
        LayerWeights(
            shape,
            torch.tensor(10.0 * n),
            attention,
            torch.tensor(10.0 * n + 1),
            mlp,
            torch.tensor(10.0 * n + 2) if output_norms else None,
            torch.tensor(10.0 * n + 3) if output_norms else None,
        )
        for n in range(1, num_layers + 1)
    )
    return Weights(torch.zeros(1, 1), layers, torch.tensor(99.0), linear)


def test_a_step_walks_through_all_layers(folder):
    """Guards the order of the parts, and that each sum is normed with the weight of the part that reads it."""
    ops = Recorder()
    run_layers(numbered(2, folder), ops)
    first = ["norm 10", "attention 0", "add 11", "mlp 10", "add 20"]
    assert ops.seen == [*first, "attention 1", "add 21", "mlp 20", "finish 99"]


def test_what_a_layer_adds_is_normed_before(folder):
    """Guards against the norm of an output that is taken of another part."""
    ops = Recorder()
    run_layers(numbered(2, folder, output_norms=True), ops)
    first = ["norm 10", "attention 0", "norm by 12, add 11", "mlp 10", "norm by 13, add 20"]
    assert ops.seen == [*first, "attention 1", "norm by 22, add 21", "mlp 20", "norm by 23, finish 99"]


def test_nothing_behind_the_last_keys_is_computed_where_no_token_draws(folder):
    ops = Recorder(stops_in=1)
    assert run_layers(numbered(2, folder), ops) is None
    assert ops.seen[-1] == "attention 1"


def test_weights_name_their_format_and_sizes(folder):
    """Guards the choice of a kernel, which goes by these also where the weight itself has been packed away."""
    config = ModelConfig.from_folder(folder)
    down = load_weights(config, folder, torch.float32).layers[0].mlp.down
    assert (down.weight_format, down.num_outputs, down.num_inputs) == ("dense", 48, 80)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen3", True), ("gemma3", True)])
def test_the_sizes_of_weights_are_those_of_their_tensors(make_model, family, tied):
    """Guards the plan of a GPU's memory against a format that is not counted, and a tied head that is counted twice."""
    folder = make_model(family, tie_word_embeddings=tied).folder
    config = ModelConfig.from_folder(folder)
    plain = load_weights(config, folder, torch.float32, pack=False).size_bytes
    _, places = allocate(config, tied, WHOLE, torch.float32, "meta")
    assert plain == {"dense": sum(place.size_bytes for place in places.values())}
    kept = load_weights(config, folder, torch.float32, pack=False, recipe=RECIPES["int8"], keep_quantised=True)
    moved = [linear for layer in kept.layers for linear in layer.linears]
    assert kept.size_bytes["int8_row"] == sum(m.num_outputs * (m.num_inputs + 4) for m in moved)
    assert kept.size_bytes["dense"] == plain["dense"] - 4 * sum(m.num_outputs * m.num_inputs for m in moved)
