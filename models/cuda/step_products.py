"""Products of one step on a GPU, with what the adapters of its rows add to them.

Parts of a layer that are launched elsewhere (experts, latent attention) multiply by these too.
"""

from __future__ import annotations

import torch

from baton.kernels import DenseLinear, Linear
from baton.kernels.triton.adapter_rows import AdapterRows
from baton.kernels.triton.expert_pairs import ExpertPairs
from baton.kernels.triton.low_rank import AddedProduct
from baton.kernels.triton.row_scales import add_in_place
from baton.models.adapters.adapter import EXPERT_PRODUCTS
from baton.models.cuda.adapter_steps import AdapterSteps
from baton.models.cuda.products import Products, Rows, plain


class StepProducts:
    """Of one step, layer by layer."""

    def __init__(
        self, products: Products, adapters: AdapterSteps | None, rows: AdapterRows | None, *, pdl: bool
    ) -> None:
        """rows: those with adapters; None: none has one."""
        self._products, self._adapters = products, adapters
        self._rows, self._pdl = rows, pdl

    def keep(self, drawn: torch.Tensor) -> None:
        """From now on the step has these of its rows."""
        if self._rows is not None:
            assert self._adapters is not None, "a step with adapters of a decoder without"
            self._rows = self._adapters.keep(self._rows, drawn)

    def codes_for(self, reader: Linear, num_rows: int) -> Rows | None:
        """As Products; adapters multiply plain rows."""
        return self._products.codes_for(reader, num_rows) if self._rows is None else None

    def __call__(self, layer: int, name: str, weights: Linear, x: Rows, out: torch.Tensor) -> torch.Tensor:
        """name: as BankLayout has it."""
        return self._products(weights, x, out, self._added(layer, name, weights, x), pdl=self._pdl)

    def gated(self, layer: int, gate_up: Linear, x: Rows, out: torch.Tensor, reader: Linear) -> Rows:
        added = self._added(layer, "gate_up", gate_up, x)
        following = reader if self._rows is None else None
        return self._products.gated(gate_up, x, out, following, added, pdl=self._pdl)

    def gelu_gated(
        self, layer: int, gate_up: Linear, x: Rows, wide: torch.Tensor, out: torch.Tensor, reader: Linear
    ) -> Rows:
        added = self._added(layer, "gate_up", gate_up, x)
        return self._products.gelu_gated(gate_up, x, wide, out, reader, added, pdl=self._pdl)

    def add_to(self, layer: int, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        """What adapters change of a product of x that was launched elsewhere, without a bias: [M, N], or float32 parts
        of it [S, M, N]."""
        if self._rows is not None:
            assert self._adapters is not None, "a step with adapters of a decoder without"
            added = self._adapters.added(layer, name, x, self._rows, beside=False, pdl=self._pdl)
            if added is not None:
                add_in_place(added, out, None, pdl=self._pdl)

    def expert_pairs(self, layer: int) -> tuple[ExpertPairs, ExpertPairs] | None:
        """What adapters add to gate and up, and to down, of routed experts; None: nothing."""
        if self._rows is None:
            return None
        assert self._adapters is not None, "a step with adapters of a decoder without"
        first, second = (self._adapters.expert_pairs(layer, name, self._rows) for name in EXPERT_PRODUCTS)
        return None if first is None or second is None else (first, second)

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """What adapters have in place of the model's embedding, or add to it, over out [N, hidden]."""
        if self._rows is not None:
            assert self._adapters is not None, "a step with adapters of a decoder without"
            self._adapters.embed(tokens, self._rows, out)

    def norm(self, number: int, residual: torch.Tensor, eps: float, out: Rows) -> None:
        """The same of norm `number` of the step."""
        if self._rows is not None:
            assert self._adapters is not None, "a step with adapters of a decoder without"
            self._adapters.norm(number, residual, self._rows, eps, plain(out))

    def _added(self, layer: int, name: str, weights: Linear, x: Rows) -> AddedProduct | None:
        if self._rows is None:
            return None
        assert self._adapters is not None, "a step with adapters of a decoder without"
        beside = weights.weight_format == DenseLinear.weight_format
        return self._adapters.added(layer, name, plain(x), self._rows, beside=beside, pdl=self._pdl)
