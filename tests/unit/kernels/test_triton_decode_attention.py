"""Decode attention over the paged pool, and the plan of its chunks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import decode_attention, decode_work
from baton.kernels.triton.decode_plan import MERGE_COST, TILE, DecodePlan, fixed_plan, merged_parts, split_plan
from baton.kernels.triton.pool import PagedPool
from baton.tests.unit.kernels import kernel_checks as checks

WHOLE = DecodePlan(5, 3, chunk_tokens=256)
PIECES = DecodePlan(9, 3, chunk_tokens=64)
SHARED = DecodePlan(30, 3, splits=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [WHOLE, PIECES, SHARED])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_dtypes_and_plans(device, dtype, plan, block_tokens):
    """Guards against tokens past the end that count, blocks of another sequence, and parts merged wrongly."""
    checks.check_decode_attention(device, dtype, checks.Heads(4, 2, 64), [1, 64, 150], block_tokens, plan)


@pytest.mark.parametrize(
    ("heads", "block_tokens"),
    [
        ((1, 1, 64), 16),
        ((1, 1, 64), 128),
        ((5, 1, 80), 32),
        ((5, 1, 80), 64),
        ((8, 2, 96), 64),
        ((8, 2, 96), 128),
        ((7, 1, 128), 16),
        ((7, 1, 128), 32),
        ((7, 1, 128), 64),
        ((16, 1, 256), 64),
        ((16, 1, 256), 128),
    ],
)
def test_shapes(device, heads, block_tokens):
    """Guards against groups and head dimensions that are no powers of two, and pages larger or smaller than a tile."""
    checks.check_decode_attention(device, torch.bfloat16, checks.Heads(*heads), [70, 129], block_tokens, PIECES)


@pytest.mark.parametrize("plan", [WHOLE, PIECES, SHARED])
@pytest.mark.parametrize("window", [1, 64, 100])
def test_window(device, plan, window):
    """Guards against a window that is off by one, and merged parts of chunks before it, which were never written."""
    checks.check_decode_attention(device, torch.float32, checks.Heads(2, 1, 64), [30, 150, 192], 16, plan, window)


@pytest.mark.parametrize("plan", [WHOLE, PIECES])
@pytest.mark.parametrize("scales", ["none", "token"])
def test_scores_within_bounds(device, plan, scales):
    """Guards against bounds of scores that a scale, a mask or the other base of the exponent has changed before."""
    rule, heads = checks.ScoreRule(0.4, 1.5), checks.Heads(2, 1, 64)
    dtype = torch.float32 if scales == "none" else torch.float16
    checks.check_decode_attention(device, dtype, heads, [30, 150], 16, plan, 40, scales=scales, scores=rule)


@pytest.mark.parametrize(
    ("plan", "scales", "window"), [(WHOLE, "none", 40), (PIECES, "token", None), (SHARED, "none", None)]
)
def test_sinks(device, plan, scales, window):
    """Guards against a sink that counts once a part of a sequence, or of another head."""
    heads, dtype = checks.Heads(4, 2, 64), torch.float32 if scales == "none" else torch.bfloat16
    block_tokens = 16 if scales == "none" else 64
    given = {"scales": scales, "with_sinks": True}
    checks.check_decode_attention(device, dtype, heads, [1, 64, 150], block_tokens, plan, window, **given)


@pytest.mark.parametrize(
    ("heads", "block_tokens", "window", "chunk_tokens", "scales"),
    [
        ((4, 1, 64), 64, 62, 64, "none"),
        ((5, 1, 80), 16, None, 0, "none"),
        ((4, 1, 64), 64, None, 64, "token"),
    ],
)
def test_queries_that_read_together(device, heads, block_tokens, window, chunk_tokens, scales):
    """Guards against a draft that sees the tokens behind it, one that sees too few, and bits that depend on what a
    program computes besides: --deterministic rests on this. Queries end in different chunks, or see different first
    ones."""
    sequences, together = [(130, 3), (67, 6), (2, 1)], 16 // (heads[0] // heads[1])
    plan = DecodePlan(30, 3, splits=2, queries=together)
    if chunk_tokens:
        plan = fixed_plan(13, heads[1], 130, 1, chunk_tokens, queries=together)
        assert plan.queries == together and fixed_plan(13, heads[1], 130, 132, queries=together).queries == 1
    dtype = torch.bfloat16
    checks.check_queries_together(device, dtype, checks.Heads(*heads), sequences, block_tokens, plan, window, scales)


def test_fixed_chunks_do_not_depend_on_the_batch(device):
    """Guards against a row whose bits change with what else is in the step: --deterministic rests on this."""
    heads, plans = checks.Heads(4, 1, 64), [fixed_plan(1, 1, 150, 132, 64), fixed_plan(30, 1, 700, 132, 64)]
    alone = checks.check_decode_attention(device, torch.bfloat16, heads, [150], 64, plans[0])
    # The same first query row and the same contents of blocks cannot be had of another pool: build one by hand.
    paged = checks.Paged.make(device, torch.bfloat16, heads, [150], 64)
    tables = torch.nn.functional.pad(paged.tables, (0, 8)).repeat(3, 1)
    query = checks.randn((1, 4, 64), torch.bfloat16, device).repeat(3, 1, 1)
    scratch = decode_attention.DecodeScratch.make(3, plans[1].num_chunks, 4, 1, 64, device)
    out = checks.poison((3, 4, 64), torch.bfloat16, device)
    lengths = torch.tensor([7, 150, 0], dtype=torch.int32, device=device)
    decode_work.share_out(lengths, plans[1], scratch.work)
    decode_attention.decode_attention(query, paged.pool, 1, tables, lengths, plans[1], scratch, out)
    assert torch.equal(out[1], alone[0])
    assert bool(out[2].isnan().all()), "a row of length 0 is padding and stays as it was"


def chunks_of(lengths: list[int], plan: DecodePlan, device: str) -> list[list[int]]:
    """Rows of the work of a step: row, start, end, chunk, first, parts. It was full of another step's before."""
    before = torch.arange(decode_work.COLUMNS.value, dtype=torch.int32, device=device)  # begins at 1, ends at 2
    work = before.repeat(plan.num_chunks + 3, 1)
    decode_work.share_out(torch.tensor(lengths, dtype=torch.int32, device=device), plan, work)
    assert bool((work[plan.num_chunks :] == before).all()), "it wrote past the plan's chunks"
    return [chunk[:6] for chunk in work[: plan.num_chunks].tolist() if chunk[1] < chunk[2]]


