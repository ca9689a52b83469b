"""Blocks of experts as launches of kernels: who computes a token, the experts' products, and what the shared one adds.

A block of a decode step is four launches, and one more from some tokens on: router · choice and order · gate and up
with silu · down. What experts add to a token is summed by the norm behind the block, and with it what the shared
expert adds, whose products are those of a dense MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from baton.kernels import DenseLinear, ExpertLinears
from baton.kernels.triton import experts_policy
from baton.kernels.triton.expert_pairs import ExpertPairs
from baton.kernels.triton.linear_8bit_policy import FORMATS
from baton.kernels.triton.route import Routes, choose, router
from baton.kernels.triton.routed_sum import RoutedSum
from baton.models.cuda.products import PADDING, Policy, invariant
from baton.models.cuda.products.experts_dense import DenseExperts
from baton.models.cuda.products.experts_scaled import ScaledExperts
from baton.models.cuda.products.experts_sizes import ExpertsSizes, Room
from baton.models.cuda.step_products import StepProducts
from baton.models.families import SILU
from baton.models.layer_weights import ExpertsWeights, Weights
from baton.models.layers import ExpertsMlp
from baton.node.errors import InvariantBroken, SettingsError


class ExpertProducts(Protocol):
    """Products with experts of one format, captured in graphs: nothing is allocated and nothing waits."""

    room: Room
    """For the most tokens."""

    def tile_rows(self, num_tokens: int, *, adapted: bool = False) -> int:
        """Of the tiles in which so many tokens are multiplied; adapted: with pairs."""
        ...

    def __call__(
        self,
        gate_up: ExpertLinears,
        down: ExpertLinears,
        x: torch.Tensor,
        routes: Routes,
        pairs: tuple[ExpertPairs, ExpertPairs] | None = None,
        *,
        pdl: bool,
    ) -> torch.Tensor:
        """The rows that experts compute, [P, hidden] in the order of `routes`; x is [T, hidden], plain. pairs: what
        adapters add to gate and up, and to down."""
        ...


class ExpertBlocks:
    """Of one model, for up to max_tokens tokens; not for two steps at a time."""

    def __init__(
        self,
        blocks: Sequence[tuple[ExpertsMlp, ExpertsWeights]],
        max_tokens: int,
        deterministic: bool,
        dtype: torch.dtype,
        device: str,
        pair_width: int,
    ) -> None:
        """deterministic: a token's bits do not depend on the others. pair_width: as DenseExperts."""
        sizes = {
            ExpertsSizes(shape.routing, shape.experts, weights.gate_up.num_inputs, shape.width, shape.clamped)
            for shape, weights in blocks
        }
        if len(sizes) != 1 or any(shape.activation != SILU for shape, _ in blocks):
            raise SettingsError("the GPU's experts are all of one size, with silu")
        (self._sizes,) = sizes
        self._deterministic = deterministic
        formats = {each.weight_format for _, weights in blocks for each in (weights.gate_up, weights.down)}
        self._by_format: dict[str, ExpertProducts] = {
            each: _products_of(each, self._sizes, max_tokens, deterministic, dtype, device, pair_width)
            for each in formats
        }
        routing, gated = self._sizes.routing, any(weights.shared_gate is not None for _, weights in blocks)
        rooms = [each.room for each in self._by_format.values()]
        tiles, rows = max(room.tiles for room in rooms), max(room.rows for room in rooms)
        self._routes = Routes.of_room(max_tokens, routing, tiles, rows, device)
        hidden = self._sizes.hidden
        parts = max(self._splits(tokens) * tokens for tokens in range(1, max_tokens + 1))
        self._logits = torch.empty(parts * (routing.num_experts + gated), dtype=torch.float32, device=device)
        shared = [weights.shared for _, weights in blocks if weights.shared is not None]
        inner = max((each.down.num_inputs for each in shared), default=0)
        room = max_tokens + PADDING if shared else 0
        self._gated = torch.zeros(room * inner, dtype=dtype, device=device)
        self._shared = torch.zeros(room, hidden, dtype=dtype, device=device)
        self._no_padding = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def __call__(
        self,
        shape: ExpertsMlp,
        mlp: ExpertsWeights,
        x: torch.Tensor,
        products: StepProducts,
        layer: int,
        kv_slots: torch.Tensor | None,
        *,
        pdl: bool,
    ) -> RoutedSum:
        """What the block of a layer adds to T tokens, valid until the next is computed; x is [T, hidden].

        products: for the shared expert, and what adapters add to routers. kv_slots: int32 [T], -1 for tokens that pad
        the step; None: there are none.
        """
        num_tokens, routing = len(x), shape.routing
        if mlp.gate_up.weight_format != mlp.down.weight_format:
            raise InvariantBroken("experts of two formats in one block")
        of_experts = self._by_format[mlp.gate_up.weight_format]
        pairs = products.expert_pairs(layer)
        tile_rows = of_experts.tile_rows(num_tokens, adapted=pairs is not None)
        routes = self._routes.first(num_tokens, routing, tile_rows)
        gate = None if mlp.shared_gate is None else mlp.shared_gate.weight
        width = routing.num_experts + (gate is not None)
        splits = self._splits(num_tokens)
        logits = self._logits[: splits * num_tokens * width].view(splits, num_tokens, width)
        if kv_slots is None and self._deterministic:
            kv_slots = self._no_padding[:num_tokens]  # so that this, too, is the same kernel
        fixed = self._deterministic
        router(x, mlp.router.weight, gate, logits, fixed=fixed, pdl=pdl)
        products.add_to(layer, "router", x, logits[..., : routing.num_experts])
        if gate is not None:
            products.add_to(layer, "shared_gate", x, logits[..., routing.num_experts :])
        bias = mlp.router.bias
        choose(logits, routing, mlp.correction, kv_slots, shape.experts, routes, logit_bias=bias, fixed=fixed, pdl=pdl)
        rows = of_experts(mlp.gate_up, mlp.down, x, routes, pairs, pdl=pdl)
        if mlp.shared is None:
            return RoutedSum(rows, routes)
        gated = self._gated[: num_tokens * mlp.shared.down.num_inputs].view(num_tokens, -1)
        inner = products.gated(layer, mlp.shared.gate_up, x, gated, mlp.shared.down)
        added = products(layer, "down", mlp.shared.down, inner, self._shared[:num_tokens])
        return RoutedSum(rows, routes, added, gate is not None)

    def _splits(self, num_tokens: int) -> int:
        """Parts of the inputs of a router's product."""
        return experts_policy.router_splits(num_tokens, self._sizes.hidden, self._deterministic)


