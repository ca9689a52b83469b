"""Quantised weights that stay so on a device: the same numbers as those that are dequantised at load."""

from __future__ import annotations

import pytest
import torch

from baton.models import weights
from baton.models.config import ModelConfig
from baton.models.layer_weights import Weights
from baton.models.partition import Rank
from baton.models.places import PlainPlace, WeightCut
from baton.models.quantization.kept import KeptPart, keep_quantised
from baton.models.quantization.layouts import LAYOUTS
from baton.models.quantization.weight import QuantizedWeight
from baton.models.weights import load_weights
from baton.tests.unit.models.quantization.test_tokens import SIZES, WIDE, quantise
from baton.tests.unit.models.quantization.writers import FORMATS

BLOCKS = {"fp8_block", "fp8_block32x128", "fp8_block16x128", "fp8_row"}
"""Merged projections of 32 and of 144 rows, and one of 64 inputs, which are within a block."""
KEPT = {
    "fp8, static": {"fp8_row"},
    "fp8, names of transformers": {"fp8_row"},
    "fp8, blocks of 128": BLOCKS,
    "fp8, blocks that do not divide": {"fp8_block24x40", "fp8_block8x40"},
    "fp8, powers of two": {"fp8_block32x32"},
    "fbgemm_fp8": {"fp8_row"},
    "modelopt": {"fp8_row"},
    "modelopt, outputs": {"fp8_row"},
    "modelopt, blocks": BLOCKS,
    "float-quantized": {"fp8_row"},
    "float-quantized, blocks": {"fp8_block32x32"},
    "int-quantized": {"int8_row"},
    "pack-quantized": {"int4_g32"},
    "pack-quantized, zero points": {"int4_g32_zeros"},
    "pack-quantized, actorder": {"int4_g32_zeros_ordered"},
    "pack-quantized, 8 bits": {"int8_row"},
    "awq": {"int4_g32_zeros"},
    "awq, one group": {"int4_g64", "int4_g96"},
    "gptq": {"int4_g32"},
    "gptq, zero points": {"int4_g32_zeros"},
    "gptq, desc_act": {"int4_g32_zeros_ordered"},
    "gptq, 3 bits": {"int4_g32_zeros"},
    "gptq v2": {"int4_g32"},
    "gptq v2, 2 bits": {"int4_g16_zeros"},
    "auto-round": {"int4_g32"},
    "auto-round, own packing": {"int4_g32_zeros"},
    "auto-round, awq": {"int4_g32_zeros"},
}
"""The others are of plain numbers in any case."""


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept_means_what_is_dequantised_at_load(name, make_model):
    """Guards every layout against scales, zero points or inputs of another row, in merged projections and alone."""
    made = make_model("llama", **(WIDE if "128" in name or name == "modelopt, blocks" else SIZES))
    quantise(made, FORMATS[name])
    config = ModelConfig.from_folder(made.folder)
    plain, kept = (
        load_weights(config, made.folder, torch.float32, pack=False, keep_quantised=keep) for keep in (False, True)
    )
    assert {linear.weight_format for linear in kept.linears} - {"dense"} == KEPT.get(name, set())
    assert_equal(kept, plain)


def assert_equal(kept: Weights, plain: Weights) -> None:
    for ours, theirs in zip(kept.linears, plain.linears, strict=True):
        weight = ours.weight if ours.weight_format == "dense" else ours.dequantised(torch.float32)
        assert torch.equal(weight, theirs.weight), ours.weight_format


@pytest.mark.parametrize("name", ["fp8, static", "fp8, powers of two", "gptq, zero points", "gptq, desc_act", "awq"])
def test_ranks_keep_what_they_would_dequantise(name, make_model):
    """Guards a cut by rank of scales, zero points and packed codes, and of what cannot be cut."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS[name])
    config = ModelConfig.from_folder(made.folder)
    for rank in (Rank(0, 2), Rank(1, 2)):
        plain, kept = (
            load_weights(config, made.folder, torch.float32, pack=False, rank=rank, keep_quantised=keep)
            for keep in (False, True)
        )
        assert_equal(kept, plain)


WORDS = [name for name in FORMATS if name.startswith(("pack-quantized", "awq", "gptq", "auto-round"))]


@pytest.mark.parametrize("name", WORDS)
def test_a_rank_unpacks_its_part_of_words_alone(name, make_model, monkeypatch):
    """Guards words, zero points and groups of another rank where parts end inside a word or a group, and a rank that
    brings all words to its device for a part of them."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS[name])
    config, moved = ModelConfig.from_folder(made.folder), weights._moved
    numbers = []

    def counted(tensors, place):
        numbers.append(sum(tensor.numel() for tensor in tensors.values()))
        return moved(tensors, place)

    monkeypatch.setattr(weights, "_moved", counted)

    def load(rank: Rank) -> tuple[Weights, int]:
        numbers.clear()
        return load_weights(config, made.folder, torch.float32, pack=False, rank=rank), sum(numbers)

    ranks = [load(Rank(index, 2)) for index in range(2)]
    for layout, found in LAYOUTS.items():
        monkeypatch.setitem(LAYOUTS, layout, found._replace(axes=()))
    for index, (part, num_moved) in enumerate(ranks):
        expected, all_numbers = load(Rank(index, 2))
        assert_equal(part, expected)
        assert num_moved < (0.95 if "desc_act" in name or "actorder" in name else 0.7) * all_numbers


