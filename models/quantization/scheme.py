"""What a folder says of its quantised weights: the method, and the sizes that tensors alone do not tell. No torch.

Which modules are quantised is read off the tensors, not here: lists of ignored modules are names, suffixes or patterns
by method, and a module has either its quantised tensors or a plain weight. Activations stay as they are, so that what a
method says of them is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from baton.models.folder import Json, JsonObject
from baton.models.quantization.recipe import Recipe
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt

CONFIG_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Of folders whose config.json says nothing: written by AutoGPTQ, AutoAWQ and ModelOpt."""
MAX_SIDE = 1 << 22
OLD_BLOCK = re.compile(r"(\d{1,7})x(\d{1,7})")
WHOLE_ROW = -1
"""A group size: all inputs of an output share a scale."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the quantised weights of a checkpoint are read; width and group may differ by module, as shapes tell."""

    method: str
    """quant_method, as config.json names it."""
    layouts: tuple[str, ...]
    """Keys of models.quantization.layouts.LAYOUTS."""
    bits: tuple[int, ...] = (8,)
    """Widths that packed integers may have."""
    group_sizes: tuple[int, ...] = (WHOLE_ROW,)
    """Inputs that may share a scale, where there are several groups."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, where scales are a grid."""
    zeros_less_one: bool = False
    """Stored zero points are one less than they are."""
    needs_zeros: bool = False
    """A weight without zero points is broken, though its layout allows it."""
    recipe: Recipe | None = None
    """For random weights in place of the folder's; None: plain ones."""


def read_quantization(config: JsonObject, folder: Path) -> Quantization | None:
    """What config.json or a file beside it says; None: nothing. SettingsError for what cannot be served."""
    for key in CONFIG_KEYS:
        found = config.child(key)
        if found is not None:
            return _read(found, "compressed-tensors" if key == "compression_config" else None)
    for name, method in zip(SIDE_FILES, ("gptq", "awq", "modelopt"), strict=True):
        if (folder / name).exists():
            beside = JsonObject.from_file(folder / name)
            return _read((beside.child("quantization") if method == "modelopt" else None) or beside, method)
    return None


def _read(found: JsonObject, default_method: str | None) -> Quantization:
    method = found.text("quant_method", default_method)
    if method not in METHODS:
        raise _unsupported(found, f"quant_method {excerpt(method, 80)!r}", METHODS)
    return METHODS[method](found)


def _fp8(found: JsonObject) -> Quantization:
    _require(found, "activation_scheme", ("dynamic", "static"))
    _require(found, "fmt", ("e4m3", "float8_e4m3fn"))
    block = _block(found, "weight_block_size")
    return Quantization("fp8", ("scaled",), block=block, recipe=Recipe("fp8", block))


def _fbgemm_fp8(found: JsonObject) -> Quantization:
    return Quantization("fbgemm_fp8", ("scaled",), recipe=Recipe("fp8"))


