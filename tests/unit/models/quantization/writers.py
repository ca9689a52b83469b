"""Writers of every format of quantised weights, and what each weight means: numpy and whole numbers, by the formats'
descriptions. They share no code with what is tested; nothing here knows baton.

A writer takes a weight [N, K] and gives its tensors, by the end of their names, with the weight that they stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

Written = tuple[dict[str, torch.Tensor], np.ndarray]
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each nibble of a word holds, lowest first."""


@dataclass(frozen=True)
class Format:
    config: dict
    write: Callable[[np.ndarray], Written]
    head: bool = False
    """The head and the embedding are quantised too, where the writer can."""


def as_words(rows: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] whole numbers -> [R, ceil(C * bits / 32)] int32: each row one long number, its first value lowest."""
    width = -(-rows.shape[1] * bits // 32)
    numbers = [sum(int(value) << bits * index for index, value in enumerate(row)) for row in rows]
    return np.stack([np.frombuffer(number.to_bytes(4 * width, "little"), "<i4") for number in numbers])


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    found = torch.from_numpy(np.array(array, order="C"))
    return found if dtype is None else found.to(dtype)


def rounded(scales: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return tensor(scales).to(dtype).float().numpy()


# ---- integers of up to 8 bits, by groups of inputs


@dataclass(frozen=True)
class Grouped:
    codes: np.ndarray  # [N, K] from 0
    zeros: np.ndarray  # [N, G]
    scales: np.ndarray  # [N, G]
    meaning: np.ndarray  # [N, K]


def by_groups(weight: np.ndarray, groups: np.ndarray, bits: int, symmetric: bool, dtype: torch.dtype) -> Grouped:
    """groups: of each input."""
    top, half = (1 << bits) - 1, 1 << bits - 1
    shape = len(weight), groups.max() + 1
    zeros, scales = np.full(shape, half), np.zeros(shape, np.float32)
    for row in range(shape[0]):
        for group in range(shape[1]):
            values = weight[row, groups == group]
            if symmetric:
                scales[row, group] = np.abs(values).max() / max(1, half - 1)
            else:
                low, high = min(0.0, values.min()), max(0.0, values.max())
                scales[row, group] = (high - low) / top
                zeros[row, group] = round(-low / scales[row, group])
    scales = rounded(scales, dtype)
    codes = np.clip(np.round(weight / scales[:, groups]) + zeros[:, groups], 0, top).astype(int)
    return Grouped(codes, zeros, scales, (codes - zeros[:, groups]).astype(np.float32) * scales[:, groups])


def runs(num_inputs: int, size: int) -> np.ndarray:
    return np.arange(num_inputs) // (num_inputs if size == -1 else size)


def by_importance(num_inputs: int, size: int) -> np.ndarray:
    """Groups as `desc_act` makes them: of inputs that were sorted by something."""
    groups = np.empty(num_inputs, int)
    groups[np.random.default_rng(num_inputs).permutation(num_inputs)] = runs(num_inputs, size)
    return groups


def gptq(weight, *, bits=4, size=32, symmetric=True, desc_act=False, g_idx=True, version=1) -> Written:
    groups = (by_importance if desc_act else runs)(weight.shape[1], size)
    made = by_groups(weight, groups, bits, symmetric, torch.float16)
    zeros = made.zeros.T
    if version == 1 and 32 % bits:
        zeros = zeros - 1 & (1 << bits) - 1
    words = as_words(zeros, bits)
    if version == 1 and 32 % bits == 0:  # taken from the whole word, as GPTQModel does
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = ((words.astype(np.int64) - ones) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    tensors = {
        "qweight": tensor(as_words(made.codes, bits).T),
        "qzeros": tensor(words),
        "scales": tensor(made.scales.T, torch.float16),
    }
    return tensors | ({"g_idx": tensor(groups.astype(np.int32))} if g_idx else {}), made.meaning


def awq(weight, *, size=32, symmetric=False) -> Written:
    made = by_groups(weight, runs(weight.shape[1], size), 4, symmetric, torch.float16)

    def packed(rows: np.ndarray) -> torch.Tensor:  # [R, N] -> [R, N / 8]
        order = [start + output for start in range(0, rows.shape[1], 8) for output in AWQ_NIBBLES]
        return tensor(as_words(rows[:, order], 4))

    tensors = {
        "qweight": packed(made.codes.T),
        "qzeros": packed(made.zeros.T),
        "scales": tensor(made.scales.T, torch.float16),
    }
    return tensors, made.meaning


def pack_quantized(weight, *, bits=4, size=32, symmetric=True, actorder=False) -> Written:
    """The offset of half the range, which the format adds to codes and zero points, is that of unsigned codes here."""
    groups = (by_importance if actorder else runs)(weight.shape[1], size)
    made = by_groups(weight, groups, bits, symmetric, torch.bfloat16)
    tensors = {
        "weight_packed": tensor(as_words(made.codes, bits)),
        "weight_scale": tensor(made.scales, torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = tensor(as_words(made.zeros.T, bits).T)
    if actorder:
        tensors["weight_g_idx"] = tensor(groups.astype(np.int32))
    return tensors, made.meaning


def int_quantized(weight, *, size=-1, symmetric=True) -> Written:
    made = by_groups(weight, runs(weight.shape[1], size), 8, symmetric, torch.float32)
    tensors = {"weight": tensor(made.codes - 128, torch.int8), "weight_scale": tensor(made.scales, torch.float32)}
    return tensors | ({} if symmetric else {"weight_zero_point": tensor(made.zeros - 128, torch.int8)}), made.meaning


# ---- FP8


def e4m3(byte: int) -> float:
    """What a byte of F8_E4M3 means."""
    exponent, mantissa, sign = byte >> 3 & 15, byte & 7, -1.0 if byte & 128 else 1.0
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(byte) for byte in range(256)], np.float32)


def fp8(
    weight: np.ndarray, block: tuple[int, int], powers_of_two: bool = False
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Codes, the scales of blocks, and what both mean."""
    rows, columns = (np.arange(side) // width for side, width in zip(weight.shape, block, strict=True))
    scales = np.zeros((rows.max() + 1, columns.max() + 1), np.float32)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            scales[row, column] = np.abs(weight[np.ix_(rows == row, columns == column)]).max() / 448
    if powers_of_two:
        scales = np.float32(2) ** np.ceil(np.log2(scales))
    spread = scales[rows][:, columns]
    codes = tensor(np.clip(weight / spread, -448, 448)).to(torch.float8_e4m3fn)
    return codes, scales, E4M3[codes.view(torch.uint8).numpy()] * spread


def fp8_tensor(weight, *, scale="weight_scale", extra=("input_scale",), form=()) -> Written:
    codes, scales, meaning = fp8(weight, weight.shape)
    extras = {name: torch.tensor(0.5) for name in extra}
    return {"weight": codes, scale: tensor(scales.reshape(form)), **extras}, meaning


def fp8_outputs(weight, *, extra=(), flat=False) -> Written:
    codes, scales, meaning = fp8(weight, (1, weight.shape[1]))
    extras = {name: torch.tensor(0.5) for name in extra}
    return {"weight": codes, "weight_scale": tensor(scales[:, 0] if flat else scales), **extras}, meaning


def fp8_block(weight, *, block=(128, 128), scale="weight_scale_inv", powers_of_two=False, four_sides=False) -> Written:
    codes, scales, meaning = fp8(weight, block, powers_of_two)
    stored = tensor(scales)
    if powers_of_two:
        stored = tensor((np.log2(scales) + 127).astype(np.uint8)).view(torch.float8_e8m0fnu)
    return {"weight": codes, scale: stored[:, None, :, None] if four_sides else stored}, meaning


# ---- all


def compressed(form: str, activations: dict | None = None, **weights: object) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
V2 = {"checkpoint_format": "gptq_v2"}

FORMATS = {
    "fp8, static": Format(FP8 | {"activation_scheme": "static"}, fp8_tensor),
    "fp8, names of transformers": Format(
        FP8, partial(fp8_tensor, scale="weight_scale_inv", extra=("activation_scale",), form=(1,))
    ),
    "fp8, blocks of 128": Format(FP8 | {"fmt": "e4m3", "weight_block_size": [128, 128]}, fp8_block),
    "fp8, blocks that do not divide": Format(FP8 | {"weight_block_size": [24, 40]}, partial(fp8_block, block=(24, 40))),
    "fp8, powers of two": Format(
        FP8 | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        partial(fp8_block, block=(32, 32), powers_of_two=True),
    ),
    "fbgemm_fp8": Format(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, partial(fp8_outputs, extra=("input_scale_ub",))
    ),
    "modelopt": Format({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor),
    "modelopt, outputs": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, partial(fp8_outputs, flat=True)
    ),
    "modelopt, blocks": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        partial(fp8_block, scale="weight_scale", four_sides=True),
    ),
    "float-quantized": Format(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True), fp8_outputs
    ),
    "float-quantized, blocks": Format(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure="32x32"),
        partial(fp8_block, block=(32, 32), scale="weight_scale"),
    ),
    "int-quantized": Format(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        int_quantized,
        head=True,
    ),
    "int-quantized, zero points": Format(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        partial(int_quantized, symmetric=False),
    ),
    "int-quantized, groups": Format(
        compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False),
        partial(int_quantized, size=16, symmetric=False),
    ),
    "pack-quantized": Format(compressed("pack-quantized", **INT4, symmetric=True), pack_quantized),
    "pack-quantized, zero points": Format(
        compressed("pack-quantized", **INT4, symmetric=False), partial(pack_quantized, symmetric=False)
    ),
    "pack-quantized, actorder": Format(
        compressed("pack-quantized", **INT4, symmetric=False, actorder="group"),
        partial(pack_quantized, symmetric=False, actorder=True),
    ),
    "pack-quantized, 8 bits": Format(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", group_size=None, symmetric=True),
        partial(pack_quantized, bits=8, size=-1),
    ),
    "pack-quantized, 5 bits": Format(
        compressed("pack-quantized", **INT4 | {"num_bits": 5}, symmetric=False),
        partial(pack_quantized, bits=5, symmetric=False),
    ),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "awq, one group": Format(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": False, "version": "GEMM"},
        partial(awq, size=-1, symmetric=True),
    ),
    "gptq": Format(GPTQ, gptq),
    "gptq, zero points": Format(GPTQ | {"sym": False}, partial(gptq, symmetric=False)),
    "gptq, desc_act": Format(
        GPTQ | {"sym": False, "desc_act": True}, partial(gptq, symmetric=False, desc_act=True), head=True
    ),
    "gptq, 8 bits": Format(GPTQ | {"bits": 8, "group_size": -1}, partial(gptq, bits=8, size=-1, symmetric=False)),
    "gptq, 3 bits": Format(GPTQ | {"bits": 3}, partial(gptq, bits=3, symmetric=False)),
    "gptq v2": Format(GPTQ | V2, partial(gptq, version=2)),
    "gptq v2, desc_act, 8 bits": Format(
        GPTQ | V2 | {"bits": 8, "sym": False, "desc_act": True},
        partial(gptq, version=2, bits=8, symmetric=False, desc_act=True),
    ),
    "gptq v2, 2 bits": Format(GPTQ | V2 | {"bits": 2, "group_size": 16}, partial(gptq, version=2, bits=2, size=16)),
    "auto-round": Format(ROUND | {"packing_format": "auto_round:auto_gptq"}, partial(gptq, g_idx=False)),
    "auto-round, own packing": Format(
        ROUND | {"packing_format": "auto_round", "sym": False}, partial(gptq, g_idx=False, symmetric=False, version=2)
    ),
    "auto-round, gptqmodel": Format(
        ROUND | {"packing_format": "auto_round:gptqmodel", "bits": 8}, partial(gptq, bits=8, version=2)
    ),
    "auto-round, awq": Format(ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}, awq),
}