def fp8(outputs: int, inputs: int, per_scale: tuple[int, int], **fields) -> QuantizedWeight:
    grid = -(-outputs // per_scale[0]), -(-inputs // per_scale[1])
    codes = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    return QuantizedWeight(codes, torch.rand(grid) + 0.5, *per_scale, **fields)


@pytest.mark.parametrize(
    ("sizes", "inputs", "rank", "expected"),
    [
        ((256, 128, 128), WeightCut.whole(256), 1, (128, 128)),
        ((576,), WeightCut.whole(256), 1, (128, 128)),  # the last block has 64 rows
        ((384, 384), WeightCut.whole(256), 2, (64, 128)),
        ((384,), WeightCut(512, range(256, 512)), 1, (128, 128)),
    ],
)
def test_blocks_are_split_no_further_than_needed(sizes, inputs, rank, expected):
    """Guards the format that kernels are chosen by: only rows that begin inside a block make blocks smaller."""
    forms = [fp8(size, inputs.total, (128, 128)) for size in sizes]
    cuts = [WeightCut(size, range((rank - 1) * (size // rank), size // rank * rank)) for size in sizes]
    found = keep_quantised([KeptPart(*each) for each in zip(forms, cuts, strict=True)], inputs, None, "cpu")
    assert found is not None
    linear, places = found
    for place, form in zip(places, forms, strict=True):
        place.fill(form)
    assert (linear.outputs_per_scale, linear.inputs_per_scale) == expected
    target = torch.empty(linear.num_outputs, linear.num_inputs)
    for form, cut, part in zip(forms, cuts, target.split([len(cut.part) for cut in cuts]), strict=True):
        form.dequantise(part, cut.part, inputs.part)
    assert torch.equal(linear.dequantised(torch.float32), target)


def test_a_rank_that_would_cut_a_block_of_inputs_gets_plain_numbers():
    """Guards against scales of the neighbour's inputs."""
    part = KeptPart(fp8(256, 384, (128, 128)), WeightCut.whole(256))
    assert keep_quantised([part], WeightCut(384, range(192, 384)), None, "cpu") is None


def test_projections_with_inputs_in_several_orders_get_plain_numbers():
    """Guards act-order: one product has one order of its inputs."""

    def part(seed: int) -> KeptPart:
        groups = torch.arange(64).remainder(2)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
        codes = torch.zeros(8, 64, dtype=torch.uint8)
        scales, zeros = torch.ones(8, 2), torch.zeros(8, 2, dtype=torch.int16)
        return KeptPart(QuantizedWeight(codes, scales, 1, 32, zeros, groups, bits=4), WeightCut.whole(8))

    assert keep_quantised([part(1), part(2)], WeightCut.whole(64), None, "cpu") is None
    assert keep_quantised([part(1), part(1)], WeightCut.whole(64), None, "cpu") is not None


def test_codes_of_8_bits_stay_in_the_file():
    """Guards against a rank that brings all of a file's codes to its device for a part of them."""
    form = QuantizedWeight(torch.zeros(8, 256, dtype=torch.int8), torch.ones(8, 1), 1, 256)
    kept = keep_quantised([KeptPart(form, WeightCut(8, range(4, 8)))], WeightCut.whole(256), None, "meta")
    assert kept is not None
    stored = {"weight": form.codes, "weight_scale": form.scales}
    moved = weights._moved(stored, kept[1][0])
    assert moved["weight"] is form.codes and moved["weight_scale"].is_meta
    plain = weights._moved(stored, PlainPlace(torch.empty(4, 256, device="meta"), (WeightCut.whole(8),)))
    assert plain["weight"].is_meta, "it is dequantised there"
