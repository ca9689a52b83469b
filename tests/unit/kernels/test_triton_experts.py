"""Kernels of experts in Triton's interpreter: which rows belong to which expert, their products, and their sum."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import ClampedGate
from baton.kernels.routing import Routing
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.route import program_tokens
from baton.tests.unit.kernels import expert_checks as checks
from baton.tests.unit.kernels.checks_8bit import FP8, INT8

FEW, MANY = Routing(6, 2), Routing(20, 4, renormalised=False, scale=2.0)
DEEPSEEK_V2 = Routing(12, 3, renormalised=False, scale=1.5, num_groups=4, kept_groups=2)
DEEPSEEK_V3 = Routing(16, 4, sigmoid=True, scale=2.5, num_groups=4, kept_groups=2, groups_by_two=True)


@pytest.mark.parametrize("routing", [FEW, MANY, DEEPSEEK_V2, DEEPSEEK_V3])
def test_route(device, routing):
    """Guards against another order of equals, an expert without rows or with several tiles, and a count left out."""
    for num_tokens in (3, 18):
        checks.check_route(device, num_tokens, routing, 16, skewed=num_tokens > 3, corrected=routing.sigmoid)


def test_route_of_rows_that_pad_and_of_held_experts(device):
    """Guards against padding that has experts read, and rows of another rank's."""
    for num_tokens in (4, 9):
        checks.check_route(device, num_tokens, MANY, 4, gated=True, padded=3)
        checks.check_route(device, num_tokens, MANY, 4, held=range(5, 10), skewed=True)


def test_fixed_programs_do_not_depend_on_the_number_of_tokens():
    """Guards against sums in another order: of 64 experts a thread has two with four tokens a program, four with 16."""
    for num_experts in (8, 64, 128, 2048):
        assert len({program_tokens(tokens, num_experts, True) for tokens in (1, 4, 100, 300, 8192)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router(device, dtype):
    """Guards against a number of experts that no tile divides, and a gate that is taken for an expert."""
    checks.check_router(device, dtype, 3, 60, 128, 2, True)
    checks.check_router(device, dtype, 20, 8, 48, 1, False)
    checks.check_router(device, dtype, 5, 32, 576, 9, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fused", "gathered"), [(True, True), (False, False)])
def test_experts(device, dtype, fused, gathered):
    """Guards against rows past a tile's last, another expert's weight, and gate and up exchanged."""
    given = {"fused": fused, "gathered": gathered}
    checks.check_experts(device, dtype, 20, FEW, 64, 64, Tiles(64, 32, 16, 2, 1), skewed=True, **given)
    checks.check_experts(device, dtype, 1, FEW, 16, 64, Tiles(4, 32, 0, 1, 1), **given)


@pytest.mark.parametrize(("fused", "gathered"), [(True, True), (False, False)])
def test_biases_and_a_gate_within_bounds(device, fused, gathered):
    """Guards against another expert's bias, one that is added behind the gate, and up that is bounded like gate."""
    given = {"fused": fused, "gathered": gathered, "clamped": ClampedGate(1.2, 1.702)}
    checks.check_experts(device, torch.float32, 20, FEW, 64, 64, Tiles(32, 32, 16, 2, 1), skewed=True, **given)
    checks.check_experts(device, torch.float32, 1, FEW, 16, 64, Tiles(4, 32, 0, 1, 1), **given)


@pytest.mark.parametrize("code_type", [FP8, INT8])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_8_bits(device, code_type, blocked, fused):
    """Guards against the scale of another expert, row or run, and codes of a run that begins elsewhere."""
    tiles = Tiles(128 if fused else 64, 128, 16, 2, 1)
    checks.check_experts_8bit(device, code_type, 20, FEW, 128, 256, tiles, blocked=blocked, fused=fused, skewed=True)


@pytest.mark.parametrize(("code_type", "blocked"), [(FP8, False), (FP8, True), (INT8, False)])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_8_bits_and_one_token(device, code_type, blocked, fused):
    """Guards against the scale of another expert or block, and of gate for up."""
    given = {"blocked": blocked, "fused": fused}
    checks.check_experts_8bit_row(device, code_type, torch.float32, FEW, 256, 384, Tiles(32, 128, 0, 3, 1), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "gated"), [(0, False), (1, True), (2, False)])
def test_the_norm_sums_what_experts_add(device, dtype, shared, gated):
    """Guards against a row that no expert wrote, and a gate that is applied to all experts."""
    checks.check_routed_norm(device, dtype, 3, 200, shared, gated)
