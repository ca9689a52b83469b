"""How checkpoints lay out the tensors of a quantised module: a table of layouts, each a function from them to a
QuantizedWeight.

Whether the tensors of a module fit is known before any is read: the same functions run on tensors of the meta device,
which have a type and a shape and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from baton.models.checkpoint import Checkpoint, StoredTensor, TensorForm
from baton.models.quantization.cuts import Axes, Axis, WeightWindow, cut
from baton.models.quantization.scheme import Quantization
from baton.models.quantization.weight import QuantizedWeight, unpack
from baton.node.errors import SettingsError

Tensors = Mapping[str, torch.Tensor]
"""Of one module, by the end of their names."""

CODES = "weight"
"""The role of codes of one byte, which no layout changes."""
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Of safetensors; no tensor that is read here has another."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
INTEGERS = (torch.int32, torch.int64)
WORDS = (torch.int32,)


class CodeLayout(NamedTuple):
    """Which tensors a quantised module has."""

    marker: str
    """The one that a plain module has not, or has in another type."""
    needed: tuple[tuple[str, ...], ...]
    """Besides; each by one of several names."""
    optional: tuple[str, ...]
    read: Callable[[Tensors, int, int, Quantization], QuantizedWeight]
    """Takes also N, K. SettingsError for a type or shape that does not fit, and for numbers that cannot be."""
    stacked: bool = False
    """Of tensors with all experts of a layer, [experts, K, outputs] where they are plain; N: outputs of all."""
    axes: Axes = ()
    """Where codes lie in words; else parts are taken of what was read."""


class QuantizedSource(NamedTuple):
    """A quantised weight of a checkpoint."""

    where: str
    """Names it in errors."""
    tensors: Mapping[str, StoredTensor]
    layout: CodeLayout
    shape: tuple[int, int]
    quantization: Quantization

    @property
    def groups_of_inputs(self) -> StoredTensor | None:
        """The tensor that says which group an input is in, if there is one."""
        return next((self.tensors[role] for role in GROUPS_OF_INPUTS if role in self.tensors), None)

    def form(self, checkpoint: Checkpoint, groups_of_inputs: torch.Tensor | None = None) -> QuantizedWeight:
        """Its sizes and types, without numbers but for the groups of inputs, if they are given; raises as `read`."""
        forms = tuple((role, _known(checkpoint, stored, self.where)) for role, stored in self.tensors.items())
        try:
            made = _form(self.layout, forms, self.shape, self.quantization)
            if groups_of_inputs is None:
                return made
            role = next(role for role in GROUPS_OF_INPUTS if role in self.tensors)
            groups = _group_of_input({role: groups_of_inputs}, role, self.shape[1], made.scales.shape[1])
            return replace(made, group_of_input=groups)
        except SettingsError as error:
            raise SettingsError(f"{self.where}: {error}") from None

    def cut(
        self, tensors: Tensors, form: QuantizedWeight, outputs: range, inputs: range
    ) -> tuple[QuantizedSource, WeightWindow, Tensors]:
        """The source, and the tensors, of a part of the weight with at least these outputs and inputs; `tensors` hold
        all of it, in this form. Of a layout without axes the part is all."""
        if not self.layout.axes:
            return self, WeightWindow(range(self.shape[0]), range(self.shape[1])), tensors
        window, found = cut(tensors, self.layout.axes, form, outputs, inputs)
        return self._replace(shape=window.shape), window, found

    def read(self, tensors: Tensors) -> QuantizedWeight:
        """What its tensors hold; SettingsError if they do not fit each other or the weight."""
        try:
            return self.layout.read(tensors, *self.shape, self.quantization)
        except SettingsError as error:
            raise SettingsError(f"{self.where}: {error}") from None


def find_quantized(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], quantization: Quantization
) -> QuantizedSource | None:
    """The tensors that hold the weight `name`; None if it is not quantised. SettingsError if they cannot be read."""
    stacked = len(shape) == 3
    if not stacked and (len(shape) != 2 or not name.endswith("weight")):
        return None
    outputs, inputs = (shape[0] * shape[2], shape[1]) if stacked else shape
    module, where = name.removesuffix("weight"), f"{checkpoint.folder}: {name}, quantised by {quantization.method}"
    for layout in (found for each in quantization.layouts if (found := LAYOUTS[each]).stacked == stacked):
        marker = checkpoint.find(module + layout.marker)
        if marker is not None and not checkpoint.forms[marker.name].is_floating_point:
            tensors = {layout.marker: marker, **_companions(checkpoint, module, layout, quantization, where)}
            source = QuantizedSource(where, tensors, layout, (outputs, inputs), quantization)
            source.form(checkpoint)
            return source
    return None


def _companions(
    checkpoint: Checkpoint, module: str, layout: CodeLayout, quantization: Quantization, where: str
) -> dict[str, StoredTensor]:
    """The tensors beside the marker."""
    tensors: dict[str, StoredTensor] = {}
    for names in (*layout.needed, *((name,) for name in layout.optional)):
        found = [(name, stored) for name in names if (stored := checkpoint.find(module + name)) is not None]
        tensors.update(found[:1])
        if not found and (names in layout.needed or (names == (ZEROS,) and quantization.needs_zeros)):
            raise SettingsError(f"{where}: tensor {module}{' or '.join(names)} is missing")
    return tensors


def _known(checkpoint: Checkpoint, stored: StoredTensor, where: str) -> TensorForm:
    form = checkpoint.forms[stored.name]
    if form.dtype not in TYPES:
        raise SettingsError(f"{where}: tensor {stored.name} is {form.dtype}, which no method here stores")
    return form


@lru_cache(maxsize=256)
def _form(
    layout: CodeLayout, forms: tuple[tuple[str, TensorForm], ...], shape: tuple[int, int], quantization: Quantization
) -> QuantizedWeight:
    """What tensors of these forms hold, without numbers. Models with experts have many thousands of few forms, and
    operations on tensors without numbers take milliseconds."""
    tensors = {role: torch.empty(form.shape, dtype=TYPES[form.dtype], device="meta") for role, form in forms}
    return layout.read(tensors, *shape, quantization)


def _scaled(tensors: Tensors, outputs: int, inputs: int, quantization: Quantization) -> QuantizedWeight:
    """One byte a weight: FP8 of all methods, and INT8 of compressed-tensors. Scales are one, one an output, one a run
    of inputs, or a grid of blocks; the shape says which."""
    codes = tensors["weight"]
    _expect(tensors, "weight", (torch.float8_e4m3fn, torch.int8), outputs, inputs)
    role = next(name for name in SCALES if name in tensors)
    scales = tensors[role]
    form = tuple(scales.shape)
    if scales.numel() == 1:
        per_scale = (outputs, inputs)
    elif form in ((outputs,), (outputs, 1)):
        per_scale = (1, inputs)
    elif quantization.block is not None and form in _grid_forms(outputs, inputs, quantization.block):
        per_scale = quantization.block
    elif len(form) == 2 and form[0] == outputs:
        per_scale = (1, _inputs_per_scale(inputs, form[1], quantization))
    else:
        grid = f", or {list(_grid(outputs, inputs, quantization.block))}" if quantization.block else ""
        raise SettingsError(f"{role} is {list(form)}, expected one scale, {[outputs, 1]}{grid}")
    grid_shape = _grid(outputs, inputs, per_scale)
    zeros = tensors.get(ZEROS) if codes.dtype == torch.int8 else None  # floats are symmetric
    if zeros is not None:
        _expect(tensors, ZEROS, (torch.int8,), *form)
        zeros = zeros.reshape(grid_shape).to(torch.int16)
    return QuantizedWeight(codes, _scales(tensors, role, *form).reshape(grid_shape), *per_scale, zeros)


def _packed(tensors: Tensors, outputs: int, inputs: int, quantization: Quantization) -> QuantizedWeight:
    """compressed-tensors' pack-quantized: rows of codes along the inputs, zero points along the outputs; both with half
    their range added."""
    words = tensors["weight_packed"]
    bits = _bits(_size(words, -1), inputs, quantization)
    _expect(tensors, "weight_packed", WORDS, outputs, _num_words(inputs, bits))
    num_groups = _size(tensors["weight_scale"], -1)
    half, zeros = 1 << bits - 1, None
    if ZEROS in tensors:
        _expect(tensors, ZEROS, WORDS, _num_words(outputs, bits), num_groups)
        zeros = unpack(tensors[ZEROS].T, bits, outputs).T.to(torch.int16) - half
    return QuantizedWeight(
        (unpack(words, bits, inputs) - half).view(torch.int8),  # bytes wrap, and so do these
        _scales(tensors, "weight_scale", outputs, num_groups),
        1,
        _inputs_per_scale(inputs, num_groups, quantization),
        zeros,
        _group_of_input(tensors, "weight_g_idx", inputs, num_groups),
        bits,
        tensors["weight_scale"].dtype,
    )


def _awq(tensors: Tensors, outputs: int, inputs: int, quantization: Quantization) -> QuantizedWeight:
    """AutoAWQ's gemm: words of eight outputs, first the four even ones, then the odd ones."""
    num_groups = _size(tensors["scales"], 0)
    if outputs % 8:
        raise SettingsError(f"{outputs} outputs are no whole words of 8")
    _expect(tensors, "qweight", WORDS, inputs, outputs // 8)
    _expect(tensors, "qzeros", WORDS, num_groups, outputs // 8)

    def ordered(words: torch.Tensor) -> torch.Tensor:  # [R, N / 8] -> [N, R]
        return unpack(words, 4, outputs).unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1).T.contiguous()

    return QuantizedWeight(
        ordered(tensors["qweight"]),
        _scales(tensors, "scales", num_groups, outputs).T,
        1,
        _inputs_per_scale(inputs, num_groups, quantization),
        ordered(tensors["qzeros"]).to(torch.int16),
        bits=4,
        scale_dtype=tensors["scales"].dtype,
    )


def _gptq(tensors: Tensors, outputs: int, inputs: int, quantization: Quantization) -> QuantizedWeight:
    """AutoGPTQ's and GPTQModel's: codes along the inputs, zero points along the outputs. With `desc_act` the group of
    an input is in g_idx."""
    words, num_groups = tensors["qweight"], _size(tensors["scales"], 0)
    bits = _bits(_size(words, 0), inputs, quantization)
    _expect(tensors, "qweight", WORDS, _num_words(inputs, bits), outputs)
    _expect(tensors, "qzeros", WORDS, num_groups, _num_words(outputs, bits))
    return QuantizedWeight(
        unpack(words.T, bits, inputs),
        _scales(tensors, "scales", num_groups, outputs).T,
        1,
        _inputs_per_scale(inputs, num_groups, quantization),
        _gptq_zeros(tensors["qzeros"], bits, outputs, quantization.zeros_less_one).T.to(torch.int16),
        _group_of_input(tensors, "g_idx", inputs, num_groups),
        bits,
        tensors["scales"].dtype,
    )


def _gptq_zeros(words: torch.Tensor, bits: int, outputs: int, less_one: bool) -> torch.Tensor:
    """[G, N]. GPTQModel takes one from all zero points of a word at once, borrowing from the next where one is 0; what
    is added here, with the same carry, gives back what it had. A zero point of three bits may lie in two words: there
    it counts each by itself."""
    if less_one and 32 % bits == 0:
        words = words + sum(1 << shift for shift in range(0, 32, bits))
    zeros = unpack(words, bits, outputs)
    return zeros + 1 & (1 << bits) - 1 if less_one and 32 % bits else zeros


def _mxfp4(tensors: Tensors, outputs: int, inputs: int, quantization: Quantization) -> QuantizedWeight:
    """Open Compute's MX format of 4 bits, as gpt-oss has it: blocks of 32 inputs with two codes a byte, the lower half
    first, and a power of two a block. All codes are numbers of e4m3 too."""
    blocks, scales = tensors["_blocks"], tensors["_scales"]
    count = _size(blocks, 0)
    of_one, groups = outputs // max(count, 1), -(-inputs // MXFP4_INPUTS)
    _expect(tensors, "_blocks", (torch.uint8,), count, of_one, groups, MXFP4_INPUTS // 2)
    _expect(tensors, "_scales", (torch.uint8,), count, of_one, groups)
    if inputs % MXFP4_INPUTS or count * of_one != outputs:
        raise SettingsError(f"_blocks is {list(blocks.shape)}, expected {outputs} outputs of {inputs} inputs")
    if blocks.is_meta:
        codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device="meta")
    else:
        pairs = [(MXFP4_CODES[byte & 15], MXFP4_CODES[byte >> 4]) for byte in range(256)]
        known = torch.tensor(pairs, device=blocks.device).to(torch.float8_e4m3fn).view(torch.int16).flatten()
        codes = torch.cat([known[each.flatten().int()] for each in blocks]).view(torch.float8_e4m3fn)
        codes = codes.view(outputs, inputs)
    powers = scales.view(torch.float8_e8m0fnu).to(torch.float32).view(outputs, groups)
    if not powers.is_meta and not bool(powers.isfinite().all()):
        raise SettingsError("_scales has values that are no numbers")
    return QuantizedWeight(codes, powers, 1, MXFP4_INPUTS, bits=4, scale_dtype=torch.float8_e8m0fnu)


MXFP4_INPUTS = 32
MXFP4_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALES = ("weight_scale_inv", "weight_scale")
ZEROS = "weight_zero_point"
GROUPS_OF_INPUTS = ("g_idx", "weight_g_idx")
_OUTPUTS, _INPUTS, _GROUPS = Axis.OUTPUTS, Axis.INPUTS, Axis.GROUPS
_OUTPUT_WORDS, _INPUT_WORDS, _GROUP_OF_INPUT = Axis.OUTPUT_WORDS, Axis.INPUT_WORDS, Axis.GROUP_OF_INPUT
PACKED_AXES: Axes = (
    ("weight_packed", (_OUTPUTS, _INPUT_WORDS)),
    ("weight_scale", (_OUTPUTS, _GROUPS)),
    (ZEROS, (_OUTPUT_WORDS, _GROUPS)),
    ("weight_g_idx", (_GROUP_OF_INPUT,)),
)
OF_GROUPS: Axes = (("qzeros", (_GROUPS, _OUTPUT_WORDS)), ("scales", (_GROUPS, _OUTPUTS)))
AWQ_AXES: Axes = (*OF_GROUPS, ("qweight", (_INPUTS, _OUTPUT_WORDS)))
GPTQ_AXES: Axes = (*OF_GROUPS, ("qweight", (_INPUT_WORDS, _OUTPUTS)), ("g_idx", (_GROUP_OF_INPUT,)))
LAYOUTS = {
    "scaled": CodeLayout("weight", (SCALES,), (ZEROS,), _scaled),
    "packed": CodeLayout("weight_packed", (("weight_scale",),), (ZEROS, "weight_g_idx"), _packed, axes=PACKED_AXES),
    "awq": CodeLayout("qweight", (("qzeros",), ("scales",)), (), _awq, axes=AWQ_AXES),
    "mxfp4": CodeLayout("_blocks", (("_scales",),), (), _mxfp4, stacked=True),
    "gptq": CodeLayout("qweight", (("qzeros",), ("scales",)), ("g_idx",), _gptq, axes=GPTQ_AXES),
}


def _expect(tensors: Tensors, role: str, types: tuple[torch.dtype, ...], *shape: int) -> None:
    tensor = tensors[role]
    if tuple(tensor.shape) != shape or tensor.dtype not in types:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in types)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise SettingsError(f"{role} is {found}, expected {wanted} {list(shape)}")