def plan_experts(weights: Weights, policy: Policy, max_tokens: int, pair_width: int) -> ExpertBlocks | None:
    """The blocks of a model's layers; None: it has none. pair_width: as DenseExperts."""
    blocks = [
        (layer.shape.mlp, layer.mlp)
        for layer in weights.layers
        if isinstance(layer.shape.mlp, ExpertsMlp) and isinstance(layer.mlp, ExpertsWeights)
    ]
    if not blocks:
        return None
    dtype, device = weights.embedding.dtype, str(weights.embedding.device)
    return ExpertBlocks(blocks, max_tokens, policy is invariant, dtype, device, pair_width)


def _products_of(
    weight_format: str,
    sizes: ExpertsSizes,
    max_tokens: int,
    deterministic: bool,
    dtype: torch.dtype,
    device: str,
    pair_width: int,
) -> ExpertProducts:
    if weight_format == DenseLinear.weight_format:
        return DenseExperts(sizes, max_tokens, deterministic, dtype, device, pair_width)
    if weight_format in FORMATS:
        if deterministic:
            raise SettingsError("--deterministic: on a GPU only with experts in the model's dtype, not in 8 bits")
        if pair_width:
            raise SettingsError("--lora-room experts: on a GPU only with experts in the model's dtype, not in 8 bits")
        return ScaledExperts(sizes, weight_format, max_tokens, dtype, device)
    raise InvariantBroken(f"no kernel here reads experts of the format {weight_format}")
