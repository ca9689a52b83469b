"""decode.scheduler: no row without blocks, the oldest sequence always advances, admission is in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.decode.scheduler import DecodeLimits, Item, PlannedRow, plan

LIMITS = DecodeLimits(
    block_tokens=4, max_num_seqs=8, max_num_batched_tokens=32, max_chunk_tokens=16, full_step_tokens=20
)


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // LIMITS.block_tokens)


@st.composite
def _running(draw: st.DrawFn) -> Item:
    """A running sequence: blocks for all tokens at admission, and at most one appended token without a block."""
    num_tokens = draw(st.integers(1, 60))
    num_computed = draw(st.integers(0, num_tokens - 1))
    return Item(num_tokens, num_computed, _blocks(num_tokens - draw(st.integers(0, 1))))


@st.composite
def _waiting(draw: st.DrawFn) -> Item:
    """A sequence without blocks, of which the pool may have a prefix."""
    num_tokens = draw(st.integers(1, 60))
    return Item(num_tokens, draw(st.integers(0, num_tokens - 1)), 0)


@given(st.lists(_running(), max_size=8), st.lists(_waiting(), max_size=4), st.integers(0, 40))
def test_a_plan_is_feasible(running: list[Item], waiting: list[Item], free: int) -> None:
    """Guards against over-commitment: blocks, token budget, rows, and a row for a preempted sequence."""
    result = plan(running, waiting, free, LIMITS)
    for index in result.preempted:
        free += running[index].num_blocks
    for step in result.rows:
        item = running[step.item]
        assert step.item not in result.preempted
        assert 0 < step.length <= min(item.num_tokens - item.num_computed, LIMITS.max_chunk_tokens)
        free -= max(0, _blocks(item.num_computed + step.length) - item.num_blocks)
    admitted = waiting[: len(result.admitted)]
    free -= sum(_blocks(item.num_tokens + 1) for item in admitted)
    assert free >= 0
    for item, length in zip(admitted, result.admitted, strict=True):
        assert 0 <= length <= min(item.num_tokens - item.num_computed, LIMITS.max_chunk_tokens)
    lengths = [*(step.length for step in result.rows), *result.admitted]
    assert sum(lengths) <= LIMITS.max_num_batched_tokens
    chunks = [length for length in lengths if length > 1]
    assert len(chunks) < 2 or sum(chunks) <= LIMITS.full_step_tokens
    alive = len(running) - len(result.preempted)
    assert not admitted or alive + len(admitted) <= LIMITS.max_num_seqs


@given(st.lists(_running(), min_size=1, max_size=8), st.integers(0, 40))
def test_the_oldest_advances_or_none_can(running: list[Item], free: int) -> None:
    """Guards against livelock: younger sequences are preempted, in order, before the oldest stalls."""
    result = plan(running, [], free, LIMITS)
    assert result.preempted == tuple(range(len(running) - 1, len(running) - 1 - len(result.preempted), -1))
    if 0 in result.preempted:
        assert free + sum(other.num_blocks for other in running[1:]) == 0
    else:
        assert result.rows[0].item == 0


def test_every_running_sequence_decodes_beside_a_chunk() -> None:
    """Guards TBT: a prompt's chunk takes only the budget left after one token for each running sequence."""
    prompt = Item(num_tokens=100, num_computed=0, num_blocks=25)
    decoding = Item(num_tokens=10, num_computed=9, num_blocks=3)
    result = plan([prompt, *[decoding] * 7], [], 0, LIMITS)
    assert [(s.item, s.length) for s in result.rows] == [(0, 16), *[(i, 1) for i in range(1, 8)]]


def test_no_admission_while_a_sequence_is_preempted() -> None:
    """Guards against thrashing: blocks freed by preemption belong to the running ones."""
    result = plan([Item(5, 4, 1), Item(9, 8, 2)], [Item(1, 0, 0)], 0, LIMITS)
    assert result.preempted == (1,) and not result.admitted


def test_waiting_sequences_do_not_overtake() -> None:
    """Guards against starvation of a long sequence by short ones behind it."""
    assert plan([], [Item(40, 0, 0), Item(1, 0, 0)], 5, LIMITS).admitted == ()
    assert plan([], [Item(1, 0, 0), Item(40, 0, 0)], 5, LIMITS).admitted == (1,)


def test_an_admitted_prompt_is_in_the_step_that_follows() -> None:
    """Guards TTFT: a prompt that waits for another step of decoding first."""
    assert plan([Item(10, 9, 3)], [Item(40, 8, 0)], 20, LIMITS).admitted == (16,)


def test_chunks_fill_a_step_but_do_not_pile_up() -> None:
    """Guards ITL: prompts that arrive together are computed one after another, not in one long step."""
    decoding, prompt = Item(10, 9, 3), Item(30, 0, 8)
    result = plan([decoding, prompt, prompt, prompt], [Item(9, 0, 0)], 20, LIMITS)
    assert [(row.item, row.length) for row in result.rows] == [(0, 1), (1, 16), (2, 4)]
    assert result.admitted == (0,)
    short = plan([decoding, *[Item(7, 0, 2)] * 3], [Item(9, 0, 0)], 20, LIMITS)
    assert [row.length for row in short.rows] == [1, 7, 7, 6]


def test_a_prompt_advances_beside_more_rows_than_the_budget() -> None:
    """Guards against a prompt that waits for as long as others decode."""
    result = plan([*[Item(10, 9, 3)] * 40, Item(30, 0, 8)], [], 0, LIMITS)
    assert result.rows[-1] == PlannedRow(40, 1)