def _scales(tensors: Tensors, role: str, *shape: int) -> torch.Tensor:
    """As float32. A scale that is no number would make every token of every answer the same."""
    _expect(tensors, role, FLOATS, *shape)
    scales = tensors[role].to(torch.float32)
    if not scales.is_meta and not bool(scales.isfinite().all()):
        raise SettingsError(f"{role} has values that are infinite or no numbers")
    return scales


def _group_of_input(tensors: Tensors, role: str, inputs: int, num_groups: int) -> torch.Tensor | None:
    """None where the tensor is absent, or filled with one number, as files have it whose groups are runs of inputs."""
    if role not in tensors:
        return None
    _expect(tensors, role, INTEGERS, inputs)
    groups = tensors[role].to(torch.int64)
    if groups.is_meta:
        return groups
    least, most = (int(each) for each in groups.aminmax())
    if least == most and least in (-1, 0):
        return None
    if least < 0 or most >= num_groups:
        raise SettingsError(f"{role} names groups {least} to {most} of {num_groups}")
    return groups


def _size(tensor: torch.Tensor, dimension: int) -> int:
    """0 of a tensor that has no dimensions, which then does not fit."""
    return tensor.shape[dimension] if tensor.dim() else 0


def _bits(num_words: int, count: int, quantization: Quantization) -> int:
    """The width of integers of which `count` fill so many words."""
    for bits in quantization.bits:
        if _num_words(count, bits) == num_words:
            return bits
    widths = " or ".join(str(bits) for bits in quantization.bits)
    raise SettingsError(f"{num_words} words of codes for {count} inputs, expected {widths} bits for each")


def _num_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _inputs_per_scale(inputs: int, num_groups: int, quantization: Quantization) -> int:
    """Of groups that are runs of inputs, the last of which may be shorter."""
    if num_groups == 1:
        return inputs
    found = [size for size in quantization.group_sizes if size > 0 and -(-inputs // size) == num_groups]
    if len(found) != 1:
        sizes = " or ".join(str(size) for size in quantization.group_sizes)
        raise SettingsError(f"{num_groups} scales for {inputs} inputs, expected groups of {sizes}")
    return found[0]


def _grid(outputs: int, inputs: int, per_scale: tuple[int, int]) -> tuple[int, int]:
    return -(-outputs // per_scale[0]), -(-inputs // per_scale[1])


def _grid_forms(outputs: int, inputs: int, per_scale: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the scales of blocks; the second is ModelOpt's."""
    rows, columns = _grid(outputs, inputs, per_scale)
    return (rows, columns), (rows, 1, columns, 1)
