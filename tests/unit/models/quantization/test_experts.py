"""Experts that are quantised, in the files or while they are loaded: dequantised on a CPU, kept as codes on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from baton.kernels import ExpertLinears
from baton.models import sources
from baton.models.config import ModelConfig
from baton.models.layer_weights import ExpertsWeights
from baton.models.partition import Rank
from baton.models.quantization.recipe import RECIPES
from baton.models.weights import load_weights
from baton.tests.unit.models.quantization.test_tokens import save
from baton.tests.unit.models.quantization.writers import FORMATS

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_experts_per_tok": 2, "num_local_experts": 2}
KEPT = {
    "fp8, static": "fp8_row",
    "fp8, powers of two": "dense",
    "float-quantized": "fp8_row",
    "int-quantized": "int8_row",
    "pack-quantized": "dense",
    "awq": "dense",
    "gptq, zero points": "dense",
}
"""How the experts lie on a GPU."""


def rewrite(folder: Path, form) -> dict[str, torch.Tensor]:
    """The folder's projections in a format; gives the tensors that they then mean."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    meanings = dict(tensors)
    for name in [name for name in tensors if "_proj.weight" in name or ".experts." in name]:
        written, meaning = form.write(tensors.pop(name).numpy())
        tensors |= {name.removesuffix("weight") + role: tensor for role, tensor in written.items()}
        meanings[name] = torch.from_numpy(np.ascontiguousarray(meaning))
    save(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    return meanings


def load(folder, **options) -> ExpertsWeights:
    (layer,) = load_weights(ModelConfig.from_folder(folder), folder, torch.float32, pack=False, **options).layers
    assert isinstance(layer.mlp, ExpertsWeights)
    return layer.mlp


def numbers(linears: ExpertLinears) -> torch.Tensor:
    """[E, N, K]"""
    each = [linears.expert(index) for index in range(linears.num_experts)]
    return torch.stack([one.weight if one.weight_format == "dense" else one.dequantised(torch.float32) for one in each])


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_what_their_codes_mean(name, family, make_model, caplog):
    """Guards every layout against codes or scales of another expert, dequantised or kept."""
    width = 64 if KEPT[name] == "dense" else 128
    widths = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), width)
    folder = make_model(family, **SIZES, **widths).folder
    meanings = rewrite(folder, FORMATS[name])
    begin, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if family == "mixtral" else (
        "mlp", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    wanted = [
        {part: meanings[f"model.layers.0.{begin}.experts.{index}.{part}.weight"] for part in (gate, up, down)}
        for index in range(2)
    ]
    for mlp in (load(folder), load(folder, keep_quantised=True)):
        assert torch.equal(numbers(mlp.gate_up), torch.stack([torch.cat([each[gate], each[up]]) for each in wanted]))
        assert torch.equal(numbers(mlp.down), torch.stack([each[down] for each in wanted]))
    assert (mlp.gate_up.weight_format, mlp.down.weight_format) == (KEPT[name], KEPT[name])
    assert mlp.router.weight_format == "dense" and "tensors_unused" not in caplog.text


@pytest.mark.parametrize(
    ("name", "width", "kept"),
    [("fp8", 128, "fp8_row"), ("fp8_block", 256, "fp8_block"), ("fp8_block", 160, "dense"), ("int4", 128, "dense")],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_experts_are_quantised_while_they_are_loaded(name, width, kept, load_format, make_model):
    """Guards against experts that stay plain, routers that do not, and ranks that quantise other numbers."""
    folder = make_model("qwen3_moe", **SIZES, moe_intermediate_size=width, hidden_size=256).folder
    options = {"recipe": RECIPES[name], "load_format": load_format}
    plain, coded = load(folder, **options), load(folder, **options, keep_quantised=True)
    assert {coded.gate_up.weight_format, coded.down.weight_format} == {kept}, "both products, or neither"
    assert coded.router.weight_format == "dense"
    assert torch.equal(numbers(coded.gate_up), numbers(plain.gate_up))
    assert torch.equal(numbers(coded.down), numbers(plain.down))
    assert not torch.equal(numbers(plain.down), numbers(load(folder, load_format=load_format).down))
    ranks = [load(folder, **options, keep_quantised=True, rank=Rank(index, 2)) for index in range(2)]
    assert torch.equal(torch.cat([numbers(rank.down) for rank in ranks]), numbers(plain.down))
    assert torch.equal(torch.cat([numbers(rank.gate_up) for rank in ranks]), numbers(plain.gate_up))


def test_what_experts_take_is_logged(make_model, caplog):
    """Guards the figures that an operator sizes a GPU by."""
    caplog.set_level("INFO")
    load(make_model("qwen3_moe", **SIZES, moe_intermediate_size=16).folder, load_format="dummy")
    (line,) = [line for line in caplog.messages if line.startswith("experts ")]
    assert line.startswith("experts layers=1 experts=2 top_k=2 format=dense gib=0 ")


def test_a_file_of_many_groups_of_inputs_is_opened_once(make_model, monkeypatch):
    """Guards the start with experts of GPTQ: files of thousands of tensors were opened for each of them."""
    folder = make_model("qwen3_moe", **SIZES, hidden_size=64, moe_intermediate_size=64).folder
    rewrite(folder, FORMATS["gptq, desc_act"])
    opened, really = [], sources.safe_open
    monkeypatch.setattr(sources, "safe_open", lambda path, **options: opened.append(path) or really(path, **options))
    load(folder, keep_quantised=True)
    assert len(opened) == 2, "for the groups of inputs, and for all numbers"
