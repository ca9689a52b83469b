"""Kernels of experts on a GPU, with the shapes of served models: even and skewed choices, and bits that do not move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.benchmark.harness.shapes import SHAPES
from baton.kernels import ClampedGate
from baton.kernels.routing import Routing
from baton.kernels.routing import route as choose_plainly
from baton.kernels.triton import experts_policy, prefill_gluon
from baton.kernels.triton.experts import experts
from baton.kernels.triton.linear_policy import ProductShape, Tiles
from baton.kernels.triton.spread import spread
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.layer_weights import Weights
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.tests.gpu.test_runner import LONGEST, exact_logits, table
from baton.tests.unit.kernels import expert_checks as checks
from baton.tests.unit.kernels.checks_8bit import FP8, INT8
from baton.tests.unit.kernels.kernel_checks import error, poison, randn
from baton.tests.unit.models.cuda.ahead import Ahead

pytestmark = pytest.mark.gpu

GPU, BF16 = "cuda", torch.bfloat16
QWEN3 = Routing(128, 8)
MIXTRAL = Routing(8, 2)
V2_LITE = Routing(64, 6, renormalised=False)
V3 = Routing(256, 8, sigmoid=True, scale=2.5, num_groups=8, kept_groups=4, groups_by_two=True)
HIDDEN, WIDTH = 2048, 768


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("routing", [QWEN3, MIXTRAL, V2_LITE, V3])
def test_route(routing, skewed, pdl):
    """Guards against a launch that starts before the counts of the one before are there."""
    for num_tokens in (1, 16, 40, 64, 700, 1100):
        checks.check_route(GPU, num_tokens, routing, 16, skewed=skewed, corrected=routing.sigmoid, pdl=pdl)
    checks.check_route(GPU, 64, routing, 16, gated=True, padded=7, skewed=skewed, pdl=pdl)


@pytest.mark.parametrize("rows", [1, 60, 300])
def test_router(rows):
    checks.check_router(GPU, BF16, rows, 128, 2048, 8, False)
    checks.check_router(GPU, BF16, rows, 60, 2048, 4, True, pdl=True)
    checks.check_router(GPU, BF16, rows, 8, 4096, 8, False, pdl=True)
    checks.check_router(GPU, BF16, rows, 32, 2880, 9, False, pdl=True)


@pytest.mark.parametrize("pdl", [False, True])
def test_products(pdl):
    """Guards against tiles of one expert that take another's rows, and an early load of the wrong expert's weight."""
    routing = Routing(16, 4)  # few experts: their weights are made on the host
    for fused in (True, False):
        shape = ProductShape(WIDTH, HIDDEN, True) if fused else ProductShape(HIDDEN, WIDTH)
        given = {"fused": fused, "gathered": fused, "skewed": True, "pdl": pdl}
        checks.check_experts(GPU, BF16, 1, routing, *shape[:2], experts_policy.row_tiles(shape), **given)
        for tile_m, num_tokens in ((16, 1), (16, 40), (32, 60), (64, 300)):
            tiles = experts_policy.rows_tiles(shape, tile_m, 100, 2)
            checks.check_experts(GPU, BF16, num_tokens, routing, *shape[:2], tiles, **given)


@pytest.mark.parametrize("code_type", [FP8, INT8])
@pytest.mark.parametrize("blocked", [False, True])
def test_products_of_8_bits(code_type, blocked):
    """FP8 is summed with 14 bits."""
    given = {"blocked": blocked, "skewed": True, "tolerance": 5e-4}
    gate_up, down = ProductShape(WIDTH, HIDDEN, True), ProductShape(HIDDEN, WIDTH)
    for tile_m, num_tokens, num_tiles in ((16, 4, 8), (16, 40, 100), (64, 300, 100)):
        pdl = num_tokens < 100
        wide = experts_policy.rows_tiles_8bit(gate_up, tile_m, num_tiles)
        narrow = experts_policy.rows_tiles_8bit(down, tile_m, num_tiles)
        common = GPU, code_type, num_tokens, Routing(8, 2)
        checks.check_experts_8bit(*common, *gate_up[:2], wide, fused=True, pdl=pdl, **given)
        checks.check_experts_8bit(*common, *down[:2], narrow, fused=False, pdl=pdl, **given)
    for shape in (gate_up, down):
        tiles = experts_policy.row_tiles_8bit(shape, blocked)
        row = GPU, code_type, BF16, Routing(8, 2), *shape[:2], tiles
        checks.check_experts_8bit_row(*row, blocked=blocked, fused=shape.fused, pdl=True)


def test_the_norm_sums_what_experts_add():
    for shared, gated in ((0, False), (1, True), (4, False)):
        checks.check_routed_norm(GPU, BF16, 100, 2048, shared, gated)


def some_weight(num_experts: int, n: int, k: int) -> torch.Tensor:
    return torch.empty(num_experts, n, k, dtype=BF16, device=GPU).normal_().mul_(k**-0.5)


def gluon(logits: torch.Tensor, routing: Routing, x: torch.Tensor, weight: torch.Tensor, gated: bool) -> torch.Tensor:
    """[T, k, N] by the kernel for prompts."""
    from baton.kernels.triton import experts_gluon

    routes = checks.routes_of(logits, routing, experts_gluon.TILE_M, GPU)
    rows, n = len(routes.tokens), weight.shape[1] // (2 if gated else 1)
    xs, out = poison((rows, x.shape[1]), BF16, GPU), poison((rows, n), BF16, GPU)
    spread(x, routes, xs)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    experts_gluon.experts_product(xs, weight, routes, sms, out, gated=gated)
    return out[routes.positions.long()]


def few_rows(logits: torch.Tensor, routing: Routing, x: torch.Tensor, weight: torch.Tensor, gated: bool, tile_m: int):
    """[T, k, N] by the kernel for few rows."""
    routes = checks.routes_of(logits, routing, tile_m, GPU)
    n = weight.shape[1] // (2 if gated else 1)
    tiles = experts_policy.rows_tiles(ProductShape(n, x.shape[1], gated), tile_m, routes.most_tiles, 2)
    out = poison((len(routes.tokens), n), BF16, GPU)
    experts(x, weight, routes, tiles, out, fused=gated, gathered=True)
    return out[routes.positions.long()]


needs_gluon = pytest.mark.skipif(
    not (torch.cuda.is_available() and prefill_gluon.is_available(torch.cuda.get_device_capability())),
    reason="the kernel for prompts is for Hopper",
)


@needs_gluon
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_products_of_prompts(skewed, gated):
    """Guards against a tile of the last expert, rows past a tile's last, and a width that tiles do not divide."""
    for routing, n, k in ((QWEN3, 768, 2048), (QWEN3, 2048, 768), (Routing(5, 2), 1096, 320)):
        weight = some_weight(routing.num_experts, n * (1 + gated), k)
        for num_tokens in (3, 1000):
            logits, x = checks.some_logits(num_tokens, routing.num_experts, skewed), randn((num_tokens, k), BF16, GPU)
            ids = choose_plainly(logits, None, routing)[0].to(GPU)
            found = gluon(logits, routing, x, weight, gated)
            plain = torch.stack([
                torch.stack([weight[ids[t, j]].double() @ x[t].double() for j in range(routing.top_k)])
                for t in range(0, num_tokens, 37)
            ])  # fmt: skip
            if gated:
                gate, up = plain.chunk(2, -1)
                plain = torch.nn.functional.silu(gate) * up
            assert bool(found.isfinite().all())
            assert error(found[::37], plain) <= 2 * error(plain.to(BF16), plain)


