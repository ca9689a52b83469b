"""Memory for the parts of a model's layers, as a rank has them, and the place of each tensor of a checkpoint in it.

Knows no layer: which projections there are is the part of models.allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from baton.kernels import DenseLinear, ExpertLinears, Linear, ScaledLinear
from baton.kernels.linear import STACKED_FORMATS, STACKED_MULTIPLE
from baton.models.config import ModelConfig
from baton.models.partition import Rank
from baton.models.places import JoinedPlaces, PlainPlace, StackedPlace, WeightCut, WeightPlace
from baton.models.quantization.kept import KeptPart, keep_quantised
from baton.models.quantization.weight import QuantizedWeight

Projections = Sequence[tuple[str, WeightCut]]
"""Names, and the rows of each. A name that is there twice has two ranges of rows of a tensor."""


class WeightMemory:
    """Allocates parts of one model for one rank, and notes the place of each tensor."""

    def __init__(
        self,
        config: ModelConfig,
        rank: Rank,
        dtype: torch.dtype,
        device: str,
        forms: Mapping[str, QuantizedWeight],
    ) -> None:
        self.config, self.rank = config, rank
        self.hidden = WeightCut.whole(config.hidden_size)
        self.places: dict[str, WeightPlace] = {}
        self._dtype, self._device, self._forms = dtype, device, forms
        self._norm_dtype, self._norm_offset = (torch.float32, 1.0) if config.unit_offset_norms else (dtype, 0.0)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Of the model's dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def put(self, name: str, place: WeightPlace) -> None:
        self.places[name] = JoinedPlaces((self.places[name], place)) if name in self.places else place

    def norm(self, name: str, size: int) -> torch.Tensor:
        weight = self.empty(size, dtype=self._norm_dtype)
        self.put(name, PlainPlace(weight, (WeightCut.whole(size),), self._norm_offset))
        return weight

    def head_norms(self, prefix: str, num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
        norms = self.empty(num_heads + num_kv_heads, head_dim, dtype=self._norm_dtype)
        cuts = (WeightCut.whole(head_dim),)
        self.put(f"{prefix}q_norm.weight", PlainPlace(norms[:num_heads], cuts, self._norm_offset))
        self.put(f"{prefix}k_norm.weight", PlainPlace(norms[num_heads:], cuts, self._norm_offset))
        return norms

    def router_dtype(self, is_float32: bool) -> torch.dtype:
        """On a CPU always float32, so that a product has logits of it; a GPU's kernels have them of any."""
        return torch.float32 if is_float32 or self._device == "cpu" else self._dtype

    def linear(self, prefix: str, outputs: Projections, inputs: WeightCut, with_bias: bool) -> Linear:
        """The projections of these names as one."""
        bias = self.empty(sum(len(cut.part) for _, cut in outputs)) if with_bias else None
        return self._kept(prefix, outputs, inputs, bias) or self.plain(prefix, outputs, inputs, bias)

    def experts(
        self, prefix: str, gate_up: Projections, down: Projections, width: WeightCut, count: int
    ) -> tuple[ExpertLinears, ExpertLinears]:
        """Gate and up, and down, of so many experts, in order; in codes if a GPU's products take both so."""
        products = ((gate_up, self.hidden), (down, width))
        formats = {self._kept_format(prefix, outputs, inputs) for outputs, inputs in products}
        fit = not any(len(inputs.part) % STACKED_MULTIPLE for _, inputs in products)
        first, second = (
            self._kept(prefix, outputs, inputs, None)
            if fit and len(formats) == 1 and formats <= STACKED_FORMATS
            else self.plain(prefix, outputs, inputs, None)
            for outputs, inputs in products
        )
        assert isinstance(first, DenseLinear | ScaledLinear) and isinstance(second, DenseLinear | ScaledLinear)
        return ExpertLinears(first, count), ExpertLinears(second, count)

    def stacked_experts(
        self, prefix: str, names: tuple[str, str], experts: WeightCut, width: int
    ) -> tuple[ExpertLinears, ExpertLinears]:
        """Gate and up, and down, with biases, of checkpoints that have all experts in one tensor each."""
        hidden = len(self.hidden.part)
        gate_up = self._stacked(f"{prefix}{names[0]}", experts, 2 * width, hidden, interleaved=True)
        return gate_up, self._stacked(f"{prefix}{names[1]}", experts, hidden, width, interleaved=False)

    def _stacked(self, name: str, experts: WeightCut, outputs: int, inputs: int, interleaved: bool) -> ExpertLinears:
        count = len(experts.part)
        made = DenseLinear(self.empty(count * outputs, inputs), bias := self.empty(count * outputs))
        self.put(name, StackedPlace(made.weight.view(count, outputs, inputs), experts, interleaved))
        self.put(f"{name}_bias", StackedPlace(bias.view(count, outputs), experts, interleaved))
        return ExpertLinears(made, count)

    def plain(
        self,
        prefix: str,
        outputs: Projections,
        inputs: WeightCut,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> DenseLinear:
        rows = sum(len(cut.part) for _, cut in outputs)
        made = DenseLinear(self.empty(rows, len(inputs.part), dtype=dtype), bias)
        for (name, cut), part in zip(outputs, _parts(outputs), strict=True):
            self.put(f"{prefix}{name}.weight", PlainPlace(made.weight[part], (cut, inputs)))
        self._put_bias(prefix, outputs, bias)
        return made

    def _kept(self, prefix: str, outputs: Projections, inputs: WeightCut, bias: torch.Tensor | None) -> Linear | None:
        """With codes and scales, if all projections have them in one layout."""
        parts = self._kept_parts(prefix, outputs)
        kept = None if parts is None else keep_quantised(parts, inputs, bias, self._device)
        if kept is None:
            return None
        places: Sequence[WeightPlace] = kept[1]
        for (name, _), place in zip(outputs, places, strict=True):
            self.put(f"{prefix}{name}.weight", place)
        self._put_bias(prefix, outputs, bias)
        return kept[0]

    def _kept_format(self, prefix: str, outputs: Projections, inputs: WeightCut) -> str | None:
        """Of `_kept`, without memory for it."""
        parts = self._kept_parts(prefix, outputs)
        kept = None if parts is None else keep_quantised(parts, inputs, None, "meta")
        return None if kept is None else kept[0].weight_format

    def _kept_parts(self, prefix: str, outputs: Projections) -> list[KeptPart] | None:
        forms = [self._forms.get(f"{prefix}{name}.weight") for name, _ in outputs]
        parts = [KeptPart(form, cut) for form, (_, cut) in zip(forms, outputs, strict=True) if form is not None]
        return parts if len(parts) == len(outputs) else None

    def _put_bias(self, prefix: str, outputs: Projections, bias: torch.Tensor | None) -> None:
        if bias is not None:
            for (name, cut), part in zip(outputs, _parts(outputs), strict=True):
                self.put(f"{prefix}{name}.bias", PlainPlace(bias[part], (cut,)))


def _parts(outputs: Projections) -> list[slice]:
    """The rows of each in the merged matrix."""
    first, parts = 0, []
    for _, cut in outputs:
        parts.append(slice(first, first + len(cut.part)))
        first += len(cut.part)
    return parts
