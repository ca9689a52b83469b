"""Latent attention as launches of kernels: what is cached of a token, rows that decode, and parts of prompts.

Between the products of a layer of a decode step are: norms, rotations and KV write · queries times each head's part of
the weight that makes keys · attention over latents · values of its merged parts. Queries with a latent of their own
have two more launches. For prompts keys and values are made of the context's latents, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import TILE, DecodePlan, fixed_plan, split_plan
from baton.kernels.triton.latent_decode import head_tiles, latent_decode_attention
from baton.kernels.triton.latent_pairs import LatentPairs, absorb_pairs, raise_pairs
from baton.kernels.triton.latent_prefill import BLOCK_M, Expanded, latent_prefill_attention
from baton.kernels.triton.latent_products import absorb, raise_merged
from baton.kernels.triton.latent_write import latent_write, rotate_queries
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.rope_write import RopeTables
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.config import ModelConfig
from baton.models.cuda.attention import Attend, OfLayer, Repeating
from baton.models.cuda.products import PADDING
from baton.models.cuda.step_products import StepProducts
from baton.models.latent_config import LATENT_NORM_EPS, LatentConfig
from baton.models.layer_weights import LatentWeights, Weights
from baton.models.layers import LatentAttention
from baton.node.errors import SettingsError

EXPANDED_BYTES = 512 << 20
"""For keys and values of a slice of a step's context: 65,536 tokens of DeepSeek-V2-Lite."""
MOST_PARTS = 64
"""Of a row: more programs would not read faster, and what they leave has to be merged."""


class LatentLayers:
    """The layers of one model, and memory for what they compute of up to max_tokens tokens, max_rows of which decode;
    not for two steps at a time."""

    def __init__(self, weights: Weights, max_tokens: int, max_rows: int) -> None:
        self._layers = latent_layers(weights)
        shape, _ = self._layers[0]
        dims, dtype, device = shape.dims, weights.embedding.dtype, weights.embedding.device
        rows = max_tokens + PADDING if dims.query_rank is not None else 0
        self._query_latent = torch.zeros(rows, dims.query_rank or 1, dtype=dtype, device=device)
        self._queries = torch.zeros(rows, shape.num_heads * dims.query_dim, dtype=dtype, device=device)
        self._absorbed = torch.zeros(max_rows, shape.num_heads, dims.row_dim, dtype=dtype, device=device)

    def write(
        self,
        index: int,
        joined: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        rope: RopeTables,
        pool: PagedPool,
        query: torch.Tensor,
        products: StepProducts,
        *,
        pdl: bool,
    ) -> None:
        """Rotated queries [N, H, query_dim], and the slots [N] of layer `index`, of the first product's output
        [N, ...] or parts of it."""
        shape, weights = self._layers[index]
        interleaved, count = shape.dims.interleaved, len(query)
        target = query if weights.query is None else self._query_latent[:count]
        latent_write(
            joined, weights.latent_norm, weights.query_norm, LATENT_NORM_EPS, positions, kv_slots, rope, pool, index,
            target, interleaved=interleaved, pdl=pdl,
        )  # fmt: skip
        if weights.query is not None:
            made = products(index, "query", weights.query, target, self._queries[:count])
            rotate_queries(made, positions, rope, query, interleaved=interleaved, pdl=pdl)

    def attend_rows(
        self,
        pool: PagedPool,
        inputs: StepInputs,
        plan: DecodePlan,
        scratch: DecodeScratch,
        pdl: bool,
        pairs: LatentPairs | None,
    ) -> Attend:
        """Attention of one new token a row. pairs: what adapters change, of these rows and others behind them."""

        def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
            shape, weights = self._layers[layer]
            absorbed, scale = self._absorbed[: len(query)], shape.scores.scale

            def change_absorbed(layer: int, kv_up: torch.Tensor) -> None:
                if pairs is not None:
                    absorb_pairs(query, kv_up, absorbed, pairs, layer, pdl=pdl)

            def change_raised(layer: int, kv_up: torch.Tensor) -> None:
                if pairs is not None:
                    raise_pairs(scratch, plan, kv_up, out, pairs, layer, pdl=pdl)

            absorb_with = absorb(query, weights.kv_up, absorbed, pdl=pdl)
            change_absorbed(layer, weights.kv_up)
            attend = latent_decode_attention(absorbed, pool, layer, inputs.tables, plan, scratch, scale=scale, pdl=pdl)
            raise_with = raise_merged(scratch, plan, weights.kv_up, out, pdl=pdl)
            change_raised(layer, weights.kv_up)

            def of_layer(layer: int) -> None:
                kv_up = self._layers[layer][1].kv_up
                absorb_with(kv_up)
                change_absorbed(layer, kv_up)
                attend(layer)
                raise_with(kv_up)
                change_raised(layer, kv_up)

            return of_layer

        return Repeating(launch, [shape.scores for shape, _ in self._layers])


