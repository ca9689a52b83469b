"""Checks of what adapters add to products with experts, for any device; as `expert_checks`."""

from __future__ import annotations

import torch

from baton.kernels.routing import Routing
from baton.kernels.routing import route as choose_plainly
from baton.kernels.triton import expert_pairs
from baton.kernels.triton.experts import experts
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.low_rank import AdapterBank, BankSite
from baton.tests.unit.kernels.adapter_checks import some_adapters
from baton.tests.unit.kernels.expert_checks import routes_of, some_logits
from baton.tests.unit.kernels.kernel_checks import error, poison, randn


def check_experts_added(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    routing: Routing,
    n: int,
    k: int,
    tiles: Tiles,
    ranks: list[int],
    max_rank: int,
    held: range | None = None,
    pdl: bool = False,
) -> None:
    """Gate and up with what adapters add before the gate, then another product to which it is added in place. Rows of
    tokens without an adapter have the bits of the products alone."""
    held, count = held or range(routing.num_experts), len(ranks)
    logits = some_logits(num_tokens, routing.num_experts, False)
    ids, _ = choose_plainly(logits, None, routing)
    routes = routes_of(logits, routing, max(tiles.tile_m, 1), device, held=held)
    of_tokens = some_adapters(num_tokens, count, device, 3)
    of_tokens[0] = 0
    e, rows = len(held), routes.most_tiles * routes.tile_m
    first, second = BankSite(1, 32, 32 + e * 2 * k, k, (n, 2 * n)), BankSite(2, 0, e * n, n, (k,))
    second = second._replace(a_offset=first.b_offset + e * 2 * n, b_offset=first.b_offset + e * 3 * n)
    numbers = poison((count, max_rank * (second.b_offset + e * k)), dtype, device)
    of_sites = torch.zeros(count, 3, dtype=torch.int32, device=device)
    of_sites[:, 1:] = torch.tensor(ranks, device=device)[:, None]
    a, b = [], []
    for slot, rank in enumerate(ranks):
        shapes = ((e, 2, rank, k), (e, 2 * n, rank), (e, 1, rank, n), (e, k, rank))
        made = [randn(shape, torch.float32, "cpu", 10 * slot + seed) for seed, shape in enumerate(shapes)]
        made = [(each / width**0.5).to(dtype).to(device) for each, width in zip(made, (k, 1, n, 1), strict=True)]
        offsets = (first.a_offset, first.b_offset, second.a_offset, second.b_offset)
        for offset, each in zip(offsets, made, strict=True):
            numbers[slot, rank * offset :][: each.numel()] = each.flatten()
        a.append((made[0].double(), made[2].double()))
        b.append((made[1].double(), made[3].double()))
    bank = AdapterBank(numbers, of_sites, max_rank)
    up = (randn((e, 2 * n, k), torch.float32, "cpu", 1) / k**0.5).to(dtype).to(device)
    x = randn((num_tokens, k), dtype, device, 2)
    pairs = [expert_pairs.ExpertPairs(bank, site, of_tokens) for site in (first, second)]
    hidden = poison((num_tokens * routing.top_k * 2 * max_rank,), torch.float32, device)
    added = poison((rows, 2 * n), dtype, device)
    gated, alone = poison((rows, n), dtype, device), poison((rows, n), dtype, device)
    expert_pairs.add_experts(x, pairs[0], routes, hidden, added, gathered=True, add=False, pdl=pdl)
    made = expert_pairs.MadePairs(added, of_tokens)
    experts(x, up, routes, tiles, gated, fused=True, gathered=True, added=made, pdl=pdl)
    experts(x, up, routes, tiles, alone, fused=True, gathered=True, pdl=pdl)
    before = randn((rows, k), dtype, device, 5)
    down = before.clone()
    expert_pairs.add_experts(gated, pairs[1], routes, hidden, down, gathered=False, add=True, pdl=pdl)

    exact_gated, exact_down, places = [], [], []
    for token in range(num_tokens):
        slot = int(of_tokens[token])
        for choice, expert in enumerate(ids[token].tolist()):
            place = int(routes.positions[token, choice])
            assert (place >= 0) == (expert in held)
            if place < 0:
                continue
            own, row = expert - held.start, x[token].double()
            wide = up[own].double() @ row
            added_down = torch.zeros(k, dtype=torch.float64, device=device)
            if slot >= 0 and ranks[slot]:
                (a_up, a_down), (b_up, b_down) = a[slot], b[slot]
                for part in range(2):
                    cut = slice(part * n, part * n + n)
                    wide[cut] += b_up[own, cut] @ (a_up[own, part] @ row)
                added_down = b_down[own] @ (a_down[own, 0] @ gated[place].double())
            exact_gated.append(torch.nn.functional.silu(wide[:n]) * wide[n:])
            exact_down.append(before[place].double() + added_down)
            places.append(place)
            if slot < 0:
                assert torch.equal(gated[place], alone[place]) and torch.equal(down[place], before[place])
    for found, exact in ((gated, torch.stack(exact_gated)), (down, torch.stack(exact_down))):
        assert error(found[places], exact) <= 4 * max(error(exact.to(dtype), exact), 1e-6)
