"""What config.json may say of quantised weights: read, or refused by name in one sentence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.models.folder import JsonObject
from baton.models.quantization.layouts import LAYOUTS
from baton.models.quantization.recipe import Recipe
from baton.models.quantization.scheme import METHODS, Quantization, read_quantization
from baton.node.errors import SettingsError
from baton.tests.unit.models.quantization.writers import FP8, GPTQ, INT4, ROUND, compressed
from baton.tests.unit.models.test_hostile_folders import assert_is_one_sentence, json_values

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
PACKED = compressed("pack-quantized", **INT4)
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}


def read(folder, config):
    return read_quantization(JsonObject("config.json", {"quantization_config": config}), folder)


def test_no_config_is_no_quantisation(tmp_path):
    assert read(tmp_path, None) is None


def test_widths_of_modules_that_differ_are_known(tmp_path):
    """Guards files of mixed widths: shapes say which module has which, so that no pattern is run."""
    dynamic = {"+:.*(a+)+down": {"bits": 8, "group_size": 64}, "-:.*mlp.*": {}, "lm_head": None}
    found = read(tmp_path, GPTQ | {"dynamic": dynamic})
    recipe = Recipe("int4", (1, 32))
    assert found == Quantization("gptq", ("gptq",), (4, 8), (32, 64), zeros_less_one=True, recipe=recipe)
    extra = {"model.layers.0.mlp.down_proj": {"bits": 8}, "lm_head": {"bits": 16}}
    assert read(tmp_path, ROUND | {"extra_config": extra}).bits == (4, 8)
    groups = {"a": {"weights": INT4}, "b": {"weights": FLOAT}, "only inputs": {"weights": None}}
    found = read(tmp_path, PACKED | {"format": "mixed-precision", "config_groups": groups})
    assert (found.bits, found.group_sizes) == ((4, 8), (-1, 32))


def test_a_quantised_cache_alone_leaves_weights_plain(tmp_path):
    found = read(tmp_path, PACKED | {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert found is not None and not found.needs_zeros


def test_old_key_of_compressed_tensors(tmp_path):
    fields = {key: value for key, value in PACKED.items() if key != "quant_method"}
    found = read_quantization(JsonObject("config.json", {"compression_config": fields}), tmp_path)
    assert found is not None and found.method == "compressed-tensors"


REFUSED = [
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' are not supported; supported: fp8, fbgemm_fp8, "),
    ({"quant_method": "nvfp4"}, "quant_method 'nvfp4'"),
    ({"quant_method": "\x1b[31m"}, "quant_method"),
    ({}, "'quant_method' is missing"),
    (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
    (FP8 | {"weight_block_size": [128]}, "'weight_block_size' must be two whole numbers above zero"),
    (FP8 | {"weight_block_size": [128, 0]}, "'weight_block_size'"),
    (FP8 | {"weight_block_size": "128x" + "9" * 5000}, "'weight_block_size'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' are not supported; supported: FP8, "),
    (PACKED | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    (PACKED | {"format": "marlin-24"}, "format 'marlin-24'"),
    (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: .* format 'sparse-24-bitmask'"),
    (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, "transforms of activations are not supported"),
    (PACKED | {"config_groups": {"W4A16": ["Linear"]}}, "'config_groups' must be an object of objects"),
    (compressed("pack-quantized", **INT4 | {"strategy": "tensor_group"}), "strategy 'tensor_group'"),
    (compressed("float-quantized", **FLOAT | {"num_bits": 4}), "'num_bits' must be 8 for floats"),
    (compressed("pack-quantized", **INT4 | {"num_bits": 16}), "'num_bits' must be at most 8"),
    (compressed("pack-quantized", **INT4 | {"group_size": 0}), "'group_size' must be -1 or more than 0"),
    (AWQ | {"version": "gemv"}, "version 'gemv' are not supported; supported: gemm"),
    (AWQ | {"bits": 8}, "AWQ of 8 bits"),
    (GPTQ | {"bits": 5}, "bits 5 are not supported; supported: 2, 3, 4, 8"),
    (GPTQ | {"dynamic": {"+:a": {"bits": 6}}}, "bits 4, 6"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "Marlin's order"),
    (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ({"quant_method": "gptq"}, "'bits' is missing"),
    (ROUND | {"packing_format": "auto_round:fp8_static"}, "packing_format 'auto_round:fp8_static'"),
    (ROUND | {"packing_format": "auto_round:auto_awq", "bits": 3}, "AWQ of other than 4 bits"),
    (ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
    (ROUND | {"act_bits": 8}, "'act_bits' must be 16 or more"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_cannot_be_served_is_refused_by_name(tmp_path, config, said):
    with pytest.raises(SettingsError, match=said) as raised:
        read(tmp_path, config)
    assert_is_one_sentence(raised.value)


KEYS = [
    *("quant_method", "activation_scheme", "fmt", "weight_block_size", "quant_algo", "format", "config_groups", "bits"),
    *(
        "group_size",
        "dynamic",
        "extra_config",
        "packing_format",
        "backend",
        "data_type",
        "act_bits",
        "version",
        "w_bit",
    ),
    *("q_group_size", "checkpoint_format", "pack_dtype", "is_marlin_format", "sparsity_config", "transform_config"),
]
IN_GROUPS = ["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "format", "weights"]
groups = st.dictionaries(st.text(max_size=8), st.dictionaries(st.sampled_from(IN_GROUPS), json_values, max_size=5))
weights = st.dictionaries(st.sampled_from(IN_GROUPS), json_values, max_size=2).map(lambda edits: INT4 | edits)
values = json_values | groups | weights.map(lambda edited: {"\n": {"weights": edited}})
BASES = [
    FP8,
    AWQ,
    GPTQ,
    ROUND,
    PACKED,
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "fbgemm_fp8"},
]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(BASES), st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_any_config_is_read_or_refused(tmp_path_factory, base, edits):
    """Guards against any exception but SettingsError, and against sizes that no reader could work with."""
    try:
        found = read(tmp_path_factory.getbasetemp(), base | edits)
    except SettingsError as error:
        assert_is_one_sentence(error)
        return
    assert found is not None and found.method in METHODS and set(found.layouts) <= set(LAYOUTS)
    assert all(2 <= bits <= 8 for bits in found.bits)
    assert all(size == -1 or 0 < size < 1 << 23 for size in found.group_sizes)
    assert found.block is None or all(0 < side < 1 << 23 for side in found.block)