def _modelopt(found: JsonObject) -> Quantization:
    algorithm = _require(found, "quant_algo", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"))
    block = (128, 128) if algorithm == "FP8_PB_WO" else None
    return Quantization("modelopt", ("scaled",), block=block, recipe=Recipe("fp8", block))


def _compressed(found: JsonObject) -> Quantization:
    _require(found, "format", COMPRESSED_FORMATS)
    sparsity, transform = found.child("sparsity_config"), found.child("transform_config")
    if sparsity is not None and sparsity.has("format"):
        _require(sparsity, "format", ("dense",))
    if transform is not None and transform.fields.get("config_groups"):
        raise SettingsError(f"{transform.where}: transforms of activations are not supported")
    groups, named = list(_children(found, "config_groups")), found.child("config_groups")
    if named is not None and len(groups) < len(named.fields):
        raise found.wrong("config_groups", "an object of objects")
    for group in groups:
        _require(group, "format", COMPRESSED_FORMATS)
    weights = [each for each in (group.child("weights") for group in groups) if each is not None]
    for each in weights:
        kind = _require(each, "type", ("int", "float"))
        _require(each, "strategy", ("tensor", "channel", "group", "block"))
        if kind == "float" and each.integer("num_bits", 8) != 8:
            raise each.wrong("num_bits", "8 for floats")
    blocks = {block for each in weights if (block := _block(each, "block_structure")) is not None}
    if len(blocks) > 1:
        raise SettingsError(f"{found.where}: several sizes of blocks are not supported")
    return Quantization(
        "compressed-tensors",
        ("packed", "scaled"),
        bits=_distinct(each.integer("num_bits", 8, least=2, most=8) for each in weights),
        group_sizes=_distinct(_group_size(each) for each in weights),
        block=next(iter(blocks), None),
        needs_zeros=bool(weights) and not any(each.flag("symmetric", True) for each in weights),
        recipe=_compressed_recipe(weights[0]) if weights else None,
    )


def _compressed_recipe(weights: JsonObject) -> Recipe | None:
    symmetric = weights.flag("symmetric", True)
    if weights.text("type", "int") == "float":
        return Recipe("fp8", _block(weights, "block_structure"))
    if weights.integer("num_bits", 8) == 8 and symmetric:
        return Recipe("int8")
    ordered = weights.fields.get("actorder") == "group"
    return _int4_recipe(weights.integer("num_bits", 8), _group_size(weights), not symmetric, ordered)


def _int4_recipe(bits: int, group_size: int, zeros: bool, ordered: bool = False) -> Recipe | None:
    if bits > 4:
        return None
    return Recipe("int4", None if group_size == WHOLE_ROW else (1, group_size), zeros, ordered)


def _awq(found: JsonObject) -> Quantization:
    _require(found, "version", ("gemm", "GEMM"))
    _require(found, "checkpoint_format", ("gemm",))
    bits = found.integer("bits" if found.has("bits") else "w_bit", 4)
    if bits != 4:
        raise _unsupported(found, f"AWQ of {bits} bits", ("4",))
    group_size = _group_size(found, "group_size" if found.has("group_size") else "q_group_size", 128)
    recipe = _int4_recipe(4, group_size, found.flag("zero_point", True))
    return Quantization("awq", ("awq",), bits=(4,), group_sizes=(group_size,), recipe=recipe)


def _gptq(found: JsonObject) -> Quantization:
    key = "checkpoint_format" if found.has("checkpoint_format") else "format"
    version = _require(found, key, ("gptq", "gptq_v2"))
    _require(found, "pack_dtype", ("int32",))
    if found.flag("is_marlin_format", False):
        raise _unsupported(found, "Marlin's order of weights", ("gptq", "gptq_v2"))
    parts = [found, *_children(found, "dynamic")]  # by modules; those to leave out have none of the keys
    recipe = _gptq_recipe(found, ordered=found.flag("desc_act", False))
    return Quantization("gptq", ("gptq",), *_widths(parts), zeros_less_one=version != "gptq_v2", recipe=recipe)


def _auto_round(found: JsonObject) -> Quantization:
    key = "packing_format" if found.has("packing_format") else "backend"
    packing = found.text(key, "auto_round:auto_gptq")
    _require(found, "data_type", ("int",))
    if found.integer("act_bits", 16) < 16:
        raise found.wrong("act_bits", "16 or more")
    if not packing.startswith("auto_round") or any(word in packing for word in ("fp8", "llm_compressor", "fake")):
        raise _unsupported(found, f"{key} {excerpt(packing, 80)!r}", AUTO_ROUND_PACKINGS)
    if "awq" in packing:
        bits, group_sizes = _widths([found, *_children(found, "extra_config")])
        if bits != (4,):
            raise _unsupported(found, "AWQ of other than 4 bits", ("4",))
        return Quantization("auto-round", ("awq",), bits, group_sizes, recipe=_gptq_recipe(found))
    # The library's two packings of GPTQ's tensors: only that of AutoGPTQ takes one from zero points.
    less_one = "gptq" in packing and "gptqmodel" not in packing
    widths = _widths([found, *_children(found, "extra_config")])
    return Quantization("auto-round", ("gptq",), *widths, zeros_less_one=less_one, recipe=_gptq_recipe(found))


def _mxfp4(found: JsonObject) -> Quantization:
    return Quantization("mxfp4", ("mxfp4",), bits=(4,), group_sizes=(32,))


def _gptq_recipe(found: JsonObject, ordered: bool = False) -> Recipe | None:
    return _int4_recipe(found.integer("bits"), _group_size(found), not found.flag("sym", True), ordered)


METHODS: dict[str, Callable[[JsonObject], Quantization]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "mxfp4": _mxfp4,
}
COMPRESSED_FORMATS = (
    *("float-quantized", "int-quantized", "pack-quantized", "naive-quantized"),
    *("mixed-precision", "dense"),
)
AUTO_ROUND_PACKINGS = ("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq")
PACKED_BITS = (2, 3, 4, 8)
"""Of GPTQ's tensors."""


def _require(found: JsonObject, key: str, known: tuple[str, ...]) -> str:
    """The text under `key`, one of the known; the first of them where it is absent."""
    value = found.text(key, known[0])
    if value not in known:
        raise _unsupported(found, f"{key} {excerpt(value, 80)!r}", known)
    return value


def _unsupported(found: JsonObject, what: str, known: Iterable[str]) -> SettingsError:
    return SettingsError(
        f"{found.where}: quantised weights with {what} are not supported; supported: {', '.join(known)}"
    )


def _widths(parts: list[JsonObject]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits and group sizes of GPTQ's tensors, of the whole and of modules that differ."""
    bits = _distinct(part.integer("bits", least=2, most=16) for part in parts if part is parts[0] or part.has("bits"))
    packed = tuple(width for width in bits if width != 16)  # auto-round writes a module of 16 bits as a plain weight
    if not set(packed) <= set(PACKED_BITS):
        raise _unsupported(parts[0], f"bits {', '.join(map(str, packed))}", tuple(map(str, PACKED_BITS)))
    sizes = _distinct(_group_size(part) for part in parts if part is parts[0] or part.has("group_size"))
    return packed, sizes


def _group_size(found: JsonObject, key: str = "group_size", default: int = WHOLE_ROW) -> int:
    size = found.integer(key, default, least=WHOLE_ROW, most=MAX_SIDE)
    if size == 0:
        raise found.wrong(key, "-1 or more than 0")
    return size


def _block(found: JsonObject, key: str) -> tuple[int, int] | None:
    """Outputs and inputs of a block: [128, 128], in old files "128x128"."""
    value = found.fields.get(key)
    if value is None:
        return None
    match = OLD_BLOCK.fullmatch(value) if isinstance(value, str) else None
    sides = [int(side) for side in match.groups()] if match else value
    if isinstance(sides, list) and len(sides) == 2:
        outputs, inputs = sides
        if _is_side(outputs) and _is_side(inputs):
            return outputs, inputs
    raise found.wrong(key, "two whole numbers above zero")


def _is_side(value: Json) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def _children(found: JsonObject, key: str) -> Iterator[JsonObject]:
    """The objects under the names of the object `key`; names without an object say nothing."""
    parent = found.child(key)
    for name, value in parent.fields.items() if parent is not None else ():
        if isinstance(value, dict):
            yield JsonObject(f"{found.where}: {key}: {excerpt(name, 80)}", value)


def _distinct(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))
