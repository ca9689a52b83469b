"""The attention that transformers' models call, registered with the library under a name of ours.

What runs behind it is the part of a `Listener`, which is set around a forward: the paged pool, or a trial that notes
how a model calls. A model brings queries and keys with their positions in them already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from baton.kernels import Scores
from baton.node.errors import InvariantBroken

NAME = "baton_paged"


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
