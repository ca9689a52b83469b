"""Checks of the kernels of experts, for any device; as `kernel_checks`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels import ClampedGate, clamped_gate_and_mul, reference
from baton.kernels.routing import Routing
from baton.kernels.routing import route as choose_plainly
from baton.kernels.triton import norm, route
from baton.kernels.triton.experts import experts
from baton.kernels.triton.experts_8bit import experts_8bit
from baton.kernels.triton.experts_8bit_row import experts_8bit_row
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.quantise import RUN, CodedRows
from baton.kernels.triton.route import Routes
from baton.kernels.triton.routed_sum import RoutedSum
from baton.kernels.triton.spread import spread
from baton.tests.unit.kernels.checks_8bit import quantised
from baton.tests.unit.kernels.kernel_checks import EPS, error, poison, randn

SKEW = 3.0


def some_logits(num_tokens: int, num_experts: int, skewed: bool, seed: int = 0) -> torch.Tensor:
    """float32 [T, E]; skewed: the first experts are chosen most, and most never."""
    logits = randn((num_tokens, num_experts), torch.float32, "cpu", seed)
    return logits - SKEW * torch.arange(num_experts).log1p() if skewed else logits


def routes_of(
    logits: torch.Tensor,
    routing: Routing,
    tile_m: int,
    device: str,
    slots: torch.Tensor | None = None,
    held: range | None = None,
    parts: int = 1,
    correction: torch.Tensor | None = None,
    pdl: bool = False,
) -> Routes:
    """In memory of other numbers."""
    made = Routes.make(len(logits), routing, tile_m, device)
    for tensor in made[1:]:
        tensor.fill_(77)
    whole = torch.stack([logits, *[torch.zeros_like(logits)] * (parts - 1)]).to(device)
    at = [None if tensor is None else tensor.to(device) for tensor in (correction, slots)]
    route.choose(whole, routing, at[0], at[1], held or range(routing.num_experts), made, pdl=pdl)
    return made


def check_route(
    device: str,
    num_tokens: int,
    routing: Routing,
    tile_m: int,
    *,
    skewed: bool = False,
    corrected: bool = False,
    gated: bool = False,
    padded: int = 0,
    held: range | None = None,
    pdl: bool = False,
) -> None:
    """Choices and weights are the reference's, and each pair has a row of its own in a tile of its expert, in order."""
    held, e = held or range(routing.num_experts), routing.num_experts
    logits = some_logits(num_tokens, e, skewed)
    logits[0, : min(e, 3)] = logits[0].max()  # equals: the first count
    correction = randn((e,), torch.float32, "cpu", 5) if corrected else None
    ids, weights = choose_plainly(logits, correction, routing)
    if gated:
        logits = torch.cat([logits, randn((num_tokens, 1), torch.float32, "cpu", 6)], 1)
    slots = torch.where(torch.arange(num_tokens) < num_tokens - padded, 0, -1).int() if padded else None
    found = routes_of(logits, routing, tile_m, device, slots, held, 2, correction, pdl)
    torch.testing.assert_close(found.weights.cpu(), weights, rtol=1e-5, atol=1e-7)
    if gated:
        torch.testing.assert_close(found.shared.cpu(), logits[:, e].sigmoid())
    counted = torch.arange(num_tokens)[:, None] < num_tokens - padded
    local = counted & (ids >= held.start) & (ids < held.stop)
    positions = found.positions.cpu().long()
    assert bool((positions[~local] == -1).all())
    number = int(found.num_tiles)
    owners, sizes = found.experts.cpu()[:number], found.sizes.cpu()[:number]
    assert number <= found.most_tiles and bool((sizes > 0).all()) and int(sizes.sum()) == int(local.sum())
    assert torch.equal(owners[positions[local] // tile_m].long() + held.start, ids[local])
    expected = []
    for expert in held:
        of_expert = (local & (ids == expert)).any(1).nonzero().flatten().tolist()
        expected += [of_expert[first : first + tile_m] for first in range(0, len(of_expert), tile_m)]
    tokens = found.tokens.cpu().view(-1, tile_m)
    assert [tokens[i, : sizes[i]].tolist() for i in range(number)] == expected
    rows = tokens.flatten()[positions.clamp(min=0)]
    assert bool((rows == torch.arange(num_tokens)[:, None])[local].all())


def check_router(
    device: str, dtype: torch.dtype, rows: int, num_experts: int, k: int, splits: int, gated: bool, pdl: bool = False
) -> None:
    x, weight = randn((rows, k), dtype, device), randn((num_experts, k), dtype, device, 1)
    gate = randn((1, k), dtype, device, 2) if gated else None
    out = poison((splits, rows, num_experts + gated), torch.float32, device)
    route.router(x, weight, gate, out, pdl=pdl)
    whole = weight if gate is None else torch.cat([weight, gate])
    assert error(out.sum(0), x.double() @ whole.double().t()) < 1e-6


def check_experts(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    routing: Routing,
    n: int,
    k: int,
    tiles: Tiles,
    *,
    fused: bool = False,
    gathered: bool = False,
    skewed: bool = False,
    pdl: bool = False,
    clamped: ClampedGate | None = None,
) -> None:
    """Each pair's row is the product of its token with its expert; with biases where a gate is clamped."""
    e, tile_m = routing.num_experts, max(tiles.tile_m, 1)
    logits = some_logits(num_tokens, e, skewed)
    ids, _ = choose_plainly(logits, None, routing)
    routes = routes_of(logits, routing, tile_m, device)
    weight = (randn((e, 2 * n if fused else n, k), torch.float32, "cpu", 1) / k**0.5).to(dtype).to(device)
    x = randn((num_tokens, k), dtype, device, 2)
    given = x
    if not gathered:
        given = poison((len(routes.tokens), k), dtype, device)
        spread(x, routes, given)
    out = poison((len(routes.tokens), n), dtype, device)
    bias = None if clamped is None else randn((e, weight.shape[1]), dtype, device, 3)
    common = {"bias": bias, "clamped": clamped if fused else None}
    experts(given, weight, routes, tiles, out, fused=fused, gathered=gathered, pdl=pdl, **common)
    exact = _products(x.double(), weight.double(), ids.to(device), fused, bias, clamped)
    found = out[routes.positions.long()]
    assert error(found, exact) <= max(2 * error(exact.to(dtype), exact), 1e-6)


def _products(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    fused: bool,
    bias: torch.Tensor | None = None,
    clamped: ClampedGate | None = None,
) -> torch.Tensor:
    """[T, k, N], in float64."""
    exact = torch.stack([torch.einsum("td,tnd->tn", x, weight[ids[:, j]]) for j in range(ids.shape[1])], 1)
    if bias is not None:
        exact = exact + bias[ids].double()
    if not fused:
        return exact
    if clamped is not None:
        return clamped_gate_and_mul(exact, clamped)
    gate, up = exact.chunk(2, -1)
    return F.silu(gate) * up


def check_experts_8bit(
    device: str,
    code_type: torch.dtype,
    num_tokens: int,
    routing: Routing,
    n: int,
    k: int,
    tiles: Tiles,
    *,
    blocked: bool,
    fused: bool,
    skewed: bool = False,
    pdl: bool = False,
    tolerance: float = 1e-5,
) -> None:
    """fused: from tokens in codes to rows in codes of runs; else from rows in codes of runs to plain ones."""
    e, tile_m = routing.num_experts, tiles.tile_m
    logits = some_logits(num_tokens, e, skewed)
    ids, _ = choose_plainly(logits, None, routing)
    routes = routes_of(logits, routing, tile_m, device)
    num_rows, wide = len(routes.tokens), 2 * n if fused else n
    weight = randn((e * wide, k), torch.float32, "cpu", 1) / k**0.5
    codes, scales, weight = quantised(weight, code_type, *((128, 128) if blocked else (1, k)))
    codes, scales = codes.view(e, wide, k).to(device), (scales if blocked else scales[:, 0]).contiguous().to(device)
    run = RUN if blocked or not fused else k
    x_codes, x_scales, exact_x = quantised(randn((num_tokens, k), torch.float32, "cpu", 2), code_type, 1, run)
    of_tokens = x_scales.t().contiguous() if run < k else x_scales[:, 0].contiguous()
    x, out = CodedRows(x_codes.to(device), of_tokens.to(device)), poison((num_rows, n), torch.bfloat16, device)
    if not fused:
        of_pairs = routes.tokens.long() % num_tokens
        x = CodedRows(x.codes[of_pairs], x.scales[:, of_pairs].contiguous())
    target: torch.Tensor | CodedRows = out
    if fused:
        of_rows = poison((n // RUN, num_rows), torch.float32, device)
        target = CodedRows(torch.full((num_rows, n), 77, dtype=torch.uint8, device=device).view(code_type), of_rows)
    experts_8bit(x, codes, scales, routes, tiles, target, fused=fused, gathered=fused, pdl=pdl)
    exact = _products(exact_x.to(device), weight.view(e, wide, k).to(device), ids.to(device), fused).cpu()
    positions = routes.positions.long()
    if isinstance(target, CodedRows):
        found = target.codes[positions].float() * target.scales.t()[positions].repeat_interleave(RUN, -1)
        plain, plain_scales = reference.quantise(exact.flatten(0, 1).float(), code_type, RUN)
        rounded = plain.float() * plain_scales.t().repeat_interleave(RUN, 1)
        bound = 1.1 * error(rounded, exact.flatten(0, 1))
    else:
        found, bound = out[positions], max(2 * error(exact.to(out.dtype), exact), tolerance)
    assert error(found.cpu(), exact) <= bound, f"error {error(found.cpu(), exact):.2e}, allowed {bound:.2e}"


def check_experts_8bit_row(
    device: str,
    code_type: torch.dtype,
    dtype: torch.dtype,
    routing: Routing,
    n: int,
    k: int,
    tiles: Tiles,
    *,
    blocked: bool,
    fused: bool,
    pdl: bool = False,
) -> None:
    """Of one token, plain: the rows of the experts that it chose. fused: gathered too."""
    e, wide = routing.num_experts, 2 * n if fused else n
    logits = some_logits(1, e, False)
    ids, _ = choose_plainly(logits, None, routing)
    routes = routes_of(logits, routing, 1, device)
    codes, scales, weight = quantised(
        randn((e * wide, k), torch.float32, "cpu", 1) / k**0.5, code_type, *((128, 128) if blocked else (1, k))
    )
    codes, scales = codes.view(e, wide, k).to(device), (scales if blocked else scales[:, 0]).contiguous().to(device)
    x, out = randn((1, k), dtype, device, 2), poison((len(routes.tokens), n), dtype, device)
    given = x if fused else x.repeat(len(routes.tokens), 1)
    experts_8bit_row(given, codes, scales, routes, tiles, out, fused=fused, gathered=fused, pdl=pdl)
    exact = _products(x.double(), weight.view(e, wide, k).to(device), ids.to(device), fused)
    assert error(out[routes.positions.long()], exact) <= max(2 * error(exact.to(dtype), exact), 1e-6)


def check_routed_norm(device: str, dtype: torch.dtype, rows: int, width: int, shared: int, gated: bool) -> None:
    """shared: parts of what the shared expert adds; 0: there is none."""
    routing = Routing(4, 2)
    logits = some_logits(rows, 5 if gated else 4, False)
    counted = torch.arange(rows) < max(1, rows - 1)
    routes = routes_of(logits, routing, 16, device, counted.int() - 1)
    y = poison((len(routes.tokens), width), dtype, device)
    y[routes.positions[counted].flatten().long()] = randn((2 * int(counted.sum()), width), dtype, device)
    parts = randn((shared, rows, width), torch.float32, device, 3) if shared else None
    residual, weight = randn((rows, width), dtype, device, 1), randn((width,), dtype, device, 2)
    exact = (y[routes.positions.clamp(min=0).long()].double() * routes.weights.double()[..., None]).sum(1)
    exact[~counted] = 0.0
    if parts is not None:
        exact += parts.double().sum(0) * (logits[:, 4:].sigmoid().double().to(device) if gated else 1.0)
    exact = (residual.double() + exact).to(dtype)
    out = poison((rows, width), dtype, device)
    norm.add_rms_norm(RoutedSum(y, routes, parts, gated), residual, weight, EPS, out)
    assert error(residual, exact) <= (1e-6 if dtype == torch.float32 else 2e-3)
    plain = reference.rms_norm(residual, weight, EPS)
    assert error(out, plain.double()) <= (1e-6 if dtype == torch.float32 else 4e-3)
