"""A transformers model as a decoder of the CPU's runner: a step's tokens in one row, attention over the paged pool."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from baton.models.cpu.adapters import NO_ADAPTERS, RowAdapters
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.step_batch import StepBatch
from baton.models.fallback.attention import AttentionCall, listening
from baton.node.errors import InvariantBroken


class FallbackDecoder:
    """Logits are made inside the model, so that `hidden` here are logits already."""

    def __init__(self, model: PreTrainedModel, calls: tuple[AttentionCall, ...], value_dim: int) -> None:
        """calls: how each layer attends; value_dim: of a head, at most that of its keys."""
        self._model, self._calls, self._value_dim = model, calls, value_dim
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, attention: PagedAttention, step: StepBatch, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        """float32 [kept tokens, vocab]; no row has an adapter (models.check)."""
        layers = _PagedLayers(attention, step, self._calls, self._value_dim)
        kept = step.kept_tokens
        some = {} if kept is None or not self._keeps_logits else {"logits_to_keep": kept}
        with listening(layers):
            out = self._model(
                input_ids=step.token_ids[None], position_ids=step.positions[None], use_cache=False, **some
            )
        if layers.next_layer != len(self._calls):
            raise InvariantBroken(f"{layers.next_layer} of {len(self._calls)} layers attended")
        logits: torch.Tensor = out.logits[0]
        return (logits if kept is None or some else logits[kept]).float()

    def logits(self, hidden: torch.Tensor, adapters: RowAdapters = NO_ADAPTERS) -> torch.Tensor:
        return hidden


@dataclass(slots=True)
class _PagedLayers:
    """The Listener of one step."""

    attention: PagedAttention
    step: StepBatch
    calls: tuple[AttentionCall, ...]
    value_dim: int
    next_layer: int = field(default=0, init=False)

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        index = self.next_layer
        if index >= len(self.calls) or call != self.calls[index]:
            raise InvariantBroken(f"layer {call.layer} attends otherwise than it did at load")
        self.next_layer += 1
        narrower = key.shape[-1] - value.shape[-1]
        kv = torch.stack((key.flatten(1), F.pad(value, (0, narrower)).flatten(1)), dim=1)
        out = self.attention(index, query.contiguous(), kv, self.step)
        return out.view(query.shape)[..., : self.value_dim]
