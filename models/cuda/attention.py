"""Which kernels attend: one for rows of a token each; for parts of prompts Hopper's where it can, else a portable one.

The choice is made once for a pool, by how layers attend, whatever computes the rest of them.

Over 8-bit floats both kernels for prompts are slow, since each tile would be widened again for each head and each piece
of a prompt: the context of a step is widened once a layer, into memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

import torch

from baton.kernels.triton import prefill_attention
from baton.kernels.triton.decode_attention import DecodeScratch, decode_attention
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.step_inputs import StepInputs
from baton.kernels.triton.widen import widen_context
from baton.models.config import ModelConfig
from baton.models.cuda.queue import Queue
from baton.models.layers import GroupedAttention, LayerShape

Sinks = Sequence[torch.Tensor | None]
"""Of each layer's query heads, float32 [H]; None: the layer has none."""
Attend = Callable[[int, torch.Tensor, torch.Tensor], None]
"""attend(layer, query [N, H, D], out [N, H, D]): attention of the step's tokens, whose keys and values are written."""

OfLayer = Callable[[int], None]
"""Launches for this layer what was launched for another, over the same memory."""

ITEMS_A_MULTIPROCESSOR = 2
"""Up to so many items of the work list a program each is faster than programs that take items from a counter."""


def grouped_shapes(layers: Iterable[LayerShape]) -> list[GroupedAttention]:
    """Of a model whose layers all attend so."""
    shapes = [layer.attention for layer in layers]
    found = [shape for shape in shapes if isinstance(shape, GroupedAttention)]
    assert len(found) == len(shapes), "one kind of attention a model"
    return found


