"""Layouts of quantised tensors: bits against whole numbers of Python, and what does not fit is one clear sentence."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.models.config import ModelConfig
from baton.models.fingerprint import model_fingerprint
from baton.models.quantization.layouts import LAYOUTS, TYPES
from baton.models.quantization.scheme import Quantization
from baton.models.quantization.weight import QuantizedWeight, unpack
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.models.quantization import writers
from baton.tests.unit.models.quantization.test_tokens import SIZES, quantise, save
from baton.tests.unit.models.quantization.writers import E4M3, FORMATS, by_groups, runs

WHERE = "model.layers.1.mlp.up_proj"


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(1, 4), st.randoms(use_true_random=False))
def test_unpack_reads_the_bits_of_one_long_number(bits, count, num_rows, random):
    """Guards widths that cross bytes and words, and a last word that is not full."""
    rows = np.array([[random.randrange(1 << bits) for _ in range(count)] for _ in range(num_rows)])
    assert unpack(torch.from_numpy(writers.as_words(rows, bits)), bits, count).tolist() == rows.tolist()


def test_unpack_of_a_known_word():
    """Guards against a writer and a reader that agree on another order."""
    word = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)
    assert unpack(word, 4, 8).tolist() == [list(range(8)), [15] * 8]
    assert unpack(word, 2, 5).tolist() == [[0, 0, 1, 0, 2], [3] * 5]
    assert unpack(word, 8, 4).tolist() == [[0x10, 0x32, 0x54, 0x76], [255] * 4]


def test_awq_reads_the_order_of_its_words():
    """AutoAWQ packs so that a mask gives outputs 0 and 1, 2 and 3 ... as the halves of a word."""
    quantization = Quantization("awq", ("awq",), bits=(4,))
    outputs = [0, 2, 4, 6, 1, 3, 5, 7]  # by nibble, lowest first
    word = sum(output << 4 * nibble for nibble, output in enumerate(outputs))
    words = torch.tensor([[word]], dtype=torch.int64).to(torch.int32)
    tensors = {"qweight": words, "qzeros": torch.zeros_like(words), "scales": torch.ones(1, 8, dtype=torch.float16)}
    assert LAYOUTS["awq"].read(tensors, 8, 1, quantization).codes.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_of_0_are_borrowed_and_given_back(bits):
    """Guards against z + 1 by nibble: GPTQModel takes one from the word, so that a 0 changes its neighbour."""
    weight = np.abs(np.random.default_rng(1).standard_normal((32, 32))).astype(np.float32)
    weight[::3] -= 0.5
    tensors, meaning = writers.gptq(weight, bits=bits, size=8, symmetric=False)
    quantization = Quantization("gptq", ("gptq",), (bits,), (8,), zeros_less_one=True)
    read = LAYOUTS["gptq"].read(tensors, 32, 32, quantization)
    assert read.zeros is not None and {0} < set(read.zeros.flatten().tolist())
    assert dequantised(read).tolist() == meaning.tolist()


def dequantised(weight: QuantizedWeight) -> torch.Tensor:
    outputs, inputs = weight.codes.shape
    target = torch.empty(outputs, inputs)
    weight.dequantise(target, range(outputs), range(inputs))
    return target


def test_every_byte_of_fp8():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    found = dequantised(QuantizedWeight(codes, torch.ones(1, 1), 1, 256))
    np.testing.assert_array_equal(found.numpy()[0], E4M3)


def test_parts_are_those_of_the_whole(monkeypatch):
    """Guards rows that are computed a few at a time, from any first row and column."""
    made = by_groups(
        np.random.default_rng(2).standard_normal((30, 40)).astype(np.float32), runs(40, 16), 4, False, torch.float32
    )
    weight = QuantizedWeight(
        torch.tensor(made.codes, dtype=torch.uint8), torch.tensor(made.scales), 1, 16, torch.tensor(made.zeros).short()
    )
    monkeypatch.setattr("baton.models.quantization.weight.PART_ELEMENTS", 50)
    part = torch.empty(17, 21)
    weight.dequantise(part, range(11, 28), range(9, 30))
    assert part.tolist() == made.meaning[11:28, 9:30].tolist()


def with_value(value):
    def change(tensor):
        changed = tensor.float().reshape(-1)
        changed[-1] = value
        return changed.reshape(tensor.shape).to(tensor.dtype)

    return change


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "scales of NaN": ("fp8, static", "weight_scale", with_value(NAN), "weight_scale has values that are infinite or"),
    "scales of infinity": ("gptq", "scales", with_value(INF), "scales has values that are infinite or"),
    "a byte that is no power": (
        *("fp8, powers of two", "weight_scale_inv"),
        lambda tensor: torch.full(tensor.shape, 255, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "weight_scale_inv has values that are infinite or",
    ),
    "a grid of other blocks": (
        *("fp8, blocks that do not divide", "weight_scale_inv", lambda t: t[:-1].clone()),
        "weight_scale_inv is [3, 2], expected one scale, [96, 1], or [4, 2]",
    ),
    "scales missing": (
        "fbgemm_fp8",
        "weight_scale",
        None,
        "tensor model.layers.1.mlp.up_proj.weight_scale_inv or weight_scale is missing",
    ),
    "integers as scales": (
        *("gptq", "scales", lambda tensor: tensor.to(torch.int32)),
        "scales is int32 [2, 96], expected float32 or float16 or bfloat16 or float8_e8m0fnu [2, 96]",
    ),
    "too many groups": ("awq", "scales", lambda t: t.repeat(2, 1), "qzeros is int32 [2, 12], expected int32 [4, 12]"),
    "groups of another size": (
        *("pack-quantized", "weight_scale", lambda t: t.repeat(1, 2)),
        "4 scales for 64 inputs, expected groups of 32",
    ),
    "zero points missing in gptq": ("gptq", "qzeros", None, "up_proj.qzeros is missing"),
    "zero points missing in awq": ("awq", "qzeros", None, "up_proj.qzeros is missing"),
    "zero points missing": ("pack-quantized, zero points", "weight_zero_point", None, "weight_zero_point is missing"),
    "zero points missing in int8": ("int-quantized, groups", "weight_zero_point", None, "weight_zero_point is missing"),
    "zero points of another shape": (
        *("pack-quantized, zero points", "weight_zero_point", lambda t: t[:-1].clone()),
        "weight_zero_point is int32 [11, 2], expected int32 [12, 2]",
    ),
    "codes of another width": (
        "gptq, 8 bits",
        "qweight",
        lambda t: t[::2].clone(),
        "8 words of codes for 64 inputs, expected 8 bits for each",
    ),
    "codes of another shape": ("awq", "qweight", lambda t: t[:-1].clone(), "expected int32 [64, 12]"),
    "codes of another type": (
        "gptq",
        "qweight",
        lambda t: t.to(torch.int64),
        "qweight is int64 [8, 96], expected int32",
    ),
    "a matrix too few": (
        "gptq",
        "qweight",
        lambda t: t[0].clone(),
        "96 words of codes for 64 inputs, expected 4 bits for each",
    ),
    "an order of inputs that is too long": ("gptq", "g_idx", lambda t: t.repeat(2), "g_idx is int32 [128], expected"),
    "groups that do not exist": ("gptq, desc_act", "g_idx", with_value(7), "g_idx names groups 0 to 7 of 2"),
    "e5m2": (
        *("fp8, static", "weight", lambda tensor: tensor.float().to(torch.float8_e5m2)),
        "tensor model.layers.1.mlp.up_proj.weight is F8_E5M2, which no method here stores",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_one_sentence(name, make_model):
    """Guards against an exception of torch in the middle of a load, and against weights that are silently wrong."""
    form, role, change, said = BROKEN[name]
    made = make_model("llama", **SIZES)
    tensors = quantise(made, FORMATS[form], shards=1)
    broken = tensors.pop(f"{WHERE}.{role}")
    if change is not None:
        tensors[f"{WHERE}.{role}"] = change(broken)
    save(made.folder, tensors)
    with pytest.raises(SettingsError, match=re.escape(said)) as raised:
        load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32)
    text = str(raised.value)
    assert f"{WHERE}.weight, quantised by " in text and text.isprintable() and len(text) < 400


forms = st.tuples(st.sampled_from(list(TYPES.values())), st.lists(st.integers(0, 12), max_size=4))
QUANTIZATIONS = [
    Quantization("fp8", ("scaled",), block=(8, 4)),
    Quantization("compressed-tensors", ("packed", "scaled"), (3, 4, 8), (4, 8)),
    Quantization("awq", ("awq",), (4,), (4,)),
    Quantization("gptq", ("gptq",), (2, 3, 4, 8), (4, -1), zeros_less_one=True),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(QUANTIZATIONS), st.integers(1, 12), st.integers(1, 12), st.data())
def test_tensors_of_any_form_are_read_or_refused(quantization, outputs, inputs, data):
    """Guards against any exception but SettingsError for what a header may say."""
    for layout in (LAYOUTS[name] for name in quantization.layouts):
        roles = [layout.marker, *(names[0] for names in layout.needed), *layout.optional]
        drawn = {role: data.draw(forms) for role in roles}
        tensors = {role: torch.empty(shape, dtype=dtype, device="meta") for role, (dtype, shape) in drawn.items()}
        try:
            read = layout.read(tensors, outputs, inputs, quantization)
        except SettingsError as error:
            assert str(error).isprintable()
            continue
        assert read.codes.shape == (outputs, inputs)


def test_shapes_are_checked_before_any_tensor_is_read(make_model, monkeypatch):
    """Guards against minutes of reading before an error that the headers tell."""
    made = make_model("llama", **SIZES)
    tensors = quantise(made, FORMATS["gptq"], shards=1)
    tensors[f"{WHERE}.qzeros"] = tensors[f"{WHERE}.qzeros"][:, 1:].clone()
    save(made.folder, tensors)
    monkeypatch.setattr("baton.models.sources.safe_open", None)
    with pytest.raises(SettingsError, match="qzeros is int32"):
        load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("gptq", "down_proj.weight is missing (14 of 21 are); tensors are there of quantised weights"),
        (
            "fp8, static",
            "is F8_E4M3 [64, 64], expected floating point [64, 64]; tensors are there of quantised weights",
        ),
    ],
)
def test_quantised_tensors_without_a_config_are_named(form, said, make_model, edit_config):
    """Guards against FP8 that is read without its scales, and against "is missing" for what is plainly there."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS[form])
    edit_config(made.folder, quantization_config=None)
    with pytest.raises(SettingsError, match=re.escape(said)):
        load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32)


@pytest.mark.parametrize(
    ("file", "content", "form"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, "gptq"),
        ("quantize_config.json", {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, "gptq v2"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, "modelopt"),
    ],
)
def test_files_beside_the_config(file, content, form, make_model, edit_config):
    """Guards old folders, and their identity: such a file decides what the same bytes of weights mean."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS[form])
    edit_config(made.folder, quantization_config=None)
    before = model_fingerprint(made.folder)
    (made.folder / file).write_text(json.dumps(content))
    weights = load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32, pack=False)
    assert torch.equal(weights.layers[1].mlp.down.weight, made.reference.model.layers[1].mlp.down_proj.weight)
    assert model_fingerprint(made.folder) != before
