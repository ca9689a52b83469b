"""Modules of a transformers model that kernels here compute as well, and faster: they are replaced, each by itself.

What a module computes is not read from its name: it is replaced only if the kernel gives its answer for random rows, to
the rounding of its dtype. Three kinds are looked at: norms over whole rows, MLPs with a gate, and products of shapes
that linear_policy has measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from baton.kernels.triton.activation import gelu_tanh_and_mul, silu_and_mul
from baton.kernels.triton.linear import linear
from baton.kernels.triton.linear_policy import ProductShape, fastest
from baton.kernels.triton.norm import rms_norm

Forward = Callable[[torch.Tensor], torch.Tensor]

TRIED_ROWS = (1, 3)
ROUNDINGS = 4.0
"""Of the largest number: what the orders of rounding may differ by."""
LEAST_NORM = 512
"""Elements of a row: a program has all warps for a row, and heads are narrow and many."""
ACTIVATIONS = (silu_and_mul, gelu_tanh_and_mul)
PRODUCTS_OF = (1, 16)
"""Numbers of rows of which the policy is asked whether it knows a product."""


def replace_modules(model: nn.Module, least_norm: int = LEAST_NORM) -> int:
    """How many were replaced."""
    replaced = 0
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            found = _product(module)
        elif _is_gated(module):
            found = _mlp(module)
        else:
            found = _norm(module, least_norm)
        if found is not None:
            module.forward = found  # type: ignore[method-assign]
            replaced += 1
    return replaced


def _agrees(module: nn.Module, kernel: Forward, width: int) -> bool:
    weight = next(module.parameters())
    chance = torch.Generator(weight.device).manual_seed(1)
    for rows in TRIED_ROWS:
        x = torch.randn(1, rows, width, generator=chance, dtype=weight.dtype, device=weight.device)
        expected, found = module(x).float(), kernel(x).float()
        allowed = ROUNDINGS * torch.finfo(weight.dtype).eps * float(expected.abs().max())
        if expected.shape != found.shape or float((expected - found).abs().max()) > allowed:
            return False
    return True


def _norm(module: nn.Module, least: int) -> Forward | None:
    """x / sqrt(mean x^2 + eps) times its weight, or one more than that."""
    parameters = list(module.named_parameters())
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if [name for name, _ in parameters] != ["weight"] or not isinstance(eps, float) or list(module.children()):
        return None
    weight = parameters[0][1].detach()
    if weight.dim() != 1 or len(weight) < least:
        return None
    for factors in (weight, 1.0 + weight.float()):

        def norm(x: torch.Tensor, factors: torch.Tensor = factors) -> torch.Tensor:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            width = x.shape[-1]
            rms_norm(x.contiguous().view(-1, width), factors, eps, out.view(-1, width))
            return out

        if _agrees(module, norm, len(weight)):
            return norm
    return None


def _is_gated(module: nn.Module) -> bool:
    """Whether it has the three products of an MLP with a gate, without biases, and nothing else that has weights."""
    names = {name for name, _ in module.named_parameters()}
    return names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def _mlp(module: nn.Module) -> Forward | None:
    """down(activation(gate x) * up x). The weights of gate and up become parts of one."""
    gate, up, down = (module.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return None
    merged = torch.cat((gate.weight.detach(), up.weight.detach()))
    width, inputs = merged.shape[0] // 2, merged.shape[1]
    for activate in ACTIVATIONS:

        def mlp(x: torch.Tensor, activate: Callable[..., None] = activate) -> torch.Tensor:
            rows = x.reshape(-1, inputs)
            gated = rows.new_empty(len(rows), width)
            tiles = fastest(len(rows), ProductShape(width, inputs, fused=True)) if activate is silu_and_mul else None
            if tiles is not None and _runs_tuned(rows):
                linear(rows, merged, None, tiles, gated, fused=True)
            else:
                activate(F.linear(rows, merged), gated)
            result: torch.Tensor = down(gated.view(*x.shape[:-1], width))
            return result

        if _agrees(module, mlp, inputs):
            gate.weight.data, up.weight.data = merged[:width], merged[width:]
            return mlp
    return None


def _product(module: nn.Linear) -> Forward | None:
    weight, bias = module.weight.detach(), module.bias
    shape = ProductShape(*weight.shape)
    if not _runs_tuned(weight) or not any(fastest(rows, shape) for rows in PRODUCTS_OF):
        return None

    def product(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, shape.inputs)
        tiles = fastest(len(rows), shape)
        if tiles is None or tiles.splits > 1:  # nothing here sums parts
            return F.linear(x, module.weight, bias)
        out = rows.new_empty(len(rows), shape.outputs)
        linear(rows, module.weight, bias, replace(tiles, prefetch=0), out)
        return out.view(*x.shape[:-1], shape.outputs)

    return product if _agrees(module, product, shape.inputs) else None


def _runs_tuned(tensor: torch.Tensor) -> bool:
    """Whether the tuned kernels, which were measured on Hopper, multiply it."""
    return (
        tensor.is_cuda and tensor.dtype == torch.bfloat16 and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    )
