"""Plain weights that are quantised while they are loaded, and random ones that are quantised from the start."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from baton.kernels import DenseLinear
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.fingerprint import model_fingerprint
from baton.models.partition import Rank
from baton.models.quantization import rounding
from baton.models.quantization.recipe import RECIPES, Recipe
from baton.models.quantization.rounding import form_of, quantise
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.models.quantization.test_kept import assert_equal
from baton.tests.unit.models.quantization.test_tokens import SIZES, WIDE
from baton.tests.unit.models.quantization.test_tokens import quantise as rewrite
from baton.tests.unit.models.quantization.writers import FORMATS

ORDERED = Recipe("int4", (1, 32), zeros=True, ordered=True)
FORMAT_OF = {"fp8": "fp8_row", "fp8_block": "fp8_block16x128", "int8": "int8_row", "int4": "int4_g32"}


def dequantised(recipe: Recipe, weight: torch.Tensor) -> torch.Tensor:
    made = quantise(recipe, *weight.shape, "cpu", lambda part: weight[part.start : part.stop])
    target = torch.empty(weight.shape)
    made.dequantise(target, range(weight.shape[0]), range(weight.shape[1]))
    return target


@pytest.mark.parametrize("recipe", [*RECIPES.values(), ORDERED], ids=[*RECIPES, "ordered"])
def test_each_weight_goes_to_the_nearest_code(recipe, monkeypatch):
    """Guards the scale, the end of the range of codes, blocks at the edges, and rows of another part."""
    weight = torch.randn(300, 320, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    whole = dequantised(recipe, weight)
    made = form_of(recipe, *weight.shape)
    largest = weight.abs().max()
    step = {"fp8": largest / 14, "int8": largest / 127, "int4": largest / 7.5}[recipe.kind]  # 448 - 416 of 448
    assert float((whole - weight).abs().max()) <= step * (
        1.01 if recipe.zeros else 0.51
    )  # a zero point is rounded, too
    assert torch.equal(whole[7], weight[7])
    monkeypatch.setattr(rounding, "PART_ELEMENTS", 320 * made.outputs_per_scale)
    assert torch.equal(dequantised(recipe, weight), whole), "parts of rows change nothing"


def test_fp8_of_rows_is_the_formula():
    """Guards the recipe's numbers, which two versions share KV by: amax / 448, to nearest even."""
    weight = torch.randn(3, 64, dtype=torch.bfloat16).float()
    scales = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(dequantised(RECIPES["fp8"], weight), (weight / scales).to(torch.float8_e4m3fn).float() * scales)


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "int8", "int4"])
def test_a_folder_is_quantised_while_it_is_loaded(name, make_model):
    """Guards against kept weights that differ from a CPU's, projections left out, and a head that is quantised."""
    folder = make_model("llama", **(WIDE if name == "fp8_block" else SIZES)).folder
    config = ModelConfig.from_folder(folder)

    def load(**options):
        return load_weights(config, folder, torch.float32, pack=False, **options)

    plain, made = load(), load(recipe=RECIPES[name])
    kept = load(recipe=RECIPES[name], keep_quantised=True)
    assert_equal(kept, made)
    assert FORMAT_OF[name] in {linear.weight_format for linear in kept.linears}
    assert all(linear.weight_format != "dense" for layer in kept.layers for linear in layer.linears)
    assert torch.equal(kept.lm_head.weight, plain.lm_head.weight)
    down = plain.layers[0].mlp.down.weight
    assert torch.equal(made.layers[0].mlp.down.weight, dequantised(RECIPES[name], down))


def test_ranks_quantise_by_the_scales_of_the_whole(make_model):
    """Guards against a scale of the rank's inputs alone, with which two ranks would mean another weight than one."""
    folder = make_model("llama", **SIZES).folder
    config = ModelConfig.from_folder(folder)
    whole, *parts = (
        load_weights(config, folder, torch.float32, pack=False, rank=rank, recipe=RECIPES["fp8"], keep_quantised=True)
        for rank in (Rank(), Rank(0, 2), Rank(1, 2))
    )
    joined = torch.cat([part.layers[0].mlp.down.dequantised(torch.float32) for part in parts], 1)
    assert torch.equal(joined, whole.layers[0].mlp.down.dequantised(torch.float32))


def test_numbers_that_have_no_code_end_the_load(make_model):
    """Guards against a row of the largest code in place of one that is infinite."""
    folder = make_model("llama", **SIZES).folder
    config = ModelConfig.from_folder(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"up_proj\.weight: has values that are infinite"):
        load_weights(config, folder, torch.float32, recipe=RECIPES["fp8"])


def test_quantised_folders_and_unknown_names_are_refused(make_model):
    """Guards against weights that are rounded twice."""
    made = make_model("llama", **SIZES)
    with pytest.raises(SettingsError, match="--quantization fp7: must be one of fp8, fp8_block"):
        recipe_for("fp7", ModelConfig.from_folder(made.folder))
    rewrite(made, FORMATS["gptq"])
    with pytest.raises(SettingsError, match=r"--quantization fp8: .* quantised already, by gptq"):
        recipe_for("fp8", ModelConfig.from_folder(made.folder))
    assert recipe_for(None, ModelConfig.from_folder(made.folder)) is None


def test_weights_of_two_recipes_do_not_share_kv(make_model):
    """Guards against KV of plain weights in use with quantised ones of the same files."""
    folder = make_model("llama", **SIZES).folder
    recipes = (None, *RECIPES.values())
    assert len({model_fingerprint(folder, recipe=recipe) for recipe in recipes}) == len(recipes)
    assert len({model_fingerprint(folder, "dummy", recipe=recipe) for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize(
    ("config", "formats"),
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 32]}, {"fp8_block16x32"}),
        (FORMATS["fbgemm_fp8"].config, {"fp8_row"}),
        (FORMATS["int-quantized"].config, {"int8_row"}),
        (FORMATS["pack-quantized, actorder"].config, {"int4_g32_zeros_ordered"}),
        (FORMATS["awq"].config, {"int4_g32_zeros"}),
        (FORMATS["gptq"].config, {"int4_g32"}),
        (FORMATS["gptq, 8 bits"].config, {"dense"}),
        (FORMATS["auto-round, awq"].config, {"int4_g32_zeros"}),
    ],
)
def test_random_weights_of_a_quantised_folder_lie_as_its_own_would(config, formats, make_model):
    """Guards benchmarks of a format, which need the configuration only, and have no room for plain weights."""
    made = make_model("llama", **SIZES)
    fields = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    (made.folder / "model.safetensors").unlink()
    model = ModelConfig.from_folder(made.folder)
    kept, plain = (
        load_weights(model, made.folder, torch.float32, load_format="dummy", pack=False, keep_quantised=keep)
        for keep in (True, False)
    )
    assert {linear.weight_format for layer in kept.layers for linear in layer.linears} == formats
    assert_equal(kept, plain)
    down = plain.layers[0].mlp.down
    assert isinstance(down, DenseLinear) and 0.015 < float(down.weight.std()) < 0.025