class Repeating:
    """An Attend of one step, which most layers repeat: of the kind, and with the query and output, of one before.

    It keeps the last query and output of each kind.
    """

    def __init__(self, launch: Callable[[int, torch.Tensor, torch.Tensor], OfLayer], kinds: Sequence[Hashable]) -> None:
        """launch: attends, and returns what repeats it. kinds: of each layer, all in which launches of layers differ
        but the layer itself and its weights."""
        self._launch, self._kinds = launch, kinds
        self._launched: dict[Hashable, tuple[object, OfLayer]] = {}

    def __call__(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        memory, kind = (query.data_ptr(), out.data_ptr(), query.shape), self._kinds[layer]
        before, of_layer = self._launched.get(kind, (None, None))
        if of_layer is not None and memory == before:
            of_layer(layer)
        else:
            self._launched[kind] = memory, self._launch(layer, query, out)


def attend_rows(
    shapes: Sequence[GroupedAttention],
    sinks: Sinks,
    pool: PagedPool,
    inputs: StepInputs,
    plan: DecodePlan,
    scratch: DecodeScratch,
    pdl: bool,
) -> Attend:
    """Attention of one new token a row; shapes and sinks: of each layer."""

    def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
        shape = shapes[layer]
        of_layer = decode_attention(
            query,
            pool,
            layer,
            inputs.tables,
            inputs.lengths,
            plan,
            scratch,
            out,
            window=shape.window,
            scale=shape.scores.scale,
            softcap=shape.scores.softcap,
            sinks=sinks[layer],
            pdl=pdl,
        )
        return lambda layer: of_layer(layer, sinks[layer])

    return Repeating(launch, [(shape.window, shape.scores) for shape in shapes])


def place_in(pool: PagedPool, layer: int) -> int:
    """A pool of one layer has any, one after the other."""
    return layer if pool.num_layers > 1 else 0


class ChunkAttention(Protocol):
    """Attention of ragged chunks of sequences over their cached tokens and themselves."""

    tile: int
    """Tokens of one item of the work list."""

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        """For one step; the arrays as kernels.triton.prefill_attention takes them."""
        ...


def choose_attention(
    config: ModelConfig,
    shapes: Sequence[GroupedAttention],
    sinks: Sinks,
    pool: PagedPool,
    queue: Queue,
    deterministic: bool,
    memory: torch.Tensor | None = None,
) -> ChunkAttention:
    """The portable kernel's bits do not depend on how a prompt is cut into chunks; the other's do.

    shapes, sinks: of each layer of the pool. memory: for the context of a step in the dtype of queries, where the pool
    has 8-bit floats.
    """
    if pool.scales is not None and memory is not None and not deterministic:
        block = (pool.num_units, 1, 2, pool.block_tokens, pool.head_dim)
        num_blocks = len(memory) // math.prod(block)
        if num_blocks:
            plain_pool = PagedPool.of(memory[: num_blocks * math.prod(block)].view(num_blocks, *block))
            attention = choose_attention(config, shapes, sinks, plain_pool, queue, deterministic)
            direct = _Portable(config.head_dim, shapes, sinks, pool)
            return _Widened(attention, direct, pool, plain_pool, num_blocks, queue.num_sms)
    plain = not config.sinks and config.sliding_window is None and config.score_softcap is None
    plain = plain and config.score_scale == config.head_dim**-0.5
    if pool.tensor.is_cuda and plain and not deterministic:
        # Gluon has no interpreter and changes with Triton's versions: it is imported where it may be used.
        from baton.kernels.triton import prefill_gluon

        if prefill_gluon.is_available(torch.cuda.get_device_capability(pool.tensor.device)) and prefill_gluon.reads(
            pool
        ):
            return _Hopper(pool, queue.num_sms, len(shapes))
    return _Portable(config.head_dim, shapes, sinks, pool)


class _Portable:
    def __init__(self, head_dim: int, shapes: Sequence[GroupedAttention], sinks: Sinks, pool: PagedPool) -> None:
        self.tile = prefill_attention.block_m(head_dim)
        self._shapes, self._sinks, self._pool = shapes, sinks, pool

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        shapes, sinks, pool, tile = self._shapes, self._sinks, self._pool, self.tile

        def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
            shape = shapes[layer]
            of_layer = prefill_attention.prefill_attention(
                query,
                pool,
                place_in(pool, layer),
                tables,
                starts,
                lengths,
                work,
                tile,
                out,
                window=shape.window,
                scale=shape.scores.scale,
                softcap=shape.scores.softcap,
                sinks=sinks[layer],
            )
            return lambda layer: of_layer(place_in(pool, layer), sinks[layer])

        return Repeating(launch, [(shape.window, shape.scores) for shape in shapes])


class _Hopper:
    def __init__(self, pool: PagedPool, num_sms: int, num_layers: int) -> None:
        from baton.kernels.triton import prefill_gluon

        self.tile = prefill_gluon.BLOCK_M
        self._attention = prefill_gluon.prefill_attention
        self._pool, self._num_sms, self._kinds = pool, num_sms, [None] * num_layers
        self._counter = torch.zeros(2, dtype=torch.int32, device=pool.rows.device)

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        pool, num_sms = self._pool, self._num_sms
        counter = self._counter if len(work) > ITEMS_A_MULTIPROCESSOR * num_sms else None

        def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
            place = place_in(pool, layer)
            of_layer = self._attention(query, pool, place, tables, starts, lengths, work, num_sms, counter, out)
            return lambda layer: of_layer(place_in(pool, layer))

        return Repeating(launch, self._kinds)


class _Widened:
    """Over a plain pool of one layer, into which the context of a layer's chunks comes first. Steps whose tables have
    more places than it has blocks read the 8-bit floats themselves."""

    def __init__(
        self,
        attention: ChunkAttention,
        direct: _Portable,
        pool: PagedPool,
        plain_pool: PagedPool,
        num_blocks: int,
        num_sms: int,
    ) -> None:
        assert attention.tile == direct.tile, "one work list serves both"
        self.tile = direct.tile
        self._attention, self._direct = attention, direct
        self._pool, self._plain_pool, self._num_sms = pool, plain_pool, num_sms
        self._tables = torch.zeros(num_blocks, dtype=torch.int32, device=pool.tensor.device)

    def over(self, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, work: torch.Tensor) -> Attend:
        if tables.numel() > len(self._tables):
            return self._direct.over(tables, starts, lengths, work)
        plain_tables = self._tables[: tables.numel()].view(tables.shape)
        attend_plain = self._attention.over(plain_tables, starts, lengths, work)
        widen: OfLayer | None = None

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            nonlocal widen
            if widen is None:
                widen = widen_context(self._pool, layer, tables, lengths, self._plain_pool, plain_tables, self._num_sms)
            else:
                widen(layer)
            attend_plain(layer, query, out)

        return attend
