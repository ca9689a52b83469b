"""The ops that a step is made of, over plain tensors. Knows no model, no batch object and nothing else of ours.

`reference` holds the slow, obvious torch version of every op: the oracle of every test here and of every kernel. `cpu`
holds what the CPU runs instead where that would be slow: the same results by fewer operations. `linear` says what a
product with a weight is, in any format. `philox` is the counter-based generator. The names below are the CPU's ops; a
GPU's are in `triton`, which write into memory of the caller's and are called by name, so that nothing here imports
Triton.
"""

from baton.kernels.clamped_gate import ClampedGate, clamped_gate_and_mul
from baton.kernels.cpu.attention import DecodeGroup, chunk_attention, decode_attention
from baton.kernels.cpu.experts import AddedToExpert, apply_experts
from baton.kernels.cpu.paged_kv import PagedKv, PlainKv, QuantisedKv
from baton.kernels.cpu.sampling import draw, keep_top_k, keep_top_p, with_noise
from baton.kernels.linear import DenseLinear, ExpertLinears, GroupedLinear, HeldWeight, Linear, ScaledLinear
from baton.kernels.reference import (
    add_rms_norm,
    apply_penalties,
    apply_rope,
    gelu_tanh_and_mul,
    keep_masked,
    keep_min_p,
    keep_tokens,
    rms_norm,
    silu_and_mul,
    token_logprobs,
)
from baton.kernels.routing import Routing, route
from baton.kernels.scores import Scores

__all__ = [
    "AddedToExpert",
    "ClampedGate",
    "DecodeGroup",
    "DenseLinear",
    "ExpertLinears",
    "GroupedLinear",
    "HeldWeight",
    "Linear",
    "PagedKv",
    "PlainKv",
    "QuantisedKv",
    "Routing",
    "ScaledLinear",
    "Scores",
    "add_rms_norm",
    "apply_experts",
    "apply_penalties",
    "apply_rope",
    "chunk_attention",
    "clamped_gate_and_mul",
    "decode_attention",
    "draw",
    "gelu_tanh_and_mul",
    "keep_masked",
    "keep_min_p",
    "keep_tokens",
    "keep_top_k",
    "keep_top_p",
    "rms_norm",
    "route",
    "silu_and_mul",
    "token_logprobs",
    "with_noise",
]
