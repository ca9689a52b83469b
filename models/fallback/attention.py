"""The attention that transformers' models call, registered with the library under a name of ours.

What runs behind it is the part of a `Listener`, which is set around a forward: the paged pool, or a trial that notes
how a model calls. A model brings queries and keys with their positions in them already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from baton.kernels import Scores
from baton.node.errors import InvariantBroken

NAME = "baton_paged"
PROBE = "baton_probe"
"""The same for one forward that looks at the masks which a model would have."""
FAR, FARTHER = 300_000, 300_777
"""Tokens of which the masks are looked at."""
OTHER_MASK = -1


class UnknownMask(Exception):
    """A layer whose tokens see others than causal attention, or its window, would have them see."""


class AttentionCall(NamedTuple):
    """How a layer attends."""

    layer: int
    scores: Scores
    window: int | None
    has_sinks: bool


class Listener(Protocol):
    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """[N, H, Dv] of query [N, H, D], key [N, KH, D] and value [N, KH, Dv] of a step's N tokens."""
        ...


_listener: ContextVar[Listener] = ContextVar("listener")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the attention of every model that was loaded with NAME is this one's."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def register() -> None:
    """Makes NAME known to transformers. It has no way to make masks there, so that none are made: what a token sees
    comes with the step, and the library would look into the positions for it, which waits for a GPU."""
    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(PROBE, _attend_as_masked)
    AttentionMaskInterface.register(PROBE, _window_of)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D], key [1, KH, N, D], value [1, KH, N, Dv] -> [1, N, H, Dv]."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or query.shape[0] != 1:
        raise InvariantBroken(f"attention of layer {layer} over {query.shape[0]} sequences at once")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(layer, Scores(scale, softcap), sliding_window, s_aux is not None)
    out = _listener.get()(call, *(each[0].transpose(0, 1) for each in (query, key, value)))
    return out[None], None


def _window_of(*, mask_function: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    """In place of a mask, [1, 1, 1, 1]: the window that it stands for, 0 for none, or OTHER_MASK."""
    # Of the first versions the positions of a step say where it is computed.
    device = options["device"] if "device" in options else options["cache_position"].device
    places = torch.arange(FARTHER + 2, device=device)
    zero, seen = torch.zeros_like(places), []
    for token in (FAR, FARTHER):
        visible = mask_function(zero, zero, torch.full_like(places, token), places)
        count = int(visible.sum())
        if not bool(visible[token - count + 1 : token + 1].all()):  # others than itself and those right before it
            return torch.full((1, 1, 1, 1), OTHER_MASK, device=device)
        seen.append(count)
    everything = seen == [FAR + 1, FARTHER + 1]
    window = 0 if everything else seen[0] if seen[0] == seen[1] else OTHER_MASK
    return torch.full((1, 1, 1, 1), window, device=device)


def _attend_as_masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `_attend`, after a look at the mask; a model may bring none, if it makes none by the registered ways."""
    window = options.get("sliding_window") or 0
    masked = window if attention_mask is None else float(attention_mask.flatten()[0])
    if abs(masked - window) > window / 100:  # a mask may have been rounded to the model's dtype
        raise UnknownMask(f"layer {getattr(module, 'layer_idx', None)} masks otherwise than by its window ({window})")
    return _attend(module, query, key, value, attention_mask, **options)