@pytest.mark.parametrize("gated", [False, True])
def test_biases_and_a_gate_within_bounds(gated):
    """Guards against another expert's bias, and gate and up exchanged; with the sizes of gpt-oss-20b, which few
    tiles divide."""
    routing, size, gate = Routing(8, 4), 2880, ClampedGate(1.5, 1.702)
    shape = ProductShape(size, size, gated)
    given = {"fused": gated, "gathered": gated, "skewed": True, "clamped": gate, "pdl": True}
    for tile_m, num_tokens in ((16, 1), (16, 40), (64, 300)):
        tiles = experts_policy.rows_tiles(shape, tile_m, 100, 2)
        checks.check_experts(GPU, BF16, num_tokens, routing, size, size, tiles, **given)
    checks.check_experts(GPU, BF16, 1, routing, size, size, experts_policy.row_tiles(shape), **given)


@pytest.mark.parametrize("gated", [False, True])
def test_bits_do_not_depend_on_the_other_tokens(gated):
    """Guards against another order of a sum where an expert has more rows."""
    n, k = (WIDTH, HIDDEN) if gated else (HIDDEN, WIDTH)
    weight = some_weight(128, n * (1 + gated), k)
    logits, x = checks.some_logits(500, 128, True), randn((500, k), BF16, GPU)
    alone = few_rows(logits[:1], QWEN3, x[:1], weight, gated, 16)
    for num_tokens in (2, 8, 16, 33, 64, 500):
        for tile_m in (16, 32, 64):
            assert torch.equal(few_rows(logits[:num_tokens], QWEN3, x[:num_tokens], weight, gated, tile_m)[:1], alone)