def assert_all_is_shared_out(lengths: list[int], chunks: list[list[int]]) -> None:
    """Every token in one chunk, the largest first; those of a row follow each other, and each knows where they are and
    how many."""
    sizes = [chunk[3] for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True)
    for row, length in enumerate(lengths):
        mine = [(number, *chunk[1:]) for number, chunk in enumerate(chunks) if chunk[0] == row]
        starts, ends = [chunk[1] for chunk in mine], [chunk[2] for chunk in mine]
        assert [*starts, length] == [0, *ends], (row, mine)
        for number, start, _, size, first, parts in mine:
            assert size % TILE == 0 and start == (number - first) * size and parts == len(mine)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0, 1, 63, 64, 65, 500, 1000, 8192, 33000]), min_size=1, max_size=9), st.integers(1, 5))
def test_every_token_is_in_one_chunk(device, lengths, splits):
    """Guards against tokens that no program reads, or that two do, whatever lengths come together."""
    shared = DecodePlan((splits + 1) * len(lengths), 3, splits)
    assert_all_is_shared_out(lengths, chunks_of(lengths, shared, device))
    chunks = chunks_of(lengths, replace(shared, least_tokens=256), device)
    assert_all_is_shared_out(lengths, chunks)
    assert all(chunk[3] >= 256 for chunk in chunks)
    chunks = chunks_of(lengths, replace(shared, merged=4), device)
    assert_all_is_shared_out(lengths, chunks)
    assert all(parts <= max(4, (4 / MERGE_COST * -(-lengths[row] // TILE)) ** 0.5) for row, *_, parts in chunks)
    fixed = fixed_plan(len(lengths), 8, 33000, 132, 4096)
    assert_all_is_shared_out(lengths, chunks_of(lengths, fixed, device))


def test_a_long_sequence_is_cut_and_its_like_are_left_whole(device):
    """Guards against a step that waits for one program with the whole of a long sequence, and against cuts of rows that
    differ little, which cost more than they even out."""
    plan = split_plan(16, 32, 132)
    chunks = chunks_of([1000] * 15 + [8000], plan, device)
    assert max(end - start for _, start, end, *_ in chunks) < 1700 and len(chunks) == 15 + 5
    assert len(chunks_of([900, 1000, 1100, 1250] * 4, plan, device)) == 16


def test_the_largest_step_can_be_launched(monkeypatch):
    """Guards against a grid that CUDA refuses: only its first dimension may exceed 65535 programs."""
    grids = []

    class Launches:
        arg_names = decode_attention._decode_attention_kernel.arg_names

        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(decode_attention, "_decode_attention_kernel", Launches())
    plan, query, pool = fixed_plan(256, 8, 131072, 132), empty(256, 8, 16), PagedPool.of(empty(2, 8, 1, 2, 16, 16))
    tables, lengths = empty(256, 8192, dtype=torch.int32), empty(256, dtype=torch.int32)
    scratch = decode_attention.DecodeScratch.make(256, plan.num_chunks, 8, 8, 16, "meta")
    decode_attention.decode_attention(query, pool, 0, tables, lengths, plan, scratch, query)
    ((first, *others),) = grids
    assert first < 2**31 and all(size <= 65535 for size in others)
    assert math.prod(grids[0]) == 8 * plan.num_chunks == 8 * 65536


@settings(max_examples=300)
@given(st.integers(1, 512), st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 131072), st.integers(1, 200))
def test_a_plan_has_places_for_all(num_rows, kv_heads, max_tokens, num_sms):
    """Guards against fixed chunks that do not reach the longest sequence's end."""
    fixed = fixed_plan(num_rows, kv_heads, max_tokens, num_sms)
    assert fixed.num_chunks * fixed.chunk_tokens >= num_rows * max_tokens
    shared = split_plan(num_rows, kv_heads, num_sms)
    assert shared.num_chunks == (shared.splits + 1) * num_rows and shared.chunk_tokens == 0 < shared.splits


def test_plans_that_were_measured_best():
    """Guards against a rule that drifts from the measured optima, with 8 key heads."""
    assert [split_plan(rows, 8, 132).splits for rows in (1, 2, 8, 9, 16, 20, 256)] == [16, 8, 2, 1, 1, 1, 1]
    assert [split_plan(rows, 8, 132).num_stages for rows in (1, 16, 24, 32, 48, 64, 96)] == [9, 9, 7, 7, 5, 7, 3]


def test_parts_that_are_merged_at_a_time():
    """Guards against programs whose parts take more registers than there are, and against a plan whose sequences have
    more parts than one program can merge soon."""
    assert [merged_parts(elements) for elements in (64, 256, 512, 1024, 2048, 4096)] == [16, 16, 8, 4, 2, 2]
    assert [merged_parts(elements, 16) for elements in (256, 512, 1024, 2048, 4096)] == [16, 16, 8, 4, 2]
    assert [split_plan(rows, 8, 132, elements=512).merged for rows in (1, 2, 16)] == [16, 8, 8]
    assert split_plan(1, 8, 132, 4, elements=512).merged == 8


def test_plans_for_fp8_fill_a_multiprocessor_several_times():
    """Guards against one program a multiprocessor, which waits for its own arithmetic."""
    plans = [split_plan(rows, 8, 132, 4) for rows in (1, 8, 16, 32, 64, 128)]
    assert [plan.splits for plan in plans] == [66, 8, 4, 2, 1, 1]
    assert [plan.num_stages for plan in plans] == [7] * 6
    assert [split_plan(rows, 8, 132, 4).num_stages for rows in (40, 48)] == [9, 9]
