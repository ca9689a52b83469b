"""From hidden states to the rows that each expert multiplies: a router's product, its choice, and the order by expert.

    logits[s] = x W^T over part s of the inputs (float32 [splits, T, E'], summed by the next kernel in the order of s)
    choice    = as `kernels.routing.route` with float32 logits: k experts of E for each token, and their weights
    order     = the T k pairs (token, choice) by expert, and within one by token; each expert begins at a tile of TILE_M

E' is E, or E + 1 where a shared expert has a gate: its logit is the last. A token chooses an expert once, so a pair's
place in its expert is the number of earlier tokens that chose it: a cumulative sum, no atomics, and the same order in
every run. Up to 4 tokens take one program and one launch; more take a launch to choose, in which each program
counts, and one in which each sums the counts of those before it. Nothing waits for the host: what follows launches
programs for `most_tiles`, and those from num_tiles on end at once. Bytes: the logits, once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.routing import Routing
from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require

TOKENS = ((256, 4), (1024, 16))
"""Up to so many tokens, a program has so many: one with 64 takes 20 us longer than one with 4."""
MANY_TOKENS = 32
"""With more tokens: each program reads the counts of all."""
FIXED_TOKENS = 16
"""Where a token's bits may not depend on how many there are."""
VALUES = 8192
"""Tokens times experts of a program: more would not fit its registers."""
ROUTER_TILE_K = 128
VALUES_A_WARP = 256
SUM_FLOOR = 1e-20
"""Added to the sum that weights are divided by: sigmoids may all be 0."""
BLOCKS = 32
"""Programs whose counts are summed at a time."""


class Routes(NamedTuple):
    """T tokens' places among the rows of experts, of tiles of tile_m."""

    tile_m: int
    positions: torch.Tensor  # int32 [T, k]: the row of each pair; -1 where it has none
    weights: torch.Tensor  # float32 [T, k]
    shared: torch.Tensor  # float32 [T]: sigmoid of the shared expert's logit; not written where it has none
    tokens: torch.Tensor  # int32 [most_tiles * tile_m]: of each row; not written where a tile has no row
    experts: torch.Tensor  # int32 [most_tiles]: of each tile, counted from the first that is held
    sizes: torch.Tensor  # int32 [most_tiles]: rows of each tile
    num_tiles: torch.Tensor  # int32 [1]
    ids: torch.Tensor  # int32 [T, k]: scratch
    counts: torch.Tensor  # int32 [programs, E]: scratch

    @property
    def most_tiles(self) -> int:
        return len(self.experts)

    @classmethod
    def make(cls, num_tokens: int, routing: Routing, tile_m: int, device: str) -> Routes:
        tiles = most_tiles(num_tokens, routing, tile_m)
        room = cls.of_room(num_tokens, routing, tiles, tiles * tile_m, device)
        return room.first(num_tokens, routing, tile_m)

    @classmethod
    def of_room(cls, num_tokens: int, routing: Routing, tiles: int, rows: int, device: str) -> Routes:
        """Memory for steps of up to so many tokens, tiles and rows of tiles, each of which takes its `first`."""
        pairs, programs = (num_tokens, routing.top_k), cdiv(num_tokens, TOKENS[0][1])

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            0, integers(*pairs), torch.zeros(pairs, device=device), torch.zeros(num_tokens, device=device),
            integers(rows), integers(tiles), integers(tiles), integers(1), integers(*pairs),
            integers(programs, routing.num_experts),
        )  # fmt: skip

    def first(self, num_tokens: int, routing: Routing, tile_m: int) -> Routes:
        """Of a step of so many tokens, in this memory."""
        tiles = most_tiles(num_tokens, routing, tile_m)
        require(tiles * tile_m <= len(self.tokens) and tiles <= len(self.experts), f"no memory for {tiles} tiles")
        return Routes(
            tile_m, self.positions[:num_tokens], self.weights[:num_tokens], self.shared[:num_tokens],
            self.tokens[: tiles * tile_m], self.experts[:tiles], self.sizes[:tiles], self.num_tiles,
            self.ids[:num_tokens], self.counts,
        )  # fmt: skip