@needs_gluon
@pytest.mark.parametrize("gated", [False, True])
def test_prompts_have_the_bits_of_few_rows(gated):
    """Guards against a token whose bits depend on which of the two kernels its step takes."""
    n, k = (WIDTH, HIDDEN) if gated else (HIDDEN, WIDTH)
    weight = some_weight(128, n * (1 + gated), k)
    logits, x = checks.some_logits(500, 128, False), randn((500, k), BF16, GPU)
    wide, narrow = gluon(logits, QWEN3, x, weight, gated), few_rows(logits, QWEN3, x, weight, gated, 16)
    equal = float((wide == narrow).float().mean())
    assert equal > 0.99 if gated else equal == 1.0, equal  # silu is rounded otherwise


def make_runner(folder: Path, num_experts: int, top_k: int, deterministic: bool) -> tuple[CudaRunner, Weights]:
    """Of two layers of Qwen3-30B-A3B with other numbers of experts and random weights; over an empty pool."""
    shape = json.loads((SHAPES / "qwen3-30b-a3b" / "config.json").read_text())
    shape |= {"num_hidden_layers": 2, "vocab_size": 8192, "num_experts": num_experts, "num_experts_per_tok": top_k}
    (folder / "config.json").write_text(json.dumps(shape))
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, BF16, "cuda:0", "dummy", pack=False)
    runner = CudaRunner(config, weights, CudaQueue(0), StepLimits(16, 2048, 1, deterministic), LONGEST)
    pool = torch.zeros(200, config.num_kv_heads, 2, 2, 64, config.head_dim, dtype=BF16, device=GPU)
    runner.bind_pool(pool, LONGEST)
    return runner, weights


PROMPT = [number * 37 % 8000 for number in range(300)]


def test_a_model_computes_what_the_cpu_does(tmp_path):
    """Guards rows that are padding, and a sum that leaves an expert out. Every token goes to all experts: one that is
    chosen by a rounding alone would be another result."""
    runner, weights = make_runner(tmp_path, 8, 8, False)
    draw = Draw(SamplingSpec(max_tokens=99, temperature=0.0), (), 300, 0)
    found = runner.logits([Row(PROMPT, 0, table(0), draw)]).float().cpu()
    run = Ahead(runner)
    for slot in range(3):
        run.start(slot, PROMPT, table(slot))
    run.launch([0, 1, 2], chunk=1000)
    for _ in range(4):
        run.launch([0, 1, 2])  # a step of four rows
    tokens = run.generated(0)[:4]
    exact = exact_logits(runner.config, weights, PROMPT + tokens)
    assert error(found[0], exact[299]) < 0.02
    for step, token in enumerate(tokens):
        row = exact[299 + step]
        assert row.max() - row[token] < 0.05 * row.std(), step


def test_deterministic_tokens_do_not_depend_on_the_batch(tmp_path):
    """Guards against a choice, a product or a sum whose bits depend on the tokens beside."""
    runner, _ = make_runner(tmp_path, 64, 4, True)
    draw = Draw(SamplingSpec(max_tokens=99, temperature=0.0), (), 300, 0)
    whole = runner.logits([Row(PROMPT, 0, table(0), draw)]).clone()
    runner.logits([Row(PROMPT[:100], 0, table(1), draw)])
    assert torch.equal(runner.logits([Row(PROMPT[100:], 100, table(1), draw)]), whole)
    run = Ahead(runner)
    for slot in range(9):  # the same sequence in every row
        run.start(slot, PROMPT, table(slot))
    run.launch([0, 1, 2], chunk=1000)
    run.launch(list(range(3, 9)), chunk=1000)
    for _ in range(6):
        run.launch([0])
        run.launch(list(range(1, 9)))
    found = [run.generated(slot)[:6] for slot in range(9)]
    assert all(tokens == found[0] for tokens in found)


def test_tiles_of_all_shapes_fit():
    """Guards against a shape of the benchmark that has no tiles."""
    for hidden, width in ((2048, 768), (4096, 14336), (2048, 1408), (7168, 2048)):
        for shape in (ProductShape(width, hidden, True), ProductShape(hidden, width)):
            assert all(experts_policy.rows_tiles(shape, tile_m, 100, 2) for tile_m in (16, 32, 64))
            assert isinstance(experts_policy.row_tiles(shape), Tiles)