class LatentContext:
    """Memory of keys and values of prompts, for steps of up to max_tokens tokens; it is there before a pool is."""

    def __init__(self, weights: Weights, max_tokens: int, most_context: int, num_sms: int) -> None:
        """most_context: tokens of all sequences of a step together."""
        self._layers = latent_layers(weights)
        self._num_sms = num_sms
        shape, _ = self._layers[0]
        dims, dtype, device = shape.dims, weights.embedding.dtype, weights.embedding.device
        token_bytes = shape.num_heads * (dims.plain_dim + dims.value_dim) * dtype.itemsize
        tiles = max(1, min(EXPANDED_BYTES // token_bytes, most_context) // TILE)
        sizes = (max_tokens, shape.num_heads, dims.plain_dim, dims.value_dim, dims.rotated_dim)
        self._expanded = Expanded.make(tiles * TILE, *sizes, dtype, device)

    def table_width(self, sequences: int, block_tokens: int) -> int:
        """Of the widest tables with which the context of so many sequences is one slice."""
        return (
            len(self._expanded.keys) // sequences // max(block_tokens, TILE) * max(block_tokens, TILE) // block_tokens
        )

    def over_pool(self, pool: PagedPool) -> LatentChunks:
        return LatentChunks(self._layers, self._expanded, pool, self._num_sms)


class LatentChunks:
    """A ChunkAttention. Its bits depend on neither chunks nor slices."""

    tile = BLOCK_M

    def __init__(
        self,
        layers: Sequence[tuple[LatentAttention, LatentWeights]],
        expanded: Expanded,
        pool: PagedPool,
        num_sms: int,
    ) -> None:
        self._layers, self._expanded, self._pool, self._num_sms = layers, expanded, pool, num_sms

    def over(
        self,
        tables: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        work: torch.Tensor,
        pairs: LatentPairs | None = None,
    ) -> Attend:
        """As ChunkAttention. pairs: what adapters change of keys and values, of the chunks' tokens."""

        def launch(layer: int, query: torch.Tensor, out: torch.Tensor) -> OfLayer:
            shape, weights = self._layers[layer]
            of_layer = latent_prefill_attention(
                query, self._pool, layer, tables, starts, lengths, work, weights.kv_up, self._expanded, self._num_sms,
                out, scale=shape.scores.scale, pairs=pairs,
            )  # fmt: skip
            return lambda layer: of_layer(layer, self._layers[layer][1].kv_up)

        return Repeating(launch, [shape.scores for shape, _ in self._layers])


def latent_layers(weights: Weights) -> list[tuple[LatentAttention, LatentWeights]]:
    """Of all layers, if they attend so; empty if none does."""
    return [
        (layer.shape.attention, layer.attention)
        for layer in weights.layers
        if isinstance(layer.shape.attention, LatentAttention) and isinstance(layer.attention, LatentWeights)
    ]


def plan_latent_rows(num_rows: int, num_heads: int, max_tokens: int, num_sms: int, deterministic: bool) -> DecodePlan:
    """As models.cuda.decode_plans plans other attention."""
    tiles = head_tiles(num_heads)
    if deterministic:
        return fixed_plan(num_rows, tiles, max_tokens, num_sms)
    return split_plan(num_rows, tiles, min(num_sms, MOST_PARTS * num_rows * tiles))


def check_latent(config: ModelConfig, latent: LatentConfig) -> None:
    """SettingsError for what no kernel computes."""
    sizes = {
        "kv_lora_rank": latent.latent_dim,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotated_dim,
        "v_head_dim": latent.value_dim,
    }
    for key, size in sizes.items():
        if size < 16 or size & (size - 1) or size > 512:
            raise SettingsError(f"{key} {size}: the GPU's latent attention needs a power of two from 16 to 512")
    if latent.latent_dim <= latent.rotated_dim or latent.value_dim > latent.query_dim:
        raise SettingsError(f"{config.architecture}: latents, queries and values of {sizes} fit no kernel")