def most_tiles(num_tokens: int, routing: Routing, tile_m: int) -> int:
    """That so many tokens can need, whatever they choose."""
    pairs = num_tokens * routing.top_k
    hit = min(routing.num_experts, pairs)
    return hit if num_tokens <= tile_m else hit + (pairs - hit) // tile_m


@triton.jit(do_not_specialize=["num_rows"])
def _router_kernel(
    x_ptr, weight_ptr, gate_ptr, out_ptr, num_rows, E: tl.constexpr, K: tl.constexpr, TILE_E: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    e = tl.program_id(1) * TILE_E + tl.arange(0, TILE_E)
    split = tl.program_id(2)
    column = tl.arange(0, TILE_K)
    x_place = x_ptr + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * K + column[None, :]
    place = weight_ptr + tl.minimum(e, E - 1)[:, None] * K + column[None, :]
    if GATED:
        place = tl.where((e == E)[:, None], gate_ptr + column[None, :], place)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([TILE_E, TILE_M], tl.float32)
    for k in tl.range(split * (K // SPLITS), (split + 1) * (K // SPLITS), TILE_K):
        weight = tl.load(place + k)
        x = tl.load(x_place + k).to(weight.dtype)
        total = tl.dot(weight, x.T, total, input_precision="ieee")
    WIDTH: tl.constexpr = E + 1 if GATED else E
    out = out_ptr + (split.to(tl.int64) * num_rows + m.to(tl.int64))[None, :] * WIDTH + e[:, None]
    tl.store(out, total, mask=(m < num_rows)[None, :] & (e < WIDTH)[:, None])


@triton.jit
def _best(values):
    """The largest of each row, and its place: of equals the first."""
    return tl.max(values, 1, return_indices=True)


@triton.jit
def _in_best_groups(
    values, e, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BY_TWO: tl.constexpr, BLOCK_G: tl.constexpr
):
    """values where the expert's group is one of the KEPT best, else -inf; [TOKENS, BLOCK_E]."""
    group, g = e // (E // GROUPS), tl.arange(0, BLOCK_G)
    of_groups = tl.full([values.shape[0], BLOCK_G], float("-inf"), tl.float32)
    for number in tl.static_range(GROUPS):
        inside = tl.where((group == number)[None, :], values, float("-inf"))
        most, first = _best(inside)
        if BY_TWO:
            most += tl.max(tl.where(e[None, :] == first[:, None], float("-inf"), inside), 1)
        of_groups = tl.where(g[None, :] == number, most[:, None], of_groups)
    kept = tl.zeros(values.shape, tl.int32)
    for _ in tl.static_range(KEPT):
        _, first = _best(of_groups)
        of_groups = tl.where(g[None, :] == first[:, None], float("-inf"), of_groups)
        kept = tl.where(group[None, :] == first[:, None], 1, kept)
    return tl.where(kept > 0, values, float("-inf"))


@triton.jit
def _place(
    order, before, total, t, e, positions_ptr, tokens_ptr, experts_ptr, sizes_ptr, num_tiles_ptr, writes_tiles,
    K: tl.constexpr, FIRST: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """order [TOKENS, BLOCK_E]: which choice an expert is to a token, -1: none. before, total [BLOCK_E]: pairs of each
    expert in programs before this one, and in all."""
    chosen = order >= 0
    ones = chosen.to(tl.int32)
    tiles = (total + TILE_M - 1) // TILE_M
    first_tile = tl.cumsum(tiles, 0) - tiles
    rank = tl.cumsum(ones, 0) - ones
    place = (first_tile * TILE_M + before)[None, :] + rank
    tl.store(positions_ptr + t[:, None] * K + order, place, mask=chosen)
    tl.store(tokens_ptr + place, tl.zeros_like(place) + t[:, None], mask=chosen)
    if writes_tiles:
        for number in tl.range(0, tl.max(tiles, 0)):
            inside = number < tiles
            tl.store(experts_ptr + first_tile + number, e - FIRST, mask=inside)
            tl.store(sizes_ptr + first_tile + number, tl.minimum(total - number * TILE_M, TILE_M), mask=inside)
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))


@triton.jit(do_not_specialize=["num_rows", "scale"])
def _choose_kernel(
    parts_ptr, bias_ptr, logit_bias_ptr, slots_ptr, ids_ptr, weights_ptr, shared_ptr, counts_ptr, positions_ptr,
    tokens_ptr, experts_ptr, sizes_ptr, num_tiles_ptr, num_rows, scale, E: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr, SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr, FLOOR: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BY_TWO: tl.constexpr,
    BLOCK_G: tl.constexpr, BIASED: tl.constexpr, LOGITS_BIASED: tl.constexpr, GATED: tl.constexpr,
    COUNTED: tl.constexpr, PLACE: tl.constexpr, FIRST: tl.constexpr, HELD: tl.constexpr, TILE_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COUNTED: tokens whose slot is below 0 choose nothing. PLACE: this program has all tokens, and puts them in order
    too. HELD experts from number FIRST on are computed here."""
    program = tl.program_id(0)
    t, e = program * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_E)
    inside, known = t < num_rows, e < E
    WIDTH: tl.constexpr = E + 1 if GATED else E
    place = parts_ptr + t.to(tl.int64)[:, None] * WIDTH + e[None, :]
    readable = inside[:, None] & known[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(place, mask=readable, other=0.0)
    for part in tl.static_range(1, SPLITS):
        logits += tl.load(place + part * num_rows.to(tl.int64) * WIDTH, mask=readable, other=0.0)
    if LOGITS_BIASED:
        logits += tl.load(logit_bias_ptr + e, mask=known, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(known[None, :], logits, float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    ranked = scores
    if BIASED:
        ranked += tl.load(bias_ptr + e, mask=known, other=0.0)[None, :]
    ranked = tl.where(known[None, :], ranked, float("-inf"))
    if GROUPS > 1:
        ranked = _in_best_groups(ranked, e, E, GROUPS, KEPT, BY_TWO, BLOCK_G)
    order = tl.full([TOKENS, BLOCK_E], -1, tl.int32)
    for choice in tl.static_range(K):
        _, first = _best(ranked)
        hit = e[None, :] == first[:, None]
        order = tl.where(hit, choice, order)
        ranked = tl.where(hit, float("-inf"), ranked)
    chosen = order >= 0
    weights = scores
    if RENORMALISED:
        weights = scores / (tl.sum(tl.where(chosen, scores, 0.0), 1) + FLOOR)[:, None]
    tl.store(weights_ptr + t[:, None] * K + order, weights * scale, mask=chosen & inside[:, None])
    if GATED:
        place = parts_ptr + t.to(tl.int64) * WIDTH + E
        logit = tl.load(place, mask=inside, other=0.0)
        for part in tl.static_range(1, SPLITS):
            logit += tl.load(place + part * num_rows.to(tl.int64) * WIDTH, mask=inside, other=0.0)
        tl.store(shared_ptr + t, 1.0 / (1.0 + tl.exp(-logit)), mask=inside)
    placed = chosen & inside[:, None] & ((e >= FIRST) & (e < FIRST + HELD))[None, :]
    if COUNTED:
        placed = placed & (tl.load(slots_ptr + t, mask=inside, other=-1) >= 0)[:, None]
    total = tl.sum(placed.to(tl.int32), 0)
    if PLACE:
        if COUNTED or HELD < E:
            nowhere = chosen & inside[:, None] & (placed == 0)
            tl.store(positions_ptr + t[:, None] * K + order, tl.zeros_like(order) - 1, mask=nowhere)
        _place(
            tl.where(placed, order, -1), tl.zeros_like(total), total, t, e, positions_ptr, tokens_ptr, experts_ptr,
            sizes_ptr, num_tiles_ptr, program == 0, K, FIRST, TILE_M,
        )  # fmt: skip
    else:
        ids = tl.where(placed, tl.zeros_like(order) + e[None, :], -1)
        tl.store(ids_ptr + t[:, None] * K + order, ids, mask=chosen & inside[:, None])
        tl.store(counts_ptr + program * E + e, total, mask=known)


@triton.jit(do_not_specialize=["num_rows"])
def _order_kernel(
    ids_ptr, counts_ptr, positions_ptr, tokens_ptr, experts_ptr, sizes_ptr, num_tiles_ptr, num_rows, E: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    TILE_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t, e = program * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_E)
    inside, known = t < num_rows, e < E
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    before = tl.zeros([BLOCK_E], tl.int32)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in tl.range(0, tl.num_programs(0), BLOCKS):
        each = first + tl.arange(0, BLOCKS)
        readable = (each < tl.num_programs(0))[:, None] & known[None, :]
        counts = tl.load(counts_ptr + each[:, None] * E + e[None, :], mask=readable, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((each < program)[:, None], counts, 0), 0)
    order = tl.full([TOKENS, BLOCK_E], -1, tl.int32)
    for choice in tl.static_range(K):
        expert = tl.load(ids_ptr + t * K + choice, mask=inside, other=-1)
        order = tl.where(expert[:, None] == e[None, :], choice, order)
        tl.store(positions_ptr + t * K + choice, tl.zeros_like(t) - 1, mask=inside & (expert < 0))
    _place(
        order, before, total, t, e, positions_ptr, tokens_ptr, experts_ptr, sizes_ptr, num_tiles_ptr, program == 0, K,
        FIRST, TILE_M,
    )  # fmt: skip


def router(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    out: torch.Tensor,
    *,
    fixed: bool = False,
    pdl: bool = False,
) -> None:
    """Fills out float32 [splits, T, E'] with parts of x W^T; x [T, K], weight [E, K], gate [1, K] of a shared expert.

    K must be a multiple of splits * 16. fixed: one tile for all numbers of tokens.
    """
    (num_rows, k), num_experts, splits = x.shape, weight.shape[0], out.shape[0]
    width = num_experts + (gate is not None)
    require(tuple(out.shape) == (splits, num_rows, width), f"out {tuple(out.shape)} is not [splits, T, {width}]")
    require(weight.shape[1] == k and (gate is None or gate.numel() == k), "weights have other inputs than x")
    require(gate is None or gate.dtype == weight.dtype, "the gate is not of the router's type")
    require(out.dtype == torch.float32, "logits must be float32")
    tile_k = next((size for size in (ROUTER_TILE_K, 64, 32, 16) if k % (splits * size) == 0), 0)
    require(tile_k > 0, f"{k} inputs do not divide into {splits} parts")
    for tensor in (x, weight, gate, out):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    tile_m = 16 if fixed or num_rows <= 64 else 64
    tile_e = min(64, max(16, next_power_of_2(width)))
    _router_kernel[(cdiv(num_rows, tile_m), cdiv(width, tile_e), splits)](
        x, weight, weight if gate is None else gate, out, num_rows, E=num_experts, K=k, TILE_E=tile_e, TILE_M=tile_m,
        TILE_K=tile_k, SPLITS=splits, GATED=gate is not None, PDL=pdl, **launch_options(4, pdl, 3),
    )  # fmt: skip


def program_tokens(num_tokens: int, num_experts: int, fixed: bool) -> int:
    """Tokens of a program that chooses. How a row's numbers lie in registers, and so the order of its sums, depends on
    it; fixed: it does not depend on num_tokens."""
    tokens = next((tokens for most, tokens in TOKENS if num_tokens <= most), MANY_TOKENS)
    return max(min(FIXED_TOKENS if fixed else tokens, VALUES // next_power_of_2(num_experts)), 1)


def choose(
    logits: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    kv_slots: torch.Tensor | None,
    held: range,
    routes: Routes,
    *,
    logit_bias: torch.Tensor | None = None,
    fixed: bool = False,
    pdl: bool = False,
) -> None:
    """Fills `routes` from logits float32 [splits, T, E] or [splits, T, E + 1], parts that are summed.

    bias: float32 [E], of scores; logit_bias: [E]. kv_slots: int32 [T]; tokens without one, -1, choose nothing:
    they pad the step. held: the experts that are computed here;
    `routes.experts` counts from the first of them. fixed: a token's bits do not depend on how many there are.
    """
    (splits, num_rows, width), e, k = logits.shape, routing.num_experts, routing.top_k
    require(width in (e, e + 1), f"logits of {width} experts, not {e}")
    require(tuple(routes.positions.shape) == (num_rows, k), f"room for {tuple(routes.positions.shape)} pairs")
    require(routes.most_tiles >= most_tiles(num_rows, routing, routes.tile_m), "tiles that have no place")
    require(k <= e and routing.kept_groups * (e // routing.num_groups) >= k, f"{k} of {e} experts cannot be chosen")
    require(e % routing.num_groups == 0, f"{routing.num_groups} groups do not divide {e} experts")
    require(0 <= held.start <= held.stop <= e, f"experts {held} are not of {e}")
    require(bias is None or (tuple(bias.shape) == (e,) and bias.dtype == torch.float32), "bias is not float32 [E]")
    require(logit_bias is None or tuple(logit_bias.shape) == (e,), "logit_bias is not [E]")
    require(kv_slots is None or tuple(kv_slots.shape) == (num_rows,), "kv_slots are not [T]")
    require(logits.dtype == torch.float32 and logits.is_contiguous(), "logits must be float32 and contiguous")
    if num_rows == 0:
        return
    block_e = next_power_of_2(e)
    tokens = program_tokens(num_rows, e, fixed)
    programs = cdiv(num_rows, tokens)
    alone, warps = programs == 1 and not fixed, min(16, max(4, tokens * block_e // VALUES_A_WARP))
    _choose_kernel[(programs,)](
        logits, logits if bias is None else bias, logits if logit_bias is None else logit_bias,
        routes.ids if kv_slots is None else kv_slots, routes.ids,
        routes.weights, routes.shared, routes.counts, routes.positions, routes.tokens, routes.experts, routes.sizes,
        routes.num_tiles, num_rows, routing.scale, E=e, K=k, TOKENS=tokens, BLOCK_E=block_e, SPLITS=splits,
        SIGMOID=routing.sigmoid, RENORMALISED=routing.renormalised, FLOOR=SUM_FLOOR, GROUPS=routing.num_groups,
        KEPT=routing.kept_groups, BY_TWO=routing.groups_by_two, BLOCK_G=next_power_of_2(routing.num_groups),
        BIASED=bias is not None, LOGITS_BIASED=logit_bias is not None, GATED=width > e,
        COUNTED=kv_slots is not None, PLACE=alone, FIRST=held.start, HELD=len(held), TILE_M=routes.tile_m, PDL=pdl,
        **launch_options(warps, pdl),
    )  # fmt: skip
    if not alone:
        _order_kernel[(programs,)](
            routes.ids, routes.counts, routes.positions, routes.tokens, routes.experts, routes.sizes, routes.num_tiles,
            num_rows, E=e, K=k, TOKENS=tokens, BLOCK_E=block_e, BLOCKS=BLOCKS, FIRST=held.start, TILE_M=routes.tile_m,
            PDL=pdl, **launch_options(warps, pdl),
        )  # fmt: skip
